"""Workers whose locks this machine does not see, by the signs of life that they show.

Where a file system keeps flock to one machine, and its mount does not say so (sshfs, BeeGFS as it
comes), the second machine is given the whole lock while workers of the first are at work, and would
remove what they have staged. Their beats are files, and those it sees.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path

from gradstore.errors import DamagedFile
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.probes import keeps_locks
from gradstore.storage.processes import boot_id

_log = logging.getLogger(__name__)

#: File in a worker's own staging folder that it changes while it lives.
BEAT = "beat"

#: Beats within the time after which a silent worker counts as dead.
BEATS = 6

#: Most seconds from one beat to the next, however long a lease is: so others need not watch longer.
MOST_BEAT_SECONDS = 60.0
#: Times a beat is due while it is watched.
_WATCHED_BEATS = 2
_LOOK_SECONDS = 0.5
#: Of a beat that does not say so, as earlier releases wrote them.
_LEASE_SECONDS = 60.0


def beat_seconds(lease_seconds: float) -> float:
    """Return how often a worker shows life."""
    return min(lease_seconds / BEATS, MOST_BEAT_SECONDS)


def sign(count: int, lease_seconds: float, machine: str) -> bytes:
    """Spell the sign of life number `count`; all of one worker are equally long."""
    return f"{count:020d} {beat_seconds(lease_seconds):.9e} {machine}".encode()


def this_machine() -> str:
    """Name the running kernel, or the host where a kernel has no name."""
    return boot_id() or f"host:{'-'.join(socket.gethostname().split())}"


def check_unseen(files: StoreFiles) -> None:
    """Refuse a store that workers of another machine write to, although this process has the lock.

    For whoever holds the lock exclusively, before it removes anything. Where no such worker left a
    sign of life this returns at once; else the signs are watched, twice as long as one lasts, and
    those of dead workers removed.

    Args:
        files: of a folder; in a bucket the lock is told of by the server itself.

    Raises:
        StoreIOError: a worker lives, so the file system keeps locks to one machine.
    """
    if not isinstance(files.root, Path):
        return
    seen = _signs(files)
    if not seen:
        return
    seconds = max(map(_seconds, seen.values()))
    _log.info(
        "workers of another machine, or of this one before its last start, left signs of life in "
        "store \"%s\": watching them for %.0f s, since not every file system shows their lock here",
        files.root, seconds,
    )  # fmt: skip
    ends = time.monotonic() + seconds
    while seen and (left := ends - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK_SECONDS, seconds / 10))
        now = _signs(files)
        for name, before in list(seen.items()):
            if name not in now:
                del seen[name]  # it has ended
            elif now[name] != before:
                raise keeps_locks(files)
    for name in seen:
        files.remove(f"{STAGING}/{name}/{BEAT}")  # the next who comes need not watch it again


def _signs(files: StoreFiles) -> dict[str, bytes]:
    """Return the last sign of life of each worker of another machine, by its folder."""
    found, here = {}, [this_machine().encode()]
    for name in files.names(STAGING):
        try:
            beat = files.read_if_there(f"{STAGING}/{name}/{BEAT}")
        except DamagedFile:  # no folder of a worker
            continue
        if beat is not None and beat.split(b" ")[2:] != here:
            found[name] = beat
    return found


def _seconds(beat: bytes) -> float:
    """Return how long a worker is watched, as its sign of life says."""
    try:
        every = float(beat.split(b" ")[1])
    except (IndexError, ValueError):
        every = _LEASE_SECONDS / BEATS
    # What it says of itself may be anybody's.
    return _WATCHED_BEATS * (min(every, MOST_BEAT_SECONDS) if every > 0 else MOST_BEAT_SECONDS)
