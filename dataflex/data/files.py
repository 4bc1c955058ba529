"""The files of the data sets in a dataset_info.json: which they are, and their identity."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from gradstore.errors import StoreIOError
from gradstore.format.foreign import read_json
from gradstore.storage.hashing import sha256_file

INFO = "dataset_info.json"

#: Part of an identity that is no file.
ITS_ENTRY = "its entry in dataset_info.json"

#: Keys of an entry of dataset_info.json that say where the rows of a data set are.
SOURCES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")

#: The other keys of an entry, and of two mappings in it.
ENTRY = (*SOURCES, "formatting", "ranking", "subset", "split", "folder", "num_samples", "columns",
         "tags")  # fmt: skip
COLUMNS = ("prompt", "query", "response", "history", "messages", "system", "tools", "images",
           "videos", "audios", "chosen", "rejected", "kto_tag")  # fmt: skip
TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag",
        "system_tag")  # fmt: skip
FORMATS = ("alpaca", "sharegpt", "openai")


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
        found = read_json((Path(folder) / INFO).read_text(encoding="utf-8"))
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
            parts[ITS_ENTRY] = json.dumps(entry, sort_keys=True)
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
        here = any(part != ITS_ENTRY for part in parts)
        for part in {**before, **parts}:
            gone = part not in parts and not (here and part != ITS_ENTRY)
            was, now_is = before.get(part), parts.get(part)
            if gone or was == now_is:
                continue
            keys = _changed_keys(was, now_is) if part == ITS_ENTRY else []
            changed.append(
                f"data set {name!r}: {part} has other values of {', '.join(keys)}"
                if keys
                else f"data set {name!r}: {part} was {was or 'not there'}, is now "
                f"{now_is or 'not there'}"
            )
    return changed


def _changed_keys(was: str | None, now_is: str | None) -> list[str]:
    """List the keys by which two entries differ; empty where one is no mapping."""
    try:
        before, after = read_json(was or ""), read_json(now_is or "")
    except ValueError:
        return []
    if not isinstance(before, dict) or not isinstance(after, dict):
        return []
    return [key for key in sorted({*before, *after}) if before.get(key) != after.get(key)]


def entry_faults(entry: Mapping[str, Any]) -> list[str]:
    """List keys of an entry that look misspelt (others are ignored), and values of a wrong type."""
    faults = []
    for where, keys, accepted in (
        ("", entry, ENTRY),
        ("columns.", entry.get("columns", {}), COLUMNS),
        ("tags.", entry.get("tags", {}), TAGS),
    ):
        if not isinstance(keys, dict | Mapping):
            faults.append(f"{where[:-1]} is {keys!r} in {INFO}; expected a mapping.")
            continue
        for key in keys:
            near = get_close_matches(str(key), accepted, 1, 0.75)
            if key not in accepted and near:
                faults.append(
                    f"its entry in {INFO} has {where + str(key)!r} (did you mean "
                    f"{where + near[0]!r}?)."
                )
    count, style = entry.get("num_samples"), entry.get("formatting", "alpaca")
    if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
        faults.append(f"num_samples is {count!r} in {INFO}; expected a whole number, at least 1.")
    if style not in FORMATS:
        faults.append(f"formatting is {style!r} in {INFO}; choose {', '.join(FORMATS)}.")
    if entry.get("script_url") and not {*SOURCES[:4]} & set(entry):
        faults.append(
            f"script_url is {entry['script_url']!r} in {INFO}: the installed datasets library runs "
            "no scripts. Write its rows to a JSON file and name that in file_name."
        )
    return faults


def file_faults(folder: Path, entry: Mapping[str, Any]) -> list[str]:
    """List what makes the files of a data set unreadable and can be seen without reading them.

    Args:
        folder: `dataset_dir`.
        entry: the data set's entry of dataset_info.json.
    """
    name = entry.get("file_name")
    if not isinstance(name, str) or "://" in name:
        return []
    path = folder / name
    if not path.exists():
        return [f"its file {str(path)!r} does not exist."]
    files = data_files(folder, entry)
    if not files:
        return [f"its folder {str(path)!r} is empty: put its files there."]
    if path.is_dir() and (faults := _mixed(path, files)):
        return faults
    return [f"its file {str(file)!r} {fault}" for file in files if (fault := _fault(file))]


def _mixed(folder: Path, files: list[Path]) -> list[str]:
    """Find what LlamaFactory, which reads every file of a folder, would stumble over."""
    kinds = {path.suffix for path in files}
    if len(kinds) == 1 and not any(path.is_dir() for path in files):
        return []
    suffixes = [p.suffix for p in files if not p.name.startswith(".")]
    usual = max(suffixes, key=suffixes.count, default="")
    odd = [path.name for path in files if path.suffix != usual or path.is_dir()]
    return [
        f"its folder {str(folder)!r} holds {', '.join(map(repr, odd[:3]))} beside files of data: "
        f"every file there is read, and all must have one ending. Move or remove "
        f"{'it' if len(odd) == 1 else 'them'}."
    ]


def _fault(path: Path) -> str | None:
    """Say what is wrong with a file by its first bytes."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
            rest = file.read(1)
    except OSError:
        return None  # told by the loader, with its exit code
    text = path.suffix in (".json", ".jsonl", ".csv", ".txt")
    if head.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the data: run `git lfs pull` where it lies."
    if text and head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "is UTF-16: save it as UTF-8."
    if (
        path.suffix == ".json"
        and head.startswith(b"\xef\xbb\xbf")
        and head[3:].lstrip()[:1] == b"["
    ):
        return "begins with a byte order mark (BOM): save it as UTF-8 without BOM."
    if not rest and head.strip() in (b"", b"[]", b"{}"):
        return "is empty: it has no row."
    return None


def unreadable(path: Path) -> str | None:
    """Find the first row of a JSON file that keeps it from being read; None if all can be.

    Looks for broken JSON and text, and for a column of several types. Files above 1 GiB are not
    looked through.
    """
    if path.suffix not in (".json", ".jsonl") or path.stat().st_size > 1 << 30:
        return None
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        return f"line {line} of {str(path)!r} is not UTF-8 (byte 0x{raw[error.start]:02x})."
    try:
        content = read_json(text)
    except ValueError as error:
        return _of_lines(path, text, error)
    rows = enumerate(content if isinstance(content, list) else [content])
    return _of_two_kinds(path, ((f"row {i}", row) for i, row in rows))


def _of_lines(path: Path, text: str, whole: Exception) -> str | None:
    """Look through JSON lines; `whole` is the complaint about the text as one document."""
    rows: list[tuple[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            if line.strip():
                rows.append((f"line {number}", read_json(line)))
        except ValueError as error:
            if path.suffix == ".json" and not rows:
                return f"{str(path)!r} is not JSON: {whole}."
            return f"line {number} of {str(path)!r} is not JSON: {error}."
    return _of_two_kinds(path, rows)


def _of_two_kinds(path: Path, rows: Iterable[tuple[str, Any]]) -> str | None:
    """Find the first row whose value of a column has another type than the rows before."""
    kinds: dict[str, str] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            return f"{where} of {str(path)!r} is {kind_of(row)}, not an object with named columns."
        for key, value in row.items():
            if value is not None and kinds.setdefault(key, kind_of(value)) != kind_of(value):
                return (
                    f"{where} of {str(path)!r}: {key!r} is {kind_of(value)} ({str(value)[:40]}), "
                    f"in the rows before it is {kinds[key]}. Give all rows the same type."
                )
    return None


def kind_of(value: Any) -> str:  # noqa: ANN401 - JSON
    """Name the type of a JSON value."""
    names = {str: "text", bool: "true or false", int: "a number", float: "a number",
             dict: "an object", list: "a list"}  # fmt: skip
    return names.get(type(value), "null")
