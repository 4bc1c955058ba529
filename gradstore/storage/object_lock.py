"""Lock of a store in a bucket: what `lock` is in a folder, with no kernel that frees it.

One object, `writer.lock`, names who holds it: one writer, or several workers. It is changed by a
put under the condition that it is as it was read (If-Match), so one of two that try wins. A holder
shows that it lives by counting up an object of its own. Whoever wants the lock judges by how long
*it* has not seen that change, on its own monotonic clock; and of a process of its own machine the
kernel says at once whether it lives.

A holder that others gave up, as a machine that slept may be, changes nothing any more once it sees
that it was silent for too long. As in a folder, the lock serves the message: what keeps two writers
apart is that nothing published is overwritten.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from types import TracebackType

from gradstore.errors import StoreBusy, StoreIOError
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import STAGING
from gradstore.storage.lock import LOCK
from gradstore.storage.objects import OWNER, ObjectFiles
from gradstore.storage.processes import Process

_log = logging.getLogger(__name__)

#: Seconds of silence after which a holder on another machine counts as dead, and signs of life
#: within them.
SILENT_SECONDS, BEATS = 60.0, 6

#: Seconds between two looks at a lock that another holds.
_LOOK_SECONDS = 0.1

#: Tokens of this process that hold, or wait for, a lock: others of it were let go of, perhaps
#: while no server could be told.
_ours: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """One who holds the lock.

    Attributes:
        token: name of its folder in staging.
        process: which it is.
        who: host, process id and since when, for people.
        worker: which of several, "" for a writer.
    """

    token: str
    process: Process
    who: str
    worker: str = ""

    def __str__(self) -> str:
        return (f"worker {self.worker}, " if self.worker else "") + self.who


@dataclass(frozen=True)
class _Record:
    """Content of the lock's object: its holders, who share it or not, and its ETag."""

    holders: tuple[Holder, ...] = ()
    shared: bool = False
    e_tag: str | None = None


class ObjectLock:
    """Lock on a store's `writer.lock`; a context manager.

    Args:
        files: of the store.
        what: the store as the user knows it, for messages.
        instead: what to do rather than wait, for messages.

    Raises:
        StoreBusy: another process holds it; names host, process id and since when.
        StoreIOError: the server does not answer.
    """

    def __init__(
        self,
        files: ObjectFiles,
        what: str = "store",
        instead: str = "choose another store with gradstore=PATH",
    ) -> None:
        self._files = files
        self._what, self._instead = f'{what} "{files.root}"', instead
        self._bucket = files.bucket
        self._me: Holder | None = None
        self._when_last: Callable[[], None] | None = None
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None
        self._shown = 0.0

    def __enter__(self) -> ObjectLock:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def acquire(self) -> None:
        """Acquire the lock and record its holder; one left by a dead writer is taken over."""
        me = self._begin("")
        try:
            self._take(me)
        except BaseException:  # Ctrl-C too
            self._end()
            raise
        self._me = me

    def join(
        self,
        worker: str,
        set_up: Callable[[], None],
        is_set_up: Callable[[], bool],
        when_last: Callable[[], None],
    ) -> None:
        """Acquire the lock together with other workers; see `WriterLock.join`."""
        me = self._begin(worker)
        try:
            while True:
                record = self._read()
                living = self._living(record)
                if not living:
                    if not self._write(record, [me], shared=False):
                        continue
                    self._told_of_dead(record)
                    self._files.alone = True
                    set_up()
                    self._files.alone = False
                    if self._write(self._read(), [me], shared=True):
                        break
                elif record.shared and is_set_up():
                    if self._write(record, [*living, me], shared=True):
                        break
                elif not living[0].worker and self._judged(living[0]):
                    raise self._busy(living)
                time.sleep(_LOOK_SECONDS)
        except BaseException:
            self._files.alone = False
            self._leave(me)
            self._end()
            raise
        self._me, self._when_last = me, when_last

    def release(self) -> None:
        """Clear the record and release the lock; what the last of several workers leaves, too."""
        me, self._me = self._me, None
        if me is None or me.process != Process.this():  # a child that was forked holds nothing
            return
        try:
            if self._when_last is not None:
                record = self._read()
                living = [each for each in self._living(record) if each != me]
                if not living and self._write(record, [me], shared=False):
                    self._files.alone = True
                    self._when_last()
            self._leave(me)
        finally:
            self._files.alone = False
            self._end()

    # ---- the record --------------------------------------------------------------------------

    def _take(self, me: Holder) -> None:
        """Become the only holder, or raise."""
        told = False
        while True:
            record = self._read()
            living = self._living(record)
            if not living:
                if self._write(record, [me], shared=False):
                    self._told_of_dead(record)
                    self._files.alone = True
                    return
            elif any(self._judged(each) for each in living):
                raise self._busy(living)
            elif not told:
                told = True
                _log.info("%s: seeing for up to %.0f s whether its holder lives: %s",
                          self._what, SILENT_SECONDS, living[0])  # fmt: skip
            time.sleep(_LOOK_SECONDS)

    def _read(self) -> _Record:
        found = self._bucket.get(LOCK)
        if found is None:
            return _Record()
        try:
            document = parse(bytes(found.data))
            holders = tuple(
                Holder(each["token"], Process(**each["process"]), each["who"], each["worker"])
                for each in document["holders"]
            )
            return _Record(holders, bool(document["shared"]), found.e_tag)
        except (ValueError, KeyError, TypeError):
            return _Record(e_tag=found.e_tag)  # not of ours: nobody that could be alive

    def _write(self, record: _Record, holders: Sequence[Holder], *, shared: bool) -> bool:
        """Write new holders over the record that was read; False if it has changed since."""
        document = {"holders": [asdict(each) for each in holders], "shared": shared,
                    "after": record.e_tag}  # fmt: skip
        return self._bucket.swap(LOCK, canonical_json(document), record.e_tag)

    def _leave(self, me: Holder) -> None:
        """Take this holder out of the record."""
        while True:
            record = self._read()
            others = [each for each in record.holders if each != me]
            if len(others) == len(record.holders):
                return
            if self._write(record, others, shared=record.shared and bool(others)):
                return

    def _told_of_dead(self, record: _Record) -> None:
        for each in record.holders:
            _log.warning("stale lock of %s (%s) taken over", self._what, each)

    def _busy(self, living: Sequence[Holder]) -> StoreBusy:
        who = str(living[-1])
        if living[-1].worker:
            who = f"workers of a shared build, the last to join being {who}"
        return StoreBusy(
            f"{self._what} is being written by {who}. Wait until it ends, or {self._instead}"
        )

    # ---- who lives ---------------------------------------------------------------------------

    def _living(self, record: _Record) -> list[Holder]:
        """Return the holders but for those that are known to be dead."""
        return [each for each in record.holders if self._judged(each) is not False]

    def _judged(self, holder: Holder) -> bool | None:
        """Tell whether a holder lives; None while that is not known."""
        if holder.process == Process.this():
            return holder.token in _ours
        lives = holder.process.lives()
        if lives is not None:
            return lives
        found = self._bucket.get(f"{STAGING}/{holder.token}/{OWNER}")
        if found is None:  # it has ended
            return False
        content, now = bytes(found.data), time.monotonic()
        known, since = self._seen.setdefault(holder.token, (content, now))
        if known != content:
            return True
        return None if now - since < SILENT_SECONDS else False

    def _begin(self, worker: str) -> Holder:
        """Show a sign of life from now on; name this process."""
        process = Process.this()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = f"host {socket.gethostname()}, pid {os.getpid()}, since {since}"
        self._files.make_own()
        _ours.add(self._files.own)
        self._shown = _now()
        self._ends.clear()
        self._thread = threading.Thread(target=self._show_life, name="lock", daemon=True)
        self._thread.start()
        self._files.guard = self._check_held
        return Holder(self._files.own, process, who, worker)

    def _end(self) -> None:
        """Show no sign of life any more."""
        _ours.discard(self._files.own)
        self._ends.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._files.guard = lambda: None

    def _show_life(self) -> None:
        count = 0
        while not self._ends.wait(SILENT_SECONDS / BEATS):
            count += 1
            try:
                if _now() - self._shown < SILENT_SECONDS:
                    began = _now()
                    self._files.show_life(count)
                    self._shown = began
            except StoreIOError as error:
                _log.warning("no sign of life of this writer for others: %s", error)

    def _check_held(self) -> None:
        """Refuse to change anything after a silence in which others may have taken the lock.

        Raises:
            StoreBusy: there was one.
        """
        silent = _now() - self._shown
        if silent >= SILENT_SECONDS:
            raise StoreBusy(
                f"this process showed no sign of life for {silent:.0f} s (more than "
                f"{SILENT_SECONDS:.0f}), so another may write {self._what} now. Run again: what is "
                "finished is reused"
            )


def _now() -> float:
    """Return seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)
