"""A store's machine requirements: link, rename, fsync, flock, and a zarr that tears nothing."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

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

#: File system -> mount options by which a lock is seen by processes of one machine alone.
_LOCAL_LOCKS = {
    "nfs": ("nolock", "local_lock=all", "local_lock=flock"),
    "nfs4": ("nolock", "local_lock=all", "local_lock=flock"),
    "lustre": ("localflock", "noflock"),
    "cifs": ("nobrl",),
    "smb3": ("nobrl",),
}

#: File system -> how its machines come to share locks, told where they were found not to.
_SHARED_LOCKS = {
    "nfs": "mount it with local_lock=none",
    "nfs4": "mount it with local_lock=none",
    "lustre": "mount it with flock",
    "cifs": "mount it without nobrl",
    "smb3": "mount it without nobrl",
    "beegfs": "set tuneUseGlobalFileLocks = true in beegfs-client.conf",
    "fuse.sshfs": "sshfs has none: mount the folder otherwise, or serve the store",
}
_MOUNTS = Path("/proc/self/mountinfo")


def probe(files: StoreFiles) -> None:
    """Probe fsync, link and rename in staging (the lock has just taken flock).

    Raises:
        StoreIOError: the file system lacks one of them; names the probe.
    """
    if not isinstance(files.root, Path):  # a server was probed by `make_root`
        return
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


def check_sharing(files: StoreFiles, mounts: Path = _MOUNTS) -> None:
    """Refuse a mount that keeps locks to one machine, where workers of several would not meet.

    Args:
        files: the store's files.
        mounts: Linux's list of mounts; without it nothing is known.

    Raises:
        StoreIOError: names the mount's option.
    """
    if not isinstance(files.root, Path):
        return
    if option := local_locks(*_listed(files, mounts)):
        raise lacks(
            files,
            "shared flock",
            OSError(0, f"it is mounted with {option}, which keeps locks to one machine"),
        )


def keeps_locks(files: StoreFiles, mounts: Path = _MOUNTS) -> StoreIOError:
    """Build the error for a file system on which a lock was seen not to be shared.

    Args:
        files: the store's files.
        mounts: Linux's list of mounts.
    """
    kind, _ = _mount(*_listed(files, mounts))
    way = _SHARED_LOCKS.get(kind, "mount it so that its machines share flock")
    return lacks(
        files,
        "shared flock",
        OSError(0, f"a worker of another machine is at work, and this one was given the whole lock "
                   f"beside it; of {kind or 'this kind'}: {way}, or write from one machine alone"),
    )  # fmt: skip


def _listed(files: StoreFiles, mounts: Path) -> tuple[str, str]:
    """Return the list of mounts, "" where there is none, and the store's folder in it."""
    try:
        listed = mounts.read_text(encoding="utf-8", errors="replace")
        return listed, os.path.realpath(files.on_disk(""))
    except OSError:
        return "", ""


def local_locks(mountinfo: str, path: str) -> str:
    """Return the option by which the mount of `path` keeps locks to one machine; "" if none.

    Args:
        mountinfo: content of /proc/<pid>/mountinfo (see proc(5)).
        path: absolute, without symlinks.

    >>> nfs = "36 35 98:0 / /mnt rw - nfs4 server:/ rw,vers=4.2,local_lock={}"
    >>> local_locks(nfs.format("none"), "/mnt/store"), local_locks(nfs.format("all"), "/mnt/store")
    ('', 'local_lock=all')
    """
    kind, options = _mount(mountinfo, path)
    return next((o for o in options if o in _LOCAL_LOCKS.get(kind, ())), "")


def _mount(mountinfo: str, path: str) -> tuple[str, list[str]]:
    """Return the file system and the options of the mount that a path is on; "" where unknown."""
    found: tuple[str, list[str]] = "", []
    deepest = 0
    for line in mountinfo.splitlines():
        fields, _, source = line.partition(" - ")
        words, rest = fields.split(), source.split()
        if len(words) < 6 or len(rest) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), words[4])
        if f"{path}/".startswith(f"{point.rstrip('/')}/") and len(point) >= deepest:
            deepest = len(point)
            found = rest[0], [*words[5].split(","), *rest[2].split(",")]
    return found


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
