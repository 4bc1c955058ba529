"""Throwing a whole store away, for a run that starts anew in its own folder."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from gradstore.disk.files import StoreFiles
from gradstore.disk.lock import WriterLock
from gradstore.errors import StoreIOError
from gradstore.layout import METADATA


def discard_store(path: Path) -> None:
    """Remove a store that nobody writes to; a folder that is no store is left alone.

    The folder is renamed under the writer's lock first, so that no reader or writer ever meets a
    half-removed store.

    Raises:
        StoreBusy: another process writes to it.
        StoreIOError: it cannot be renamed or removed.
    """
    files = StoreFiles(path)
    if not path.is_dir() or not files.exists(METADATA):
        return
    doomed = path.with_name(f".{path.name}.{secrets.token_hex(4)}.discarded")
    try:
        with WriterLock(files):
            os.rename(path, doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        raise StoreIOError(
            f'store "{path}" cannot be removed: {error.strerror}. Remove it by hand, or choose '
            "another output_dir."
        ) from error
