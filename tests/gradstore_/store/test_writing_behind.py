"""Units are written while others are computed: the same bytes, and no failure without a word."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput, StoreIOError
from gradstore.export.units import UnitFeatures
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange
from gradstore.storage import local
from gradstore.storage.leases import Worker
from gradstore.storage.local import StoreFiles
from gradstore.store import filling
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.writer import StoreWriter

N, UNIT_ROWS = 40, 4
UNITS = N // UNIT_ROWS
#: Seconds that a test waits for another thread before it says that nothing comes.
PATIENCE = 20.0

#: Of the rows some are not finite, which is not what is tested here.
UnitSink = partial(filling.UnitSink, max_bad_fraction=1.0)
fill = partial(filling.fill, max_bad_fraction=1.0)


def computed(kit: Any, unit: UnitRange) -> UnitFeatures:
    k = unit.stop - unit.start
    features = kit.features(N, 3)[unit.start : unit.stop]
    ok = np.full(k, RowStatus.OK, np.uint8)
    return UnitFeatures(unit, features, np.ones(k, np.float32), ok, np.ones(k, np.int32), 1)


def begin(kit: Any, writer: Any) -> GenerationWriter:
    begun: GenerationWriter = writer.begin(
        kit.record("train/1"), kit.rows(N), dim=4, unit_rows=UNIT_ROWS
    )
    return begun


def intercepted(
    generation: GenerationWriter, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]
) -> None:
    """Call `before` with the number of each unit before it is written."""
    write = generation.write_unit

    def write_unit(index: int, *values: Any) -> None:
        before(index)
        write(index, *values)

    monkeypatch.setattr(generation, "write_unit", write_unit)


@pytest.fixture
def alone(kit: Any, fast_path: Path) -> dict[str, object]:
    """Content of a store whose units were written one after the other."""
    with kit.writer(fast_path / "alone") as writer:
        generation = begin(kit, writer)
        sink = UnitSink(generation)
        for unit in list(generation.pending):
            sink.write(computed(kit, unit))
        generation.commit()
    return dict(kit.content(fast_path / "alone"))


@pytest.mark.parametrize("behind", [0, 1, 4])
@pytest.mark.parametrize("worker", [None, Worker(1, 2)])
def test_units_written_behind_are_the_bytes_of_units_written_at_once(
    kit: Any, fast_path: Path, alone: dict[str, object], behind: int, worker: Worker | None
) -> None:
    with StoreWriter(fast_path / "s", provenance=kit.provenance, worker=worker) as writer:
        generation = begin(kit, writer)
        summary = fill(generation, lambda unit: computed(kit, unit), behind=behind)
        generation.commit()
    assert kit.content(fast_path / "s") == alone
    assert summary.rows == N


def test_a_unit_is_written_while_the_next_is_computed(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = [threading.Event() for _ in range(UNITS)]

    def compute(unit: UnitRange) -> UnitFeatures:
        begun[unit.index].set()
        return computed(kit, unit)

    def next_is_begun(index: int) -> None:
        assert index + 1 == UNITS or begun[index + 1].wait(PATIENCE)

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, next_is_begun)
        fill(generation, compute, behind=1)
        generation.commit()


@pytest.mark.parametrize("behind", [1, 3])
def test_no_more_units_are_on_their_way_than_was_said(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    """So a disk that is slower than the model holds the model up, and no memory fills."""
    goes_on, order = threading.Event(), list[int]()
    given, full = list[int](), threading.Event()

    def hold(index: int) -> None:
        assert goes_on.wait(PATIENCE)
        order.append(index)

    def compute(unit: UnitRange) -> UnitFeatures:
        given.append(unit.index)
        if len(given) == behind + 1:
            full.set()
        return computed(kit, unit)

    with kit.writer(fast_path / "s") as writer, ThreadPoolExecutor(1) as elsewhere:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, hold)
        done = elsewhere.submit(fill, generation, compute, behind=behind)
        assert full.wait(PATIENCE)
        time.sleep(0.2)  # it would have gone on
        assert given == list(range(behind + 1))
        goes_on.set()
        done.result(PATIENCE)
        if behind == 1:
            assert order == sorted(order)
        generation.commit()


@pytest.mark.parametrize("behind", [1, 3])
def test_a_unit_that_cannot_be_written_ends_the_pass(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int
) -> None:
    asked, failed = list[int](), threading.Event()

    def full_disk(index: int) -> None:
        if index == 1:
            failed.set()
            raise StoreIOError("the disk is full")
        if index > 1:
            wait_for(failed)

    def compute(unit: UnitRange) -> UnitFeatures:
        asked.append(unit.index)
        return computed(kit, unit)

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, full_disk)
        with pytest.raises(StoreIOError, match="the disk is full"):
            fill(generation, compute, behind=behind)
        assert len(asked) < UNITS
        assert 1 in [unit.index for unit in generation.pending]


def test_a_failure_at_the_end_leaves_no_other_unit_on_its_way(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = threading.Event()

    def full_disk(index: int) -> None:
        if index == 0:
            wait_for(second)
            raise StoreIOError("the disk is full")
        second.set()
        time.sleep(0.3)

    def run(generation: GenerationWriter) -> None:
        with UnitSink(generation, behind=2) as sink:
            for unit in generation.pending[:2]:
                sink.write(computed(kit, unit))

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, full_disk)
        with pytest.raises(StoreIOError, match="the disk is full"):
            run(generation)
        assert [unit.index for unit in generation.pending] == [0, *range(2, UNITS)]


def test_a_failure_is_told_again_and_again(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller that catches it can't take the rest for all."""

    def full_disk(index: int) -> None:
        if index == 0:
            raise StoreIOError("the disk is full")

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, full_disk)
        sink = UnitSink(generation, behind=1)
        sink.write(computed(kit, generation.pending[0]))
        for act in (sink.settle, sink.look, sink.settle):
            with pytest.raises(StoreIOError, match="the disk is full"):
                act()
        with pytest.raises(StoreIOError, match="the disk is full"):
            sink.write(computed(kit, generation.pending[1]))


def test_a_failure_beside_another_is_logged(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(index: int) -> None:
        raise StoreIOError("the disk is full")

    def compute(unit: UnitRange) -> UnitFeatures:
        if unit.index == 1:
            raise KeyboardInterrupt
        return computed(kit, unit)

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, full_disk)
        with pytest.raises(KeyboardInterrupt):
            fill(generation, compute, behind=1)
    assert "a unit that was computed is not written: the disk is full" in caplog.text


@pytest.mark.parametrize("behind", [0, 1, 3])
@pytest.mark.parametrize("late", [False, True])
def test_bad_rows_of_units_on_their_way_count(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, behind: int, late: bool
) -> None:
    """The unit before the last, and the last: there is no later one to notice."""
    goes_on = threading.Event()

    def hold(index: int) -> None:
        if late and behind and index == UNITS - 2:
            wait_for(goes_on)

    def compute(unit: UnitRange) -> UnitFeatures:
        done = computed(kit, unit)
        done.features[:] = 1.0
        if unit.index >= UNITS - 2:
            done.status[0] = RowStatus.NON_FINITE
        return done

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, hold)
        timer = threading.Timer(0.2, goes_on.set)
        timer.start()
        with pytest.raises(BadInput, match=r"2 of 40 rows .* the first: \[32, 36\]"):
            filling.fill(generation, compute, behind=behind, max_bad_fraction=0.04)
        timer.join()


def test_bad_rows_of_units_on_their_way_count_at_once(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()

    def bad(unit: UnitRange) -> UnitFeatures:
        done = computed(kit, unit)
        done.features[:] = 1.0
        done.status[0] = RowStatus.NON_FINITE
        return done

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, lambda _: wait_for(goes_on))
        sink = filling.UnitSink(generation, max_bad_fraction=0.04, behind=2)
        first, second = generation.pending[:2]
        sink.write(bad(first))
        with pytest.raises(BadInput, match="2 of 40 rows"):
            sink.write(bad(second))
        goes_on.set()
        with pytest.raises(BadInput, match="2 of 40 rows"):
            sink.settle()


def test_two_workers_that_both_fail_do_not_wait_for_each_other(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds the lease of a unit that it could not write, and both live."""
    both, told = threading.Barrier(2), list[str]()

    def run(number: int) -> None:
        with contextlib.suppress(StoreIOError):
            build(number)

    def build(number: int) -> None:
        worker = Worker(number, 2, lease_seconds=10 * PATIENCE)
        with StoreWriter(fast_path / "s", provenance=kit.provenance, worker=worker) as writer:
            generation = writer.begin(kit.record("train/1"), kit.rows(8), dim=4, unit_rows=4)
            intercepted(generation, monkeypatch, lambda _: full_disk(number))
            try:
                fill(generation, compute, behind=1)
            except StoreIOError as error:
                told.append(str(error))
                raise

    def compute(unit: UnitRange) -> UnitFeatures:
        both.wait(PATIENCE)  # each has claimed one
        return computed(kit, unit)

    def full_disk(number: int) -> None:
        time.sleep(0.2)  # both wait for each other by then
        raise StoreIOError(f"the disk of {number} is full")

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(told) == ["the disk of 1 is full", "the disk of 2 is full"]


def test_a_second_ctrl_c_leaves_the_store_to_others_and_a_late_thread_without_it(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, alone: dict[str, object]
) -> None:
    begun, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    failures: list[BaseException] = []
    stage = StoreFiles.stage_all

    def held(self: StoreFiles, contents: Any) -> list[str]:
        if threading.current_thread().name != "unit 0":
            return stage(self, contents)
        begun.set()
        wait_for(goes_on)
        try:
            return stage(self, contents)
        except BaseException as error:
            failures.append(error)
            raise
        finally:
            ended.set()

    def again(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def compute(unit: UnitRange) -> UnitFeatures:
        if unit.index == 1:
            wait_for(begun)
            monkeypatch.setattr(filling, "wait", again)
            raise KeyboardInterrupt
        return computed(kit, unit)

    def run() -> None:
        with kit.writer(fast_path / "s") as writer:
            generation = begin(kit, writer)
            monkeypatch.setattr(StoreFiles, "stage_all", held)
            fill(generation, compute, behind=1)

    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.undo()
    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        assert len(generation.pending) == UNITS
        before = {str(path) for path in (fast_path / "s").rglob("*")}
        goes_on.set()
        wait_for(ended)
        assert {str(path) for path in (fast_path / "s").rglob("*")} == before
        assert "was closed before all was written" in str(failures[0])
        fill(generation, lambda unit: computed(kit, unit))
        generation.commit()
    assert kit.content(fast_path / "s") == alone


def test_a_buffer_may_be_used_again_where_nothing_is_written_behind(
    kit: Any, fast_path: Path, alone: dict[str, object]
) -> None:
    buffer = np.empty((UNIT_ROWS, 4), np.float32)

    def compute(unit: UnitRange) -> UnitFeatures:
        done = computed(kit, unit)
        buffer[:] = done.features
        return replace(done, features=buffer)

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        fill(generation, compute)
        generation.commit()
    assert kit.content(fast_path / "s") == alone


def test_the_last_unit_that_cannot_be_written_ends_the_pass(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(index: int) -> None:
        if index == UNITS - 1:
            raise StoreIOError("the disk is full")

    with kit.writer(fast_path / "s") as writer:
        for use in (partial(fill, behind=1), with_sink):
            generation = begin(kit, writer)
            intercepted(generation, monkeypatch, full_disk)
            with pytest.raises(StoreIOError, match="the disk is full"):
                use(generation, lambda unit: computed(kit, unit))


def with_sink(generation: GenerationWriter, compute: Callable[[UnitRange], UnitFeatures]) -> None:
    """Leave it to the end of the context to wait."""
    with UnitSink(generation, behind=1) as sink:
        for unit in generation.claimed():
            sink.write(compute(unit))


def test_a_failure_is_seen_before_the_next_unit_is_done(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()

    def full_disk(index: int) -> None:
        failed.set()
        raise StoreIOError("the disk is full")

    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, full_disk)
        sink = UnitSink(generation, behind=1)
        sink.look()
        sink.write(computed(kit, generation.pending[0]))
        assert failed.wait(PATIENCE)
        with pytest.raises(StoreIOError, match="the disk is full"):
            look_again_and_again(sink)


def look_again_and_again(sink: filling.UnitSink) -> None:
    for _ in range(200):
        sink.look()
        time.sleep(PATIENCE / 200)


def test_ctrl_c_loses_no_unit_that_was_computed(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = threading.Event()

    def compute(unit: UnitRange) -> UnitFeatures:
        if unit.index == 2:
            stopped.set()
            raise KeyboardInterrupt
        return computed(kit, unit)

    def late(index: int) -> None:
        assert index == 0 or stopped.wait(PATIENCE)

    def run() -> None:
        with kit.writer(fast_path / "s") as writer:
            generation = begin(kit, writer)
            intercepted(generation, monkeypatch, late)
            fill(generation, compute, behind=1)

    with pytest.raises(KeyboardInterrupt):
        run()
    with kit.writer(fast_path / "s") as writer:
        assert begin(kit, writer).pending[0].index == 2


def test_several_threads_may_write_units(
    kit: Any, fast_path: Path, alone: dict[str, object]
) -> None:
    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)

        def write(unit: UnitRange) -> None:
            done = computed(kit, unit)
            generation.write_unit(unit.index, done.features, done.norm, done.status, done.tokens)

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(write, list(generation.pending)))
        generation.commit()
    assert kit.content(fast_path / "s") == alone


def test_a_unit_that_another_thread_writes_is_refused(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on = threading.Event(), threading.Event()
    stage = StoreFiles.stage_all

    def held(self: StoreFiles, contents: Any) -> list[str]:
        begun.set()
        assert goes_on.wait(PATIENCE)
        return stage(self, contents)

    with kit.writer(fast_path / "s") as writer, ThreadPoolExecutor(1) as elsewhere:
        generation = begin(kit, writer)
        monkeypatch.setattr(StoreFiles, "stage_all", held)
        sink = UnitSink(generation)
        first = elsewhere.submit(sink.write, computed(kit, generation.pending[0]))
        assert begun.wait(PATIENCE)
        with pytest.raises(BadInput, match="being written by another thread"):
            UnitSink(generation).write(computed(kit, generation.pending[0]))
        goes_on.set()
        first.result(PATIENCE)
        assert [unit.index for unit in generation.pending] == list(range(1, UNITS))


def test_a_worker_is_not_handed_a_unit_again_that_is_being_written(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    with StoreWriter(fast_path / "s", provenance=kit.provenance, worker=Worker(1, 2)) as writer:
        generation = begin(kit, writer)
        intercepted(generation, monkeypatch, lambda _: wait_for(goes_on))
        with UnitSink(generation, behind=UNITS) as sink:
            handed_out = []
            for unit in generation.claimed():
                handed_out.append(unit.index)
                sink.write(computed(kit, unit))
            assert sorted(handed_out) == list(range(UNITS))
            assert len(generation.pending) == UNITS
            goes_on.set()
        assert generation.pending == []
        generation.commit()


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


def test_written_is_called_once_a_unit_survives_a_crash(kit: Any, fast_path: Path) -> None:
    told: list[int] = []
    with kit.writer(fast_path / "s") as writer:
        generation = begin(kit, writer)

        def written(unit: UnitRange) -> None:
            assert unit not in generation.pending
            told.append(unit.index)

        with UnitSink(generation, behind=1, written=written) as sink:
            for unit in generation.claimed():
                sink.write(computed(kit, unit))
    assert told == list(range(UNITS))


def test_threads_share_one_staging_folder_that_is_seen_to_be_in_use(
    fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second lock of the folder, by a thread that was as early, would be none."""
    lock, both = local._flocked, threading.Barrier(2)

    def slow(path: Path) -> int | None:
        found = lock(path)
        time.sleep(0.05)
        return found

    fast_path.joinpath("s").mkdir()
    files = StoreFiles(fast_path / "s")
    monkeypatch.setattr(local, "_flocked", slow)

    def make(_: int) -> str:
        both.wait(PATIENCE)
        return files.make_own()

    with ThreadPoolExecutor(2) as threads:
        assert len(set(threads.map(make, range(2)))) == 1
    monkeypatch.setattr(local, "_flocked", lock)
    assert StoreFiles(fast_path / "s").is_in_use(files.own)
    files.close()
    assert not StoreFiles(fast_path / "s").is_in_use(files.own)
