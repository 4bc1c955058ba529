"""Paths of models: faults that are seen without loading anything, or importing what loads it."""

from __future__ import annotations

from pathlib import Path

from dataflex.config.values import names_a_folder
from gradstore.format.foreign import read_object

#: What a folder must hold to be a model, or an adapter on one.
MODEL, ADAPTER = "config.json", "adapter_config.json"


def reference_faults(path: object, key: str) -> list[str]:
    """List the faults of a reference that can be found before anything is loaded.

    Args:
        path: a model folder, an adapter folder, or a hub id.
        key: what the user calls it, for messages.
    """
    if not isinstance(path, str) or not path.strip():
        return [f"{key} is {path!r}; name the folder (or hub id) of a trained model or adapter."]
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return missing_folder_faults(key, path)
    if not any((folder / name).is_file() for name in (MODEL, ADAPTER)):
        return [f"{key} {path!r} holds no model: neither {MODEL} nor {ADAPTER} is there."]
    return []


def model_path_faults(key: str, path: str) -> list[str]:
    """List faults of a model's path without loading it: a folder must hold a config.json."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        try:
            read_object((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return [f"{key} {path!r} has no readable config.json: {error}"]
        return []
    return missing_folder_faults(key, path)


def missing_folder_faults(key: str, path: str) -> list[str]:
    """List the fault of a model's path that is no folder and cannot be a hub id."""
    if not names_a_folder(path):
        return []
    step = (
        how_to_bring(Path(path))
        or f"Correct the path (from {str(Path.cwd())!r}), or name a hub id."
    )
    return [f"{key} {path!r} is not a folder on this machine. {step}"]


def how_to_bring(folder: Path) -> str:
    """Name the command that brings a missing folder: the `prepare.py` beside it; else nothing."""
    script = folder.expanduser().parent / "prepare.py"
    return f"Bring it with `python {script}`." if script.is_file() else ""
