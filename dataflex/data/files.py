"""The files of the data sets in a dataset_info.json: which they are, and their identity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradstore.errors import StoreIOError
from gradstore.storage.hashing import sha256_file

INFO = "dataset_info.json"


def data_files(folder: Path, entry: Any) -> list[Path]:  # noqa: ANN401 - JSON
    """Return the files on this machine that hold the rows of a data set, sorted by name.

    Args:
        folder: `dataset_dir`.
        entry: the data set's entry of dataset_info.json.
    """
    name = entry.get("file_name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or "://" in name:
        return []
    path = folder / name
    return sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []


def read_info(folder: Any) -> dict[str, Any]:  # noqa: ANN401 - a value of dataset_dir
    """Read dataset_info.json of a folder; empty where there is none that can be read."""
    try:
        found = json.loads((Path(folder) / INFO).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def identity(folder: Any, names: Iterable[str]) -> dict[str, dict[str, str]]:  # noqa: ANN401
    """Describe what the rows of data sets are read from: name -> part -> a short text to compare.

    Parts are the entry of dataset_info.json, and size and sha256 of every file. A data set without
    a file on this machine has its entry alone; one without an entry has no part.
    """
    info = read_info(folder)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        parts: dict[str, str] = {}
        if (entry := info.get(name)) is not None:
            parts[INFO] = json.dumps(entry, sort_keys=True)
            for path in data_files(Path(folder), entry):
                try:
                    digest, size = sha256_file(path), path.stat().st_size
                except (OSError, StoreIOError):
                    continue  # a folder among the files, or one that the loader will complain about
                parts[path.name] = f"{size} bytes, sha256 {digest[:16]}"
        found[name] = parts
    return found


def changed_parts(
    held: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]]
) -> list[str]:
    """Compare two identities: one phrase per part that differs.

    Files that are gone don't count where none of a data set's files is here.
    """
    changed = []
    for name, parts in now.items():
        before = held.get(name, {})
        here = any(part != INFO for part in parts)
        for part in {**before, **parts}:
            gone = part not in parts and not (here and part != INFO)
            if not gone and before.get(part) != parts.get(part):
                changed.append(
                    f"data set {name!r}: {part} was {before.get(part, 'not there')}, is now "
                    f"{parts.get(part, 'not there')}"
                )
    return changed
