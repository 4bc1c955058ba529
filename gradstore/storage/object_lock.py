"""Lock of a store in a bucket: what `lock` is in a folder, with no kernel that frees it.

One object, `writer.lock`, names who holds it: one writer, or several workers. It is changed by a
put under the condition that it is as it was read (If-Match), so one of two that try wins. A holder
shows that it lives by counting up an object of its own. Whoever wants the lock judges by how long
*it* has not seen that change, on its own monotonic clock; and of a process of its own machine the
kernel says at once whether it lives.

A holder that was silent, as a machine that slept, changes nothing before it has looked whether it
still holds the lock. It looks after half of the time in which others give it up: so what it has
sent by then has time to arrive. What comes later still is made harmless by its name or condition.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from gradstore.errors import StoreBusy, StoreIOError
from gradstore.format.canonical import canonical_json, parse
from gradstore.storage.local import STAGING
from gradstore.storage.lock import LOCK, StoreLock
from gradstore.storage.objects import OWNER, ObjectFiles
from gradstore.storage.processes import Process

_log = logging.getLogger(__name__)

#: Seconds of silence after which a holder on another machine counts as dead, and signs of life
#: within them.
SILENT_SECONDS, BEATS = 60.0, 6

#: Share of that silence after which a holder looks at the lock before its next change.
_LOOKS_AFTER = 0.5

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
    """Content of the lock's object: its holders, who share it or not, their group, its ETag."""

    holders: tuple[Holder, ...] = ()
    shared: bool = False
    group: str = ""
    e_tag: str | None = None


@dataclass(frozen=True)
class _Sign:
    """Another holder's sign of life: how it was seen last, since when, and whether it changed."""

    content: bytes
    since: float
    changed: bool = False


class ObjectLock(StoreLock):
    """Lock on a store's `writer.lock` in a bucket."""

    _files: ObjectFiles
    _me: Holder | None = None
    _thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the lock; see `StoreLock`."""
        with self._asking("") as me:
            self._take(me)
        self._me = me

    def join(
        self,
        worker: str,
        set_up: Callable[[], None],
        is_set_up: Callable[[], bool],
        when_last: Callable[[], None],
    ) -> None:
        """Acquire the lock together with other workers; see `StoreLock`."""
        with self._asking(worker) as me:
            while True:
                record = self._read()
                living = self._living(record)
                if not living:
                    if not self._write(record, [me]):
                        continue
                    self._take_over(record)
                    self._files.group = me.token
                    set_up()
                    self._files.alone = False
                    if self._write(self._read(), [me], group=me.token):
                        break
                elif record.shared:
                    self._files.group = record.group
                    if is_set_up() and self._write(record, [*living, me], group=record.group):
                        break
                elif not living[0].worker and self._judged(living[0]):
                    raise self._busy(living)
                time.sleep(_LOOK_SECONDS)
        self._me, self._when_last = me, when_last

    def release(self) -> None:
        """Release the lock; see `StoreLock`."""
        me, self._me = self._me, None
        if me is None or me.process != Process.this():  # a child that was forked holds nothing
            return
        try:
            if self._when_last is not None:
                record = self._read()
                living = [each for each in self._living(record) if each != me]
                if not living and self._write(record, [me]):
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
                if self._write(record, [me]):
                    self._take_over(record)
                    return
            elif any(self._judged(each) for each in living):
                raise self._busy(living)
            elif not told:
                told = True
                _log.info("%s: seeing for up to %.0f s whether its holder lives: %s",
                          self._what, SILENT_SECONDS, living[0])  # fmt: skip
            time.sleep(_LOOK_SECONDS)

    def _read(self) -> _Record:
        found = self._files.bucket.get(LOCK)
        if found is None:
            return _Record()
        try:
            document = parse(bytes(found.data))
            holders = tuple(
                Holder(each["token"], Process(**each["process"]), each["who"], each["worker"])
                for each in document["holders"]
            )
            group = str(document.get("group", ""))
            return _Record(holders, bool(document["shared"]), group, found.e_tag)
        except (ValueError, KeyError, TypeError):
            return _Record(e_tag=found.e_tag)  # not of ours: nobody that could be alive

    def _write(self, record: _Record, holders: Sequence[Holder], *, group: str = "") -> bool:
        """Write new holders over the record that was read; False if it has changed since.

        Args:
            record: as it was read.
            holders: who holds the lock now.
            group: what workers that share it are called together; "" of a writer alone.
        """
        document = {"holders": [asdict(each) for each in holders], "shared": bool(group),
                    "group": group, "after": record.e_tag}  # fmt: skip
        return self._files.bucket.swap(LOCK, canonical_json(document), record.e_tag)

    def _leave(self, me: Holder) -> None:
        """Take this holder out of the record."""
        while True:
            record = self._read()
            others = [each for each in record.holders if each != me]
            if len(others) == len(record.holders):
                return
            if self._write(record, others, group=record.group if others else ""):
                return

    def _take_over(self, record: _Record) -> None:
        """Tell of the dead that left this record; the store is this writer's alone now."""
        for each in record.holders:
            self._told_of_dead(str(each))
        self._files.alone = True

    def _busy(self, living: Sequence[Holder]) -> StoreBusy:
        return self._busy_with(str(living[-1]), works=bool(living[-1].worker))

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
        asked = time.monotonic()  # what comes while the answer is on its way may not be in it
        found = self._files.bucket.get(f"{STAGING}/{holder.token}/{OWNER}")
        if found is None:  # it has ended
            return False
        content, now = bytes(found.data), time.monotonic()
        sign = self._seen.setdefault(holder.token, _Sign(content, now))
        if sign.content != content:
            sign = self._seen[holder.token] = _Sign(content, now, changed=True)
        if asked - sign.since >= SILENT_SECONDS:
            return False
        return True if sign.changed else None

    @contextmanager
    def _asking(self, worker: str) -> Iterator[Holder]:
        """Show life while the lock is asked for, and from then on; leave nothing on an error."""
        me = self._begin(worker)
        try:
            yield me
        except BaseException:  # Ctrl-C too
            self._files.alone = False
            try:
                with suppress(StoreIOError):  # what stopped us is what is told
                    self._leave(me)
            finally:
                self._end()
            raise

    def _begin(self, worker: str) -> Holder:
        """Show a sign of life from now on; name this process."""
        process = Process.this()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        who = f"host {socket.gethostname()}, pid {os.getpid()}, since {since}"
        self._seen: dict[str, _Sign] = {}
        self._ends, self._looking = threading.Event(), threading.Lock()
        self._files.make_own()
        _ours.add(self._files.own)
        self._shown, self._signs = _now(), itertools.count(1)
        self._thread = threading.Thread(target=self._show_life, name="lock", daemon=True)
        self._thread.start()
        self._files.bucket.guard = self._check_held
        return Holder(self._files.own, process, who, worker)

    def _end(self) -> None:
        """Show no sign of life any more."""
        _ours.discard(self._files.own)
        if self._thread is not None:
            self._ends.set()
            self._thread.join()
            self._thread = None
        self._files.bucket.guard = lambda _: None
        self._files.group = ""

    def _show_life(self) -> None:
        while not self._ends.wait(SILENT_SECONDS / BEATS):
            try:
                before = self._shown
                if _now() - before >= SILENT_SECONDS:
                    with self._looking:
                        self._look_again()
                    continue
                began = self._show_once()
                # One that may have come too late does not say that nobody has given this writer up.
                if _now() - before < SILENT_SECONDS:
                    self._shown = max(self._shown, began)
            except StoreBusy:  # told at the next change
                continue
            except StoreIOError as error:
                _log.warning("no sign of life of this writer for others: %s", error)

    def _show_once(self) -> float:
        """Show a sign of life; return when it began."""
        began = _now()
        self._files.show_life(next(self._signs))
        return began

    def _check_held(self, keys: Sequence[str]) -> None:
        """Refuse to change anything after a silence in which others have taken the lock.

        Raises:
            StoreBusy: another has.
        """
        own = f"{STAGING}/{self._files.own}/"
        if all(key == LOCK or key.startswith(own) for key in keys):  # harm nobody at any time
            return
        if _now() - self._shown >= _LOOKS_AFTER * SILENT_SECONDS:
            with self._looking:
                if _now() - self._shown >= _LOOKS_AFTER * SILENT_SECONDS:
                    self._look_again()

    def _look_again(self) -> None:
        """Hold on to the lock by a change of its record, unless another has taken it."""
        began = self._show_once()  # before the record: who reads that sees this
        while True:
            record = self._read()
            if not any(each.token == self._files.own for each in record.holders):
                silent = _now() - self._shown
                raise StoreBusy(
                    f"this process showed no sign of life for {silent:.0f} s, and another writes "
                    f"{self._what} now. Run again: what is finished is reused"
                )
            if self._write(record, record.holders, group=record.group):
                self._shown = began
                return


def _now() -> float:
    """Return seconds on a clock that nobody sets, and that goes on while the machine sleeps."""
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return time.clock_gettime(clock)
