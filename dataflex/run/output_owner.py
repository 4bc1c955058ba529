"""Ownership of an output folder by a run: `dataflex/run.json`."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import MinLen

from dataflex.run.documents import read_document
from gradstore.errors import StoreIOError
from gradstore.storage.local import StoreFiles
from gradstore.storage.lock import WriterLock
from gradstore.storage.replace import replace_file

_log = logging.getLogger(__name__)


_NEXT = (
    "Remove the file: the run then goes on from the newest checkpoint in output_dir, whichever run "
    "wrote it."
)


@dataclass(frozen=True)
class Identity:
    """The content of run.json."""

    run_id: Annotated[str, MinLen(1)]


def known_identity(output_dir: Path) -> str | None:
    """Return the id of the run that owns `output_dir`; None where none has started.

    Raises:
        DamagedData: the file that holds it is damaged.
    """
    try:
        return read_document(_identity_file(output_dir), Identity, _NEXT).run_id
    except FileNotFoundError:
        return None


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
