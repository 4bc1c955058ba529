"""Several workers fill a store: the bytes of one process, whoever dies, sleeps or comes late."""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput, ProvenanceMismatch, StoreBusy
from gradstore.export.units import UnitFeatures
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange
from gradstore.format.text_table import Text, part_bytes, part_path
from gradstore.storage import leases as lease_module
from gradstore.storage.leases import LEASES, Leases, Worker
from gradstore.storage.local import StoreFiles
from gradstore.store.cleaning import plan_clean_up
from gradstore.store.filling import UnitSink, fill
from gradstore.store.generation_writer import GenerationWriter, raise_schema
from gradstore.store.held import held_store
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.worker_group import group_mark
from gradstore.store.writer import StoreWriter

N, UNIT_ROWS = 40, 4
NAMES = ("target/skill/1", "train/1", "train/2")
STRESS = Path(__file__).parents[2] / "stress.py"
SILENT = 1e6  # seconds: shows no sign of life while a test runs


class Job:
    """What every worker knows: rows, and features that follow from them."""

    def __init__(self, kit: Any, names: Sequence[str] = NAMES, n: int = N) -> None:
        self.kit, self.names, self.n = kit, names, n
        self.computed: list[tuple[str, int]] = []

    def unit(self, name: str, unit: UnitRange, norm: float = 1.0) -> UnitFeatures:
        """The norm stands for who computed it: on a GPU two computations differ in their bits."""
        self.computed.append((name, unit.index))
        k = unit.stop - unit.start
        seed = self.names.index(name) if name in self.names else 9
        features = self.kit.features(self.n, seed)[unit.start : unit.stop] * np.float32(norm)
        ok = np.full(k, RowStatus.OK, np.uint8)
        return UnitFeatures(
            unit, features, np.full(k, norm, np.float32), ok, np.arange(k, dtype=np.int32), 1
        )

    def begin(self, writer: StoreWriter, name: str, **changes: Any) -> GenerationWriter:
        record = self.kit.record(name, **changes)
        return writer.begin(record, self.kit.rows(self.n), dim=4, unit_rows=UNIT_ROWS)

    def run(self, path: Path, worker: Worker | None, pause: float = 0.0, norm: float = 1.0) -> None:
        """Build every generation, with the text of its rows, as one worker or alone."""
        with StoreWriter(path, provenance=self.kit.provenance, worker=worker) as writer:
            for name in self.names:
                generation = self.begin(writer, name)
                writer.keep_texts(self.kit.rows(self.n), self.texts())
                for unit in generation.claimed():
                    time.sleep(pause)
                    done = self.unit(name, unit, norm)
                    generation.write_unit(
                        unit.index, done.features, done.norm, done.status, done.tokens
                    )
                generation.commit()

    def texts(self) -> Iterator[Text]:
        return (Text(f"prompt {i}", f"answer {i}", 3) for i in range(self.n))


@pytest.fixture
def job(kit: Any) -> Job:
    return Job(kit)


def together(works: Sequence[Callable[[], object]]) -> None:
    """Run each in a thread of its own; raise what any of them raised."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if failed:
        raise failed[0]


@pytest.fixture
def alone(kit: Any, fast_path: Path) -> dict[str, object]:
    """The store of a single process."""
    Job(kit).run(fast_path / "alone", None)
    return dict(kit.content(fast_path / "alone"))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_workers_write_the_bytes_of_one_process(
    job: Job, fast_path: Path, alone: dict[str, object], count: int
) -> None:
    path = fast_path / "s"
    together([lambda i=i: job.run(path, Worker(i + 1, count), 0.001) for i in range(count)])  # type: ignore[misc]
    assert job.kit.content(path) == alone
    assert verify_store(path).ok
    assert len(job.computed) == len(NAMES) * N / UNIT_ROWS  # each once
    assert not (path / LEASES).exists()
    assert (path / "writer.lock").read_bytes() == b""


def test_what_is_committed_costs_a_worker_nothing(job: Job, fast_path: Path) -> None:
    job.run(fast_path / "s", None)
    before = job.kit.content(fast_path / "s")
    job.computed.clear()
    job.run(fast_path / "s", Worker(2, 3))
    assert job.computed == []
    assert job.kit.content(fast_path / "s") == before


# ---- death, sleep ----------------------------------------------------------------------------


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that does this; return its id."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return child


@pytest.mark.parametrize("elsewhere", [False, True])
def test_fault_24_a_worker_killed_in_a_unit_is_replaced(
    job: Job, fast_path: Path, alone: dict[str, object], elsewhere: bool
) -> None:
    """At once on the same machine; after the lease, and not before it, on another."""
    path, lease = fast_path / "s", 0.6 if elsewhere else 600.0
    ready, tell = os.pipe()

    def dies() -> None:
        if elsewhere:
            lease_module.boot_id = lambda: "another"
        job.unit = lambda *_: (os.write(tell, b"x"), time.sleep(60))  # type: ignore[method-assign, assignment, return-value]
        job.run(path, Worker(1, 3, lease))

    # A third one that lives: else the second would be the first of a new group, and wait for none.
    with StoreWriter(path, provenance=job.kit.provenance, worker=Worker(3, 3, lease)):
        child = in_child(dies)
        os.read(ready, 1)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        began = time.monotonic()
        job.run(path, Worker(2, 3, lease))
    assert job.kit.content(path) == alone
    assert (time.monotonic() - began >= lease) == elsewhere
    for end in (ready, tell):
        os.close(end)


class Interrupted:
    """A hook that at the k-th change of a name lets another worker do all there is to do.

    Before the first of them, and while bytes are written to staging, nothing is to be seen.
    """

    def __init__(self, k: int, meanwhile: Callable[[], None]) -> None:
        self.left, self.meanwhile = k, meanwhile

    def __call__(self, operation: str, path: Path) -> None:
        if operation in ("link", "unlink"):
            self.left -= 1
            if self.left == -1:
                self.meanwhile()


def test_a_publish_that_sleeps_at_any_operation_tears_and_doubles_nothing(
    kit: Any, fast_path: Path
) -> None:
    """A worker sleeps within a publish; another, whose bits differ, takes over and ends all."""
    k, slept, n = 0, True, 2 * UNIT_ROWS
    while slept:
        path, job = fast_path / f"s{k}", Job(kit, ["train/1"], n)
        awake, files = Worker(2, 2, 0.004), StoreFiles(path)
        late = StoreWriter(
            path, provenance=kit.provenance, worker=replace(awake, number=1), files=files
        )
        with late:
            assert late._leases is not None
            late._leases._ends.set()  # no sign of life from here on
            generation = job.begin(late, "train/1")
            unit = next(generation.claimed())
            done = job.unit("train/1", unit, norm=1.0)
            hook = Interrupted(k, lambda: job.run(path, awake, norm=2.0))  # noqa: B023
            files._hook = hook
            generation.write_unit(0, done.features, done.norm, done.status, done.tokens)
            slept, files._hook = hook.left < 0, None
            if not slept:
                job.run(path, awake, norm=2.0)
            assert list(generation.claimed()) == []  # nothing is computed again
            generation.commit()
        assert verify_store(path).ok, k
        store = open_store(path)
        assert [c.kind for c in store.commits] == ["texts", "generation"]
        found = store.generation("train/1")
        assert set(found.norm[UNIT_ROWS:]) == {2.0}
        who = set(found.norm[:UNIT_ROWS])
        assert who in ({1.0}, {2.0}), k
        values = kit.features(n, 0)[:UNIT_ROWS] * np.float32(who.pop())
        error = np.abs(found.read(0, UNIT_ROWS) - values)
        near = error <= np.abs(values).max(1, keepdims=True) / 1024
        assert near[found.usable[:UNIT_ROWS]].all(), k
        k += 1
    assert k > 15


class Killed(BaseException):
    """Not an Exception: nothing may catch a kill."""


def test_a_publish_that_dies_at_any_operation_is_carried_out_by_another(
    kit: Any, fast_path: Path
) -> None:
    """Both have computed a unit, with other bits; one dies within its publish, then one comes."""
    k, died, n = 0, True, 2 * UNIT_ROWS
    decided = set()
    while died:
        path, job = fast_path / f"s{k}", Job(kit, ["train/1"], n)
        files = StoreFiles(path)

        def die(*_: object) -> None:
            raise Killed

        first = StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2, SILENT))
        second = StoreWriter(
            path, provenance=kit.provenance, worker=Worker(2, 2, SILENT), files=files
        )
        with first:
            generation, dying = (job.begin(writer, "train/1") for writer in (first, second))
            unit = next(generation.claimed())
            done = job.unit("train/1", unit, norm=2.0)
            died, files._hook = False, Interrupted(k, die)
            try:
                dying.write_unit(0, done.features, done.norm, done.status, done.tokens)
            except Killed:
                died, files._hook = True, die
            with contextlib.suppress(Killed):
                second.close()
            done = job.unit("train/1", unit, norm=1.0)
            generation.write_unit(0, done.features, done.norm, done.status, done.tokens)
            for unit in generation.claimed():
                done = job.unit("train/1", unit)
                generation.write_unit(1, done.features, done.norm, done.status, done.tokens)
            generation.commit()
        assert verify_store(path).ok, k
        found = open_store(path).generation("train/1")
        assert len(set(found.norm[:UNIT_ROWS])) == 1, k
        decided.add(float(found.norm[0]))
        k += 1
    assert decided == {1.0, 2.0}
    assert k > 15


def test_a_unit_that_its_holder_finished_at_the_last_moment_is_not_computed_again(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, job = fast_path / "s", Job(kit, ["train/1"], UNIT_ROWS)
    first, second = (
        StoreWriter(path, provenance=kit.provenance, worker=Worker(i, 2)) for i in (1, 2)
    )
    with second:
        one, other = (job.begin(writer, "train/1") for writer in (first, second))
        unit = next(one.claimed())
        claim = Leases.claim

        def finish_first(leases: Leases, task: str) -> Any:
            done = job.unit("train/1", unit)
            one.write_unit(0, done.features, done.norm, done.status, done.tokens)
            first.close()
            return claim(leases, task)

        monkeypatch.setattr(Leases, "claim", finish_first)
        assert list(other.claimed()) == []


def test_fault_24_another_number_of_workers_redoes_only_unfinished_units(
    kit: Any, fast_path: Path, alone: dict[str, object]
) -> None:
    path, first, second = fast_path / "s", Job(kit), Job(kit)

    def stops(number: int) -> None:
        with StoreWriter(path, provenance=kit.provenance, worker=Worker(number, 2)) as writer:
            generation = first.begin(writer, NAMES[0])
            writer.keep_texts(kit.rows(N), first.texts())
            for count, unit in enumerate(generation.claimed()):
                if count == 3:
                    return  # in the middle of a unit
                done = first.unit(NAMES[0], unit)
                generation.write_unit(
                    unit.index, done.features, done.norm, done.status, done.tokens
                )

    for number in (1, 2):
        stops(number)
    assert len(first.computed) == 6
    together([lambda i=i: second.run(path, Worker(i, 3), 0.001) for i in (1, 2, 3)])  # type: ignore[misc]
    assert not set(first.computed) & set(second.computed)
    assert len(first.computed) + len(second.computed) == len(NAMES) * N / UNIT_ROWS
    assert kit.content(path) == alone


class Blocked(Exception):
    """Stands for waiting: whoever is simulated looks again when something has happened."""


def test_a_slow_worker_delays_the_end_by_at_most_one_of_its_units(
    kit: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight workers in simulated time: a unit takes seven of them 1 second, the slow one 10."""

    def blocked(*_: object) -> None:
        raise Blocked

    monkeypatch.setattr(Leases, "wait", blocked)
    job, units = Job(kit, ["train/1"]), 60
    costs = [1.0] * 7 + [10.0]
    rows = kit.rows(units)
    with_all = [
        StoreWriter(fast_path / "s", provenance=kit.provenance, worker=Worker(i + 1, 8))
        for i in range(8)
    ]
    begun = [w.begin(kit.record(), rows, dim=4, unit_rows=1) for w in with_all]
    turns = [generation.claimed() for generation in begun]
    events: list[tuple[float, int, UnitRange]] = []
    idle = set(range(8))
    now, shares = 0.0, [0] * 8
    while True:
        for i in sorted(idle):
            try:
                heapq.heappush(events, (now + costs[i], i, next(turns[i])))
                idle.discard(i)
            except Blocked:
                turns[i] = begun[i].claimed()
            except StopIteration:
                idle.discard(i)
        if not events:
            break
        now, i, unit = heapq.heappop(events)
        k = unit.stop - unit.start
        ok = np.full(k, RowStatus.OK, np.uint8)
        begun[i].write_unit(unit.index, kit.features(k), np.ones(k), ok, np.ones(k))
        shares[i] += 1
        idle.add(i)
    for writer, generation in zip(with_all, begun, strict=True):
        generation.commit()
        writer.close()
    assert sum(shares) == units
    assert now <= units / (7 + 1 / 10) + 10
    assert verify_store(fast_path / "s").ok
    assert job.computed == []


def test_random_kills_of_workers_lose_double_and_tear_nothing(cli: Any) -> None:
    """One to four workers, killed and started again at random, beside verifying readers."""
    done = cli(STRESS, "--kills", 12, program="python")
    assert done.code == 0, done.err[-3000:]
    assert "0 rows lost" in done.out


# ---- who may be there --------------------------------------------------------------------------


def test_a_writer_beside_workers_is_refused_and_so_is_a_worker_beside_a_writer(
    kit: Any, fast_path: Path
) -> None:
    path = fast_path / "s"
    with StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2)):
        with StoreWriter(path, provenance=kit.provenance, worker=Worker(2, 2)) as second:
            with pytest.raises(StoreBusy, match=rf"workers of .* worker 2/2, .*pid {os.getpid()}"):
                kit.writer(path)
            with pytest.raises(BadInput, match="a worker among others can't clean up"):
                second.clean()
        with pytest.raises(StoreBusy, match="workers of a shared build"):
            kit.writer(path)
    with (
        kit.writer(path),
        pytest.raises(StoreBusy, match=rf"written by host \S+, pid {os.getpid()}") as e,
    ):
        StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2))
    assert e.value.exit_code == 6
    StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2)).close()


def test_a_group_sets_aside_what_a_killed_writer_left_half_written(
    kit: Any, fast_path: Path, alone: dict[str, object]
) -> None:
    """Also where the first worker that joins meets the end of that writer, and not its death."""
    path, job = fast_path / "s", Job(kit)
    with kit.writer(path) as writer:
        job.begin(writer, NAMES[0])
        files = StoreFiles(path)
        files.make_directory(f"generations/{NAMES[0]}/norm/c")
        files.write(f"generations/{NAMES[0]}/norm/c/2", [b"torn"])
    together([lambda i=i: job.run(path, Worker(i, 2)) for i in (1, 2)])  # type: ignore[misc]
    assert job.kit.content(path) == alone
    assert verify_store(path).ok


def test_workers_of_another_configuration_are_refused_with_every_difference(
    job: Job, kit: Any, fast_path: Path
) -> None:
    path = fast_path / "s"
    with StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2)) as writer:
        job.begin(writer, "train/1")
        other = {**kit.provenance, "cutoff_len": 9, "template": "chat"}
        with pytest.raises(ProvenanceMismatch) as e:
            StoreWriter(path, provenance=other, worker=Worker(2, 2))
        assert [line.split(" ")[0] for line in e.value.differences] == ["cutoff_len", "template"]
        second = StoreWriter(path, provenance=kit.provenance, worker=Worker(2, 2))
        with second:
            with pytest.raises(ProvenanceMismatch, match="give every worker the same") as e:
                job.begin(second, "train/1", adapter_hash="other", autocast="bf16")
            assert [line.split(" ")[1] for line in e.value.differences] == [
                "adapter_hash", "autocast",
            ]  # fmt: skip
            assert e.value.exit_code == 3
            with pytest.raises(ProvenanceMismatch, match="40 of 40 rows differ"):
                second.begin(kit.record(), kit.rows(N, first=7), dim=4, unit_rows=UNIT_ROWS)
        assert [p.name for p in (path / "plans").rglob("*.json")] == ["1.json"]


def test_a_worker_takes_the_lease_of_the_group_that_it_joins_and_says_so(
    kit: Any, fast_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a shorter one it would take over what living workers compute."""
    path = fast_path / "s"
    monkeypatch.setattr(logging.getLogger("gradstore"), "propagate", True)

    def lease_of(number: int, seconds: float) -> float:
        worker = Worker(number, 3, seconds)
        with StoreWriter(path, provenance=kit.provenance, worker=worker) as writer:
            assert writer._leases is not None
            return writer._leases.worker.lease_seconds

    with StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 3, 90.0)):
        assert lease_of(2, 90.0) == 90.0
        assert caplog.messages == []
        assert lease_of(3, 5.0) == 90.0
        (line,) = set(caplog.messages)
        assert "worker 3/3 has a lease of 5 s" in line
        assert f'store "{path}" of 90 s' in line
        mark = path / group_mark(StoreFiles(path))
        mark.write_bytes(b'{"generations":[]}')  # of an earlier release
        assert lease_of(3, 5.0) == 5.0
    assert lease_of(3, 5.0) == 5.0
    assert len(set(caplog.messages)) == 1


def test_a_root_that_another_worker_raised_is_synced_by_who_relies_on_it(
    kit: Any, fast_path: Path
) -> None:
    """That one may have died in between; a plan of the new schema must not outlast its root."""
    path = fast_path / "s"
    kit.build(path)
    synced: list[Path] = []
    files = StoreFiles(path, lambda step, at: synced.append(at) if step == "fsync_dir" else None)
    seen_before = open_store(path)
    raise_schema(StoreFiles(path), seen_before, 2)
    for store in (seen_before, open_store(path)):
        synced.clear()
        raise_schema(files, store, 2)
        assert synced == [path]
    synced.clear()
    raise_schema(files, seen_before, 1)  # of what every release reads
    assert synced == []


def test_workers_of_two_runs_commit_one_after_the_other(kit: Any, fast_path: Path) -> None:
    """The number of a commit is taken by another run at the last moment: the next one is."""
    path, mine, other = fast_path / "s", Job(kit, ["train/1"]), Job(kit, ["b/train/1"])
    taken: list[str] = []

    def meanwhile(operation: str, file: Path) -> None:
        if operation == "link" and file.parent.name == "commits" and not taken:
            taken.append(file.name)
            other.run(path, Worker(2, 2))

    files = StoreFiles(path, meanwhile)
    writer = StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2), files=files)
    with writer:
        kit.fill(generation := mine.begin(writer, "train/1"), kit.features(N))
        commit = generation.commit()
    assert taken == ["1.json"]
    assert commit.number == 3
    store = open_store(path)
    assert [c.generations for c in store.commits] == [(), ("b/train/1",), ("train/1",)]
    assert verify_store(path).ok


def test_a_state_from_before_the_group_is_superseded_as_by_one_process(
    job: Job, kit: Any, fast_path: Path
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:  # planned, and never finished
        job.begin(writer, "train/1", adapter_hash="older")
    first = StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2))
    second = StoreWriter(path, provenance=kit.provenance, worker=Worker(2, 2))
    with first, second:
        names = {job.begin(writer, "train/1").name for writer in (second, first)}
    assert names == {"train/1.2"}


def test_a_text_spelled_by_another_release_is_taken_as_it_is(
    job: Job, kit: Any, fast_path: Path
) -> None:
    path, rows = fast_path / "s", kit.rows(N)
    with StoreWriter(path, provenance=kit.provenance, worker=Worker(1, 2)) as writer:
        import pyarrow as pa
        import pyarrow.parquet as pq

        ours = part_bytes(rows, 0, list(job.texts()), {})
        sink = pa.BufferOutputStream()
        pq.write_table(pq.read_table(pa.BufferReader(ours)), sink, compression="none")
        theirs = sink.getvalue().to_pybytes()
        assert theirs != ours
        StoreFiles(path).publish(part_path(rows.sha256, 0), theirs)  # a worker that then died
        writer.keep_texts(rows, job.texts())
        kit.fill(generation := job.begin(writer, "train/1"), kit.features(N))
        generation.commit()
    assert verify_store(path).ok
    store = open_store(path)
    read = store.texts(store.generation("train/1"))
    assert read is not None
    assert read.read([7])[0].prompt == "prompt 7"
    assert (path / part_path(rows.sha256, 0)).read_bytes() == theirs


def test_bad_rows_of_all_workers_count_together(kit: Any, fast_path: Path) -> None:
    """Rows 3 and 23 are not finite: two of forty."""
    job = Job(kit, ["train/1"])
    writers = [
        StoreWriter(fast_path / "s", provenance=kit.provenance, worker=Worker(i, 2)) for i in (1, 2)
    ]

    def unit(which: UnitRange) -> UnitFeatures:
        done = job.unit("train/1", which)
        done.status[:] = [
            RowStatus.NON_FINITE if row in (3, 23) else RowStatus.OK
            for row in range(which.start, which.stop)
        ]
        return done

    first, second = (job.begin(writer, "train/1") for writer in writers)
    sink = UnitSink(first, max_bad_fraction=0.03)
    for each in first.claimed():  # its own half, which has one bad row: not too many
        sink.write(unit(each))
        if len(sink.summary.status_counts) == 2:
            break
    with pytest.raises(BadInput, match=r"2 of 40 rows"):
        fill(second, unit, max_bad_fraction=0.03)
    for writer in writers:
        writer.close()
    assert open_store(fast_path / "s").generations() == []


def test_clean_up_that_is_tried_beside_workers_leaves_their_leases(
    job: Job, fast_path: Path
) -> None:
    def listed() -> list[str]:
        files = StoreFiles(fast_path / "s")
        found = plan_clean_up(files, open_store(fast_path / "s"), None)
        return [each.path for each in found.removals if each.path.startswith("staging")]

    writer = StoreWriter(fast_path / "s", provenance=job.kit.provenance, worker=Worker(1, 2))
    job.begin(writer, "train/1")
    assert listed() == []
    writer._files.close()  # as a kill leaves it
    assert LEASES in listed()
    writer.close()


def test_care_after_killed_workers_lets_none_join_their_group(job: Job, fast_path: Path) -> None:
    """One that finds the lock held, and free a moment later, takes what is set up for set up."""
    path = fast_path / "s"
    with StoreWriter(path, provenance=job.kit.provenance):
        pass
    (path / "staging" / "leases").mkdir(parents=True)
    (path / group_mark(StoreFiles(path))).write_bytes(b'{"generations":["train/1"]}')
    with held_store(path):
        assert not (path / group_mark(StoreFiles(path))).exists()
