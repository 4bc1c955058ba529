"""Any order of planning, claiming, writing, crashing, cleaning and damage, against a dict.

Hypothesis draws sequences of steps of up to two processes: one writer that has the store to itself,
or two workers that share it. The model is a dict, generation -> rows, which a commit adds to and a
clean-up takes from; after every step readers must see exactly it.

`STORE_SEED=7 STORE_EXAMPLES=500 pytest FILE` draws other sequences, and more of them.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import seed as from_seed
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gradstore.errors import BadInput, DamagedData
from gradstore.format.names import GenerationName
from gradstore.format.plans import UnitRange
from gradstore.storage.leases import Worker
from gradstore.storage.local import StoreFiles
from gradstore.storage.lock import LOCK
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.reader import open_store
from gradstore.store.repair import repair_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

NAMES = ("train/1", "train/2", "target/a/1")
#: Hashes of the adapter: of another one a generation is an attempt of its own.
STATES = ("aa", "bb")
ROWS, UNIT_ROWS = 5, 2
SILENT = 1e6  # seconds: a worker shows no sign of life while a test runs

#: The writer that has the store to itself, or one of two workers.
WORKERS = st.sampled_from((None, 1, 2, 1, 2))
#: Operations on disk after which a process dies; None lives on.
DIES = st.none() | st.integers(1, 150)

#: What must have come in some sequence, or the test says less than its name.
EVENTS = ("commit", "further attempt", "resume", "wait", "crash within a step", "crash of a start",
          "crash of a commit or clean-up", "damage", "repair", "damage that is not committed",
          "clean-up of committed rows")  # fmt: skip

#: Sequences that are drawn, and from which seed; without one they are the same at every run.
EXAMPLES, SEED = int(os.environ.get("STORE_EXAMPLES", "24")), os.environ.get("STORE_SEED")

Expected = dict[str, np.ndarray]


class Killed(BaseException):
    """Not an Exception: nothing may catch a kill."""


class Waits(Exception):
    """A worker would wait for another."""


def waits() -> NoReturn:
    raise Waits


class Kill:
    """A hook: alive until its operations are used up, then nothing changes the disk any more."""

    def __init__(self, left: int | None) -> None:
        self.left = left

    def __call__(self, operation: str, path: Path) -> None:
        if self.left == 0:
            raise Killed(f"{operation} {path}")
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                if operation in ("write", "fsync"):
                    path.write_bytes(b"torn")
                raise Killed(f"{operation} {path}")


def rows_of(name: str, state: str) -> np.ndarray:
    """(n, d) float32 that follow from name and state; row 1 is NaN, row 3 zero: no use either."""
    draw = np.random.default_rng([NAMES.index(name), STATES.index(state)])
    values = draw.integers(1, 1000, (ROWS, 4)).astype(np.float32)
    values[1, 2] = np.nan
    values[3] = 0
    return values


def as_read(values: np.ndarray) -> np.ndarray:
    usable = np.isfinite(values).all(1) & values.any(1)
    return np.where(usable[:, None], values, np.nan)


def begin(kit: StoreKit, writer: StoreWriter, name: str, state: str) -> GenerationWriter:
    record = kit.record(name, adapter_hash=state)
    return writer.begin(record, kit.rows(ROWS), dim=4, dtype="float32", unit_rows=UNIT_ROWS)


class Process:
    """A process with the store open: its writer, and its generations with what it has claimed."""

    def __init__(
        self, kit: StoreKit, path: Path, worker: int | None, state: str, dies: int | None = None
    ) -> None:
        self.kill, self.worker, self.state = Kill(dies), worker, state
        shares = None if worker is None else Worker(worker, 2, SILENT)
        files = StoreFiles(path, self.kill)
        self.writer = StoreWriter(path, provenance=kit.provenance, worker=shares, files=files)
        self.generations: dict[str, GenerationWriter] = {}
        self.handed: dict[str, Iterator[UnitRange]] = {}
        self.units: dict[str, UnitRange] = {}

    def die(self) -> None:
        """Let go of what the system takes from a dead process: locks, but nothing on disk."""
        self.kill.left = 0
        try:
            self.writer.close()
        except Killed:
            return


class StoreMachine(RuleBasedStateMachine):
    """Processes that come, work and die, and the generations that readers must see."""

    def __init__(self, kit: StoreKit, path: Path, seen: Counter[str]) -> None:
        super().__init__()
        self.kit, self.path, self.seen = kit, path, seen
        self.alive: list[Process] = []
        self.committed: Expected = {}
        self.done: dict[str, set[int]] = {}  # units of each plan, by its full name, that are safe

    # ---- processes -----------------------------------------------------------------------------

    @initialize()
    def create(self) -> None:
        """An empty store, so that there is one for readers to open."""
        self.kit.writer(self.path).close()

    @precondition(lambda self: self.alive)
    @rule(which=st.integers(0, 1), ends=st.booleans())
    def crash(self, which: int, ends: bool) -> None:
        """Or end in peace."""
        process = self.alive[which % len(self.alive)]
        if not ends:
            self._bury(process)
            return
        with self._may_die(process):
            process.writer.close()
            self.alive.remove(process)

    # ---- a generation --------------------------------------------------------------------------

    @rule(worker=WORKERS, state=st.sampled_from(STATES), name=st.sampled_from(NAMES), dies=DIES)
    def plan(self, worker: int | None, state: str, name: str, dies: int | None) -> None:
        if process := self._process(worker, state, dies):
            process.kill.left = dies
            with self._may_die(process):
                self._plan(process, name)

    @rule(worker=WORKERS, state=st.sampled_from(STATES), name=st.sampled_from(NAMES))
    def claim(self, worker: int | None, state: str, name: str) -> None:
        if process := self._process(worker, state):
            with self._may_die(process):
                self._claim(process, name)

    @precondition(lambda self: any(process.units for process in self.alive))
    @rule(dies=DIES)
    def write(self, dies: int | None) -> None:
        """What was claimed, of whoever claimed some."""
        process = next(each for each in self.alive if each.units)
        process.kill.left = dies
        with self._may_die(process):
            self._write(process, min(process.units))

    @precondition(lambda self: any(process.generations for process in self.alive))
    @rule(at=st.integers(0, 9), dies=st.none() | st.integers(1, 12))
    def commit(self, at: int, dies: int | None) -> None:
        begun = [(each, name) for each in self.alive for name in each.generations]
        process, name = begun[at % len(begun)]
        process.kill.left = dies
        self._commit(process, name)

    @rule(worker=WORKERS, state=st.sampled_from(STATES), name=st.sampled_from(NAMES), dies=DIES)
    def build(self, worker: int | None, state: str, name: str, dies: int | None) -> None:
        """All of it: plan or resume, then each unit that is to be had, then the commit."""
        process = self._process(worker, state)
        if process is None:
            return
        process.kill.left = dies
        self._build(process, name)

    @precondition(lambda self: any(each.worker and each.units for each in self.alive))
    @rule()
    def build_beside(self) -> None:
        """A second worker does all that the first has not claimed, and no more."""
        first = next(each for each in self.alive if each.units)
        name, held = min(first.units.items())
        assert first.worker is not None
        process = self._process(3 - first.worker, first.state)
        if process is None:
            return
        with self._may_die(process):
            while self._claim(process, name):
                self._write(process, name)
            assert held in process.generations[name].pending

    def _build(self, process: Process, name: str) -> None:
        with self._may_die(process):
            while self._claim(process, name):
                self._write(process, name)
        if process in self.alive:
            self._commit(process, name)

    def _plan(self, process: Process, name: str) -> None:
        """Begin a generation, or resume it: what was finished is not to be done again."""
        generation = begin(self.kit, process.writer, name, process.state)
        pending = {unit.index for unit in generation.pending}
        done = self.done.setdefault(generation.name, set())
        assert not pending & done, f"{generation.name} would be done again"
        self.seen["resume"] += bool(done and pending)
        self.seen["further attempt"] += GenerationName.parse(generation.name).attempt > 1
        process.generations[name] = generation
        process.handed.pop(name, None)
        process.units.pop(name, None)

    def _claim(self, process: Process, name: str) -> bool:
        """Take the next unit of a generation, if there is one that nobody alive has."""
        if name in process.units:
            return True
        if name not in process.generations:
            self._plan(process, name)
        generation = process.generations[name]
        handed = process.handed.setdefault(name, generation.claimed(idle=waits))
        try:
            unit = next(handed)
        except (StopIteration, Waits) as ended:
            self.seen["wait"] += isinstance(ended, Waits)
            del process.handed[name]
            return False
        assert unit.index not in self.done[generation.name]
        for other in self.alive:
            assert other is process or other.units.get(name) != unit, f"{unit} is claimed twice"
        process.units[name] = unit
        return True

    def _write(self, process: Process, name: str) -> None:
        unit, generation = process.units.pop(name), process.generations[name]
        k = unit.stop - unit.start
        values = rows_of(name, process.state)[unit.start : unit.stop]
        ones, status = np.ones(k, np.float32), np.zeros(k, np.uint8)
        generation.write_unit(unit.index, values, ones, status, np.arange(k))
        self.done[generation.name].add(unit.index)

    def _commit(self, process: Process, name: str) -> None:
        generation = process.generations[name]
        if generation.pending:
            with pytest.raises(BadInput, match="pending"):
                generation.commit()
            return
        after = {**self.committed, name: as_read(rows_of(name, process.state))}
        with self._may_die(process, after):
            generation.commit()
            self.committed = after
            self.seen["commit"] += 1

    # ---- readers, care, damage -----------------------------------------------------------------

    @invariant()
    def readers_see_exactly_what_was_committed(self) -> None:
        if self.path.exists():
            self._check_seen(self.committed)

    @rule(at=st.lists(st.integers(0, ROWS - 1), max_size=3))
    def read(self, at: list[int]) -> None:
        assert verify_store(self.path).faults == ()
        store = open_store(self.path)
        for name, rows in self.committed.items():
            found = store.generation(name)
            found.check_values()
            np.testing.assert_array_equal(found.take(at), rows[at])

    @rule(keep=st.sampled_from((None, 1)), dies=DIES)
    def clean(self, keep: int | None, dies: int | None) -> None:
        """By a writer that has the store to itself; workers end first.

        Where the newest step is to be kept there are two, or the writer makes them.
        """
        for process in [each for each in self.alive if each.worker]:
            with self._may_die(process):
                process.writer.close()
                self.alive.remove(process)
        process = self._process(None, STATES[0], dies)
        if process is None:
            return
        process.kill.left = None
        for name in NAMES[:2] if keep else ():
            if name not in self.committed:
                self._build(process, name)
        process.kill.left = dies
        after = dict(self.committed)
        if keep == 1 and {"train/1", "train/2"} <= after.keys():
            del after["train/1"]
        with self._may_die(process, after):
            process.writer.clean(keep)
            for held in (process.generations, process.handed, process.units):
                held.clear()  # some of them are gone
            self.seen["clean-up of committed rows"] += len(after) < len(self.committed)
            self.committed = after

    @precondition(lambda self: self.committed)
    @rule(seed=st.integers(0, 9999))
    def corrupt(self, seed: int) -> None:
        """Flip a bit of a committed file: told by whoever reads it, whole when it is put back."""
        file, data = self._damaged(seed)
        self.seen["damage"] += 1
        file.write_bytes(data)

    @precondition(lambda self: self.committed and not self.alive)
    @rule(seed=st.integers(0, 9999))
    def corrupt_and_repair(self, seed: int) -> None:
        """What a repair says is whole has the committed bytes; the rest it leaves and names."""
        file, data = self._damaged(seed)
        left = repair_store(self.path).left
        assert (file.read_bytes() == data) == (not left)
        self.seen["repair"] += not left
        file.write_bytes(data)

    @precondition(lambda self: not self.alive and any(self.done.values()))
    @rule(seed=st.integers(0, 9999))
    def corrupt_what_is_not_committed(self, seed: int) -> None:
        """A unit that was finished and is damaged is done again, whoever comes next."""
        draw = random.Random(seed)
        planned = [name for name in open_store(self.path).planned() if self.done.get(name)]
        if not planned:
            return
        name = draw.choice(planned)
        unit = draw.choice(sorted(self.done[name]))
        chunk = self.path / f"generations/{name}/features/c/{unit}/0"
        damaged = bytearray(chunk.read_bytes())
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        chunk.write_bytes(damaged)
        self.done[name].discard(unit)
        self.seen["damage that is not committed"] += 1

    def teardown(self) -> None:
        """Whatever is left undone, one process finishes, and cleans up."""
        for process in list(self.alive):
            self._bury(process)
        if not self.path.exists():
            return
        with self.kit.writer(self.path) as writer:
            for name in NAMES[:2]:
                generation = begin(self.kit, writer, name, "aa")
                self.kit.fill(generation, rows_of(name, "aa"))
                generation.commit()
                self.committed[name] = as_read(rows_of(name, "aa"))
            writer.clean(keep_generations=1)
            del self.committed[NAMES[0]]
        self._check_seen(self.committed)
        assert verify_store(self.path).ok
        assert not [p for p in (self.path / "staging").rglob("*") if p.is_file()]

    # ---- helpers -------------------------------------------------------------------------------

    def _process(self, worker: int | None, state: str, dies: int | None = None) -> Process | None:
        """Find or start a process; only workers are beside others, and all of one state.

        Returns:
            This worker, or the one writer; None where it died as it started.
        """
        if self.alive:
            state = self.alive[0].state
            worker = self.alive[0].worker and (worker or self.alive[0].worker)
        for process in self.alive:
            if process.worker == worker:
                return process
        try:
            self.alive.append(Process(self.kit, self.path, worker, state, dies))
        except Killed:
            self.seen["crash of a start"] += 1
            return None
        self.seen["worker" if worker else "writer"] += 1
        return self.alive[-1]

    def _bury(self, process: Process) -> None:
        process.die()
        self.alive.remove(process)
        self.seen["crash"] += 1

    @contextmanager
    def _may_die(self, process: Process, after: Expected | None = None) -> Iterator[None]:
        """Take a step that the process may not survive: then it was not taken, or whole."""
        try:
            yield
        except Killed:
            self._bury(process)
            self.seen["crash within a step"] += 1
            if after is None:
                return
            found = {g.commit.generation for g in open_store(self.path).generations()}
            self.seen["crash of a commit or clean-up"] += 1
            names = {str(GenerationName.parse(name).base()) for name in found}
            self.committed = self._whichever(names, after)

    def _whichever(self, names: set[str], after: Expected) -> Expected:
        """What is to be seen after a step that may or may not have happened."""
        for expected in (after, self.committed):
            try:
                self._check_seen(expected)
            except AssertionError:
                continue
            return expected
        raise AssertionError(f"{sorted(names)} are neither as before the step nor as after it")

    def _check_seen(self, expected: Expected) -> None:
        store = open_store(self.path)
        seen = store.generations()
        found = {str(GenerationName.parse(each.name).base()): each for each in seen}
        assert len(found) == len(seen), "a generation is there twice"
        assert found.keys() == expected.keys()
        for name, rows in expected.items():
            found[name].check_values()
            assert found[name].norm.shape == found[name].tokens.shape == (ROWS,)
            np.testing.assert_array_equal(found[name].read(0, ROWS), rows)

    def _damaged(self, seed: int) -> tuple[Path, bytes]:
        """Flip a bit of a committed file and see it reported; return the file and its bytes."""
        draw = random.Random(seed)
        file = draw.choice(self._committed_files())
        data = file.read_bytes()
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DamagedData):
            self._check_seen(self.committed)
        assert str(file.relative_to(self.path)) in {f.file for f in verify_store(self.path).faults}
        return file, data

    def _committed_files(self) -> list[Path]:
        """What a reader of the generations that count reads: no plans to come, no old attempts."""
        store = open_store(self.path)
        files = [self.path / "zarr.json", self.path / "spaces/gradient/provenance.json"]
        files += [path for path in (self.path / "commits").iterdir()]
        for generation in store.generations():
            files.append(self.path / f"plans/{generation.name}.json")
            files += (self.path / "generations" / generation.name).rglob("*")
        return sorted(path for path in files if path.is_file() and path.name != LOCK)


def test_whatever_processes_do_in_whatever_order_readers_see_what_was_committed(
    kit: StoreKit, fast_path: Path
) -> None:
    seen: Counter[str] = Counter()
    numbers = itertools.count()

    def make() -> StoreMachine:
        return StoreMachine(kit, fast_path / str(next(numbers)), seen)

    run_state_machine_as_test(
        make if SEED is None else from_seed(int(SEED))(make),  # type: ignore[arg-type]
        settings=settings(max_examples=EXAMPLES, stateful_step_count=50, deadline=None,
                          derandomize=SEED is None, database=None,
                          suppress_health_check=list(HealthCheck)),
    )  # fmt: skip
    never = [event for event in EVENTS if not seen[event]]
    assert not never, f"{never} never came, of {dict(seen)}"
