"""Replacing a single file whole, for files that are not part of a store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from gradstore.errors import StoreIOError


def replace_file(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Replace a file: readers see the old bytes or the new ones, also after a crash.

    Its folder is made if need be.

    Args:
        path: the file.
        content: all of it, or its parts, which are taken one by one.

    Raises:
        StoreIOError: the file cannot be written; the old one is untouched.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):  # of whoever gives the parts
            raise
        size = f" ({len(content):,} bytes)" if isinstance(content, bytes) else ""
        raise StoreIOError(
            f"cannot write {path}{size}: {error.strerror}; choose a folder that may be written and "
            "has room"
        ) from error


def write_synced(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a new file (it must not exist), whole or part by part; wait until it is on disk."""
    with path.open("xb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on disk, whichever process wrote them."""
    _sync(path)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power loss."""
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
