"""Ownership of an output folder by a run: `dataflex/run.json`."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.foreign import read_json
from gradstore.storage.local import StoreFiles
from gradstore.storage.lock import WriterLock
from gradstore.storage.replace import replace_file

_log = logging.getLogger(__name__)


def known_identity(output_dir: Path) -> str | None:
    """Return the id of the run that owns `output_dir`; None where none has started.

    Raises:
        BadInput: the file that holds it is damaged.
    """
    path = _identity_file(output_dir)
    if not path.is_file():
        return None
    try:
        return str(read_json(path.read_text(encoding="utf-8"))["run_id"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{str(path)!r} is damaged ({error}); remove it.") from error


def remember_identity(output_dir: Path, run_id: str) -> None:
    """Make `run_id` the owner of `output_dir`."""
    replace_file(_identity_file(output_dir), json.dumps({"run_id": run_id}).encode())


def _identity_file(output_dir: Path) -> Path:
    return output_dir / "dataflex" / "run.json"


def own_output(output_dir: Path) -> WriterLock:
    """Lock a run's records and checkpoints; the lock is to be released when the run ends.

    A file system without flock lets a run train, with a warning: only a store needs it.

    Raises:
        StoreBusy: another run is writing there.
        StoreIOError: the folder cannot be made.
    """
    files = StoreFiles(output_dir / "dataflex")
    files.make_root()
    lock = WriterLock(files, "the run in", "choose another output_dir")
    try:
        lock.acquire()
    except StoreIOError as error:
        reason = error.__cause__ or error
        _log.warning(
            "%s cannot be locked (%s): another run could write there, too", output_dir, reason
        )
    return lock
