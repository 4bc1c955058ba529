"""Leases: several workers share tasks through the store alone, and outlive each other.

A claim on task `t` is a file `t.1` that is linked, so that one worker alone can have made it; when
its owner has died, the next claim is `t.2`, and so on: the highest number counts, nothing is ever
renamed or removed. A worker shows that it lives by changing one file of its own again and again.
Others judge by how long *they* have not seen it change, on their own monotonic clock: no times of
different machines are compared, and a clock that jumps changes nothing.

A lease decides who computes, never what the store holds: a worker whose lease went to another while
it was only slow has done its work for nothing, and harms nothing (`shared_units`).
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from gradstore.errors import BadInput, DamagedFile, StoreIOError, expect, expect_whole
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.processes import boot_id
from gradstore.storage.unseen import BEAT, BEATS, beat_seconds, sign, this_machine

_log = logging.getLogger(__name__)

#: Claims of all tasks; like all of staging they are garbage once nobody writes.
LEASES = f"{STAGING}/leases"


def leases_of(files: StoreFiles) -> str:
    """Return the folder of the claims that count now; in a bucket each group of workers has one."""
    return f"{LEASES}/{files.group}" if files.group else LEASES


#: Seconds between two looks at tasks that others hold: at first, at most, and how they grow, so
#: that a look comes late by at most half of what was waited.
FIRST_LOOK_SECONDS, LOOK_SECONDS, GROWTH = 0.01, 1.0, 1.5

#: Seconds of a wait, if a lease is no longer, after which it is told of again; then twice as long.
TOLD_AGAIN_SECONDS = 120.0


@dataclass(frozen=True)
class Worker:
    """One of several processes that write to a store together.

    Attributes:
        number: i, from 1: where in a plan this worker starts.
        count: N. Others may have said another N, or come later; the store does not care.
        lease_seconds: silence after which others take over a worker's tasks. On a file system that
            shows changes late (NFS with a long actimeo) longer than that.
    """

    number: int = 1
    count: int = 1
    lease_seconds: float = 60.0

    def __post_init__(self) -> None:
        expect_whole(self.number, "number")
        expect_whole(self.count, "count")
        expect(self.number <= self.count, "number", self.number, f"at most count, {self.count}")
        seconds = self.lease_seconds
        fits = isinstance(seconds, int | float) and 0 < seconds < math.inf
        expect(fits, "lease_seconds", seconds, "a number of seconds above 0")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> Worker:
        """Read `i/N`.

        Raises:
            BadInput: it is not i/N with whole numbers 1 <= i <= N.

        >>> Worker.parse("2/4")
        Worker(number=2, count=4, lease_seconds=60.0)
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise BadInput(
                f"worker is {text!r}; give i/N, this worker's number and how many there are, such "
                "as 1/4, 2/4, 3/4 and 4/4"
            )
        return cls(int(found[1]), int(found[2]))

    def start(self, tasks: int) -> int:
        """Return the position of `tasks` at which this worker begins, going round."""
        return (self.number - 1) * tasks // self.count


@dataclass(frozen=True)
class Holder:
    """Owner of a claim, as its file says.

    Attributes:
        token: name of its folder in staging.
        boot: the running system it is part of; "" where that has no name.
        who: worker, host, process id and since when, for people.
    """

    token: str
    boot: str
    who: str


class Leases:
    """Claims of one worker on tasks of a store.

    A task is a name below `leases_of(files)`, such as `<plan sha256>/17`. Used from one thread, but
    for the sign of life, which has one of its own.

    Args:
        files: the store's files; the caller holds the store's lock, shared.
        worker: who claims.
    """

    def __init__(self, files: StoreFiles, worker: Worker) -> None:
        self.worker = worker
        self._files, self._folder = files, leases_of(files)
        self._boot, self._machine = boot_id(), this_machine()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = f"worker {worker}, host {socket.gethostname()}, pid {os.getpid()}, since {since}"
        self._document = canonical_json({"token": files.own, "boot": self._boot, "who": who})
        self._numbers: dict[str, int] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._waiting_for, self._pause = "", FIRST_LOOK_SECONDS
        self._waits_since: float | None = None
        self._told_after = TOLD_AGAIN_SECONDS
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._show_life, name="lease", daemon=True)

    def open(self) -> None:
        """Show a sign of life from now on; before that nothing may be claimed."""
        folder = self._files.make_own()
        self._beat = f"{folder}/{BEAT}"
        self._files.overwrite(self._beat, self._sign(0))
        self._thread.start()

    def close(self) -> None:
        """Show no sign of life any more: what this worker holds is free for others at once."""
        self._ends.set()
        if self._thread.is_alive():
            self._thread.join()
            self._files.remove(self._beat)

    # ---- claims ------------------------------------------------------------------------------

    def claim(self, task: str) -> Holder | None:
        """Claim a task that nobody alive holds.

        Returns:
            None if it is this worker's now; else who holds it.
        """
        number, holder = self._newest(task)
        if holder is not None and self._lives(holder):
            return holder if holder.token != self._files.own else None
        self._pause, self._waits_since = FIRST_LOOK_SECONDS, None
        if self._files.publish(f"{self._folder}/{task}.{number + 1}", self._document):
            self._numbers[task] = number + 1
            if holder is not None:
                _log.info("%s is taken over from %s", task.rpartition("/")[2], holder.who)
            return None
        return self._newest(task)[1] or Holder("", "", "another worker")

    def once(self, task: str, done: Callable[[], bool], act: Callable[[], None], what: str) -> None:
        """Return when a task is done, by this worker or another.

        Args:
            task: its name.
            done: whether it is done, as the store says.
            act: does it; called at most once, by the worker that holds the task.
            what: the task, for the line that is logged while others do it.
        """
        while not done():
            holder = self.claim(task)
            if holder is not None:
                self.wait(what, holder)
            elif not done():
                act()
                return

    def wait(self, what: str, holder: Holder) -> None:
        """Wait for others a moment; a line is logged for each of them and task, and again later.

        One that hangs shows life for ever, and cannot be told from one that has much to do.
        """
        line, now = f"waiting for {what}: {holder.who}", time.monotonic()
        if line != self._waiting_for:
            self._waiting_for, self._waits_since = line, None
            _log.info("%s", line)
        if self._waits_since is None:
            # Not before the lease would have ended of one that does not live.
            after = max(TOLD_AGAIN_SECONDS, self.worker.lease_seconds)
            self._waits_since, self._told_after = now, after
        waited = now - self._waits_since
        if waited >= self._told_after:
            self._told_after *= 2
            _log.info(
                "still %s, for %.0f minutes now. It shows life; if it hangs, end that process on "
                "that host, and its work is taken over", line, waited / 60,
            )  # fmt: skip
        time.sleep(self._pause)
        most = min(LOOK_SECONDS, self.worker.lease_seconds / (2 * BEATS))
        self._pause = min(most, GROWTH * self._pause)

    def _newest(self, task: str) -> tuple[int, Holder | None]:
        """Return the highest claim's number, 0 for none, and its owner."""
        number = self._numbers.get(task, 0)
        while self._files.has(f"{self._folder}/{task}.{number + 1}"):
            number += 1
        self._numbers[task] = number
        if not number:
            return 0, None
        try:
            return number, Holder(**parse(self._files.read(f"{self._folder}/{task}.{number}")))
        except (ValueError, TypeError):
            return number, None  # not of ours: nobody that could be alive

    def _lives(self, holder: Holder) -> bool:
        """Judge whether the owner of a claim is alive.

        Dead is who has ended (then its beat is gone), whose process this very kernel has ended
        (then nobody has the lock on its folder), and who has been silent for too long.
        """
        if holder.token == self._files.own:
            return True
        try:
            beat = self._files.read(f"{STAGING}/{holder.token}/{BEAT}")
        except DamagedFile:  # no such file
            return False
        if self._boot and holder.boot == self._boot and not self._files.is_in_use(holder.token):
            return False
        now = time.monotonic()
        known, since = self._seen.get(holder.token, (b"", now))
        if known != beat:
            self._seen[holder.token] = beat, now
            return True
        return now - since < self.worker.lease_seconds

    def _sign(self, count: int) -> bytes:
        return sign(count, self.worker.lease_seconds, self._machine)

    def _show_life(self) -> None:
        count = failures = 0
        while not self._ends.wait(beat_seconds(self.worker.lease_seconds)):
            count += 1
            try:
                self._files.overwrite(self._beat, self._sign(count))
            except StoreIOError as error:
                failures += 1
                if failures == 1:
                    _log.warning("no sign of life for other workers: %s", error)
