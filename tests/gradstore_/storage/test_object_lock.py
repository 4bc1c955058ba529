"""The lock of a store in a bucket: judged by signs of life that are seen, never by a clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gradstore.errors import StoreBusy, StoreIOError
from gradstore.storage import object_lock
from gradstore.storage.location import location
from gradstore.storage.lock import LOCK
from gradstore.storage.object_lock import ObjectLock
from gradstore.storage.objects import ObjectFiles
from gradstore.storage.processes import Process

SILENT = 0.8

#: The lock rests on a server's conditions: so with the server of either kind, where it is there.
BOTH = pytest.mark.parametrize("bucket", ["object_server", "seaweedfs"], indirect=True)


@pytest.fixture
def lock_at(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ObjectLock]]:
    """Locks of one store, each as of a process on a machine of its own."""
    monkeypatch.setattr(object_lock, "SILENT_SECONDS", SILENT)
    machine = threading.local()
    monkeypatch.setattr(
        Process, "this", classmethod(lambda cls: cls(getattr(machine, "name", "?"), 1, "1"))
    )
    monkeypatch.setattr(Process, "lives", lambda _: None)
    made: list[ObjectLock] = []

    def make(name: str) -> ObjectLock:
        machine.name = name
        lock = ObjectLock(ObjectFiles(location(bucket)))  # type: ignore[arg-type]
        made.append(lock)
        return lock

    yield make
    for lock in made:
        lock._end()


def die(lock: ObjectLock) -> None:
    """Stop a holder's signs of life, as a machine does that loses its power."""
    lock._ends.set()


def test_fault_18_a_holder_on_another_machine_that_lives_is_told_of_soon(lock_at: Any) -> None:
    lock_at("one").acquire()
    began = time.monotonic()
    with pytest.raises(StoreBusy, match=r"host \S+, pid \d+, since \d{4}-") as told:
        lock_at("two").acquire()
    assert told.value.exit_code == 6
    assert time.monotonic() - began < SILENT, "it waits for one sign of life, not for the time-out"


@pytest.mark.parametrize("years", [-30, 30])
def test_fault_28_a_dead_holder_is_taken_over_after_the_silence_whatever_its_clock_says(
    lock_at: Any, years: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither its clock nor the server's counts."""
    now = object_lock.datetime

    class Skewed(now):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, zone: Any) -> Any:
            return now.now(zone).replace(year=now.now(zone).year + years)

    dead = lock_at("one")
    with monkeypatch.context() as skewed:
        skewed.setattr(object_lock, "datetime", Skewed)
        dead.acquire()
    die(dead)
    began = time.monotonic()
    with lock_at("two"):
        assert SILENT <= time.monotonic() - began < SILENT + 3
    assert "stale lock" in caplog.text


@BOTH
def test_a_holder_that_slept_changes_nothing_once_it_wakes(lock_at: Any) -> None:
    sleeper = lock_at("one")
    sleeper.acquire()
    die(sleeper)
    with lock_at("two") as lock:
        lock._files.publish("plans/b.json", b"b")
        with pytest.raises(StoreBusy, match="no sign of life"):
            sleeper._files.publish("plans/a.json", b"a")
        assert not lock._files.has("plans/a.json")


def test_a_holder_that_slept_goes_on_where_nobody_took_its_place(lock_at: Any) -> None:
    sleeper = lock_at("one")
    sleeper.acquire()
    die(sleeper)
    time.sleep(1.1 * SILENT)
    assert sleeper._files.publish("plans/a.json", b"a")
    began = time.monotonic()
    lock_at("two").acquire()
    assert time.monotonic() - began >= SILENT, "by its look it has shown that it lives"


def test_a_holder_looks_while_what_it_sends_still_has_time_to_arrive(lock_at: Any) -> None:
    lock = lock_at("one")
    lock.acquire()
    die(lock)
    before = lock._read().e_tag
    lock._files.publish("plans/a.json", b"a")
    assert lock._read().e_tag == before
    time.sleep(0.6 * SILENT)
    lock._files.publish("plans/b.json", b"b")
    assert lock._read().e_tag != before


def test_of_a_holder_that_wakes_and_one_that_takes_over_one_has_the_lock(
    lock_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = lock_at("one")
    sleeper.acquire()
    die(sleeper)
    second, told, write = lock_at("two"), list[bool](), ObjectLock._write

    def meanwhile(lock: ObjectLock, *record: Any, **group: Any) -> bool:
        wakes = lock is second and not told
        if wakes:
            told.append(True)
            sleeper._files.publish("plans/a.json", b"a")
        done = write(lock, *record, **group)
        assert not (wakes and done), "it judged by what was there before"
        return done

    monkeypatch.setattr(ObjectLock, "_write", meanwhile)
    with pytest.raises(StoreBusy, match="is being written by host"):
        second.acquire()
    assert told == [True]
    assert sleeper._files.publish("plans/b.json", b"b")


def test_a_sign_of_life_that_may_have_come_too_late_says_nothing(
    lock_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Once(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            was = self.is_set()
            self.set()
            return was

    lock = lock_at("one")
    lock.acquire()
    die(lock)
    lock._thread.join()
    shown = lock._shown
    clock, show = [shown + SILENT / 2], lock._files.show_life
    monkeypatch.setattr(object_lock, "_now", lambda: clock[0])

    def slow(count: int) -> None:
        show(count)
        clock[0] = shown + 1.1 * SILENT

    monkeypatch.setattr(lock._files, "show_life", slow)
    lock._ends = Once()
    lock._show_life()
    assert lock._shown == shown, "others may have given it up before"


def test_a_sign_of_life_that_comes_while_an_answer_is_on_its_way_is_not_missed(
    lock_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = lock_at("one")
    looking, looks = threading.Event(), list[str]()
    show = holder._files.show_life

    def while_it_is_looked_at(count: int) -> None:
        assert count == 0 or looking.wait(10)
        show(count)

    def slow(key: str, *most: int) -> Any:
        found = get(key, *most)
        if key.startswith(f"staging/{holder._files.own}/"):
            looks.append(key)
            if len(looks) == 3:  # by it a holder is passed over; two are made in a round
                looking.set()
                time.sleep(1.5 * SILENT)
        return found

    monkeypatch.setattr(holder._files, "show_life", while_it_is_looked_at)
    holder.acquire()
    second = lock_at("two")
    get = second._files.bucket.get
    monkeypatch.setattr(second._files.bucket, "get", slow)
    with pytest.raises(StoreBusy, match="is being written by host"):
        second.acquire()


@BOTH
def test_fault_19_of_two_that_take_over_at_once_one_has_the_lock(
    lock_at: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = lock_at("one")
    dead.acquire()
    die(dead)
    both, write = threading.Barrier(2), ObjectLock._write

    def both_have_read(lock: ObjectLock, record: Any, holders: Any, **group: Any) -> bool:
        if any(each.token == dead._files.own for each in record.holders):
            both.wait(10)
        return write(lock, record, holders, **group)

    monkeypatch.setattr(ObjectLock, "_write", both_have_read)
    told: list[str] = []
    inside = threading.Semaphore()

    def take(name: str) -> None:
        lock = lock_at(name)
        try:
            with lock:
                assert inside.acquire(blocking=False)
                time.sleep(SILENT)
                inside.release()
            told.append("had it")
        except StoreBusy:
            told.append("busy")

    threads = [threading.Thread(target=take, args=(name,)) for name in ("two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(told) == ["busy", "had it"]
    record = ObjectFiles(location(bucket)).bucket.get(LOCK)  # type: ignore[arg-type]
    assert record is not None
    assert b'"holders":[]' in bytes(record.data)


def test_what_is_no_record_of_ours_is_nobodys_lock(lock_at: Any, bucket: str) -> None:
    objects = ObjectFiles(location(bucket)).bucket  # type: ignore[arg-type]
    objects.put(LOCK, b"\xff{")
    with lock_at("one") as lock:
        record = objects.get(LOCK)
        assert record is not None
        assert lock._files.own.encode() in bytes(record.data), "who has it now"


def test_a_worker_that_dies_while_it_sets_up_keeps_nobody_waiting(lock_at: Any) -> None:
    """Its sign of life was seen to change before: that says nothing of later."""
    first = lock_at("one")
    me = first._begin("1/2")
    assert first._write(first._read(), [me])
    second, told = lock_at("two"), list[str]()

    def join() -> None:
        second.join("2/2", lambda: told.append("set up"), lambda: False, lambda: None)
        told.append("joined")

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    time.sleep(SILENT / 2)
    assert told == []
    die(first)
    thread.join(10 * SILENT)
    assert told == ["set up", "joined"]
    second.release()


def test_a_refusal_is_told_where_the_lock_cannot_be_left(
    lock_at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(lock: ObjectLock, me: Any) -> None:
        raise StoreIOError("no server")

    lock_at("one").acquire()
    second = lock_at("two")
    monkeypatch.setattr(ObjectLock, "_leave", away)
    with pytest.raises(StoreBusy):
        second.acquire()
    assert second._thread is None, "it shows no life any more"
