"""A store's machine requirements: link, rename, fsync, flock, and a zarr that tears nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial

from packaging.version import Version

from gradstore.errors import BadInput, StoreIOError
from gradstore.storage.local import STAGING, StoreFiles

OLDEST_ZARR = "3.1.3"

#: How file systems answer to an operation they lack.
_UNSUPPORTED = {
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EPERM,
    errno.EMLINK,
    errno.EXDEV,
    errno.ENOLCK,
}


def probe(files: StoreFiles) -> None:
    """Probe fsync, link and rename in staging (the lock has just taken flock).

    Raises:
        StoreIOError: the file system lacks one of them; names the probe.
    """
    names = {name: f"{STAGING}/probe-{name}" for name in ("file", "link", "moved")}
    for relative in names.values():
        files.remove(relative)
    probes: tuple[tuple[str, Callable[[], None]], ...] = (
        ("fsync", partial(files.write, names["file"], [b"probe"])),
        ("link", partial(_probe_link, files, names["file"], names["link"])),
        ("rename", partial(files.move, names["link"], names["moved"])),
    )
    for operation, act in probes:
        try:
            act()
        except StoreIOError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in _UNSUPPORTED:
                raise lacks(files, operation, cause) from error
            raise
    for relative in names.values():
        files.remove(relative)


def _probe_link(files: StoreFiles, staged: str, target: str) -> None:
    if not files.link(staged, target) or files.link(staged, target):
        raise lacks(files, "link", OSError(0, "a second link to a taken name did not fail"))


def lacks(files: StoreFiles, operation: str, error: OSError) -> StoreIOError:
    """Build the error for a file system that failed one of the probes."""
    return StoreIOError(
        f'the file system of store "{files.root}" failed the {operation} probe '
        f"({error.strerror}); a store needs link, rename, fsync and flock. "
        "Choose a local disk with gradstore=PATH"
    )


def check_zarr(version: str) -> None:
    """Reject a zarr version that tears chunks when killed.

    Raises:
        BadInput: it is older than 3.1.3.
    """
    if Version(version) < Version(OLDEST_ZARR):
        raise BadInput(
            f"zarr {version} is installed; {OLDEST_ZARR} or newer is needed (older ones tear "
            f"chunks when killed). Run: pip install 'zarr>={OLDEST_ZARR}'"
        )
