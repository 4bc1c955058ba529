"""Scores by ranges equal those of one pass, bit for bit; Ray itself is stood in for."""

from __future__ import annotations

import contextlib
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.cluster.options import RayOptions
from gradstore.errors import BadInput, StoreError
from gradstore.format.layout import RowStatus
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.scoring import engines
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.engines import RayScan, ranges_of
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.products import InnerProduct
from gradstore.store.reader import open_store
from gradstore.store.writer import StoreWriter

N, D, SETS = 2500, 24, {"a": 9, "b": 4}
CHUNK = 256


def write(path: Path, seed: int) -> Path:
    """Write two checkpoints of N train rows and two target sets; some rows are not usable."""
    rng = np.random.default_rng(seed)
    with StoreWriter(path, provenance={"test": 1}) as writer:
        for step, (name, rows) in itertools.product((10, 20), {"": N, **SETS}.items()):
            role = "target" if name else "train"
            record = GenerationRecord(
                name=f"{role}/{name + '/' if name else ''}{step}", role=role, set=name, step=step,
                run_id="test", adapter_hash=f"adapter{step}", effective_seed=step,
                projection={"method": "sjlt", "d": D, "seed": step}, feature="sgd",
                learning_rate=None if name else step / 1e6,
            )  # fmt: skip
            hashes = np.zeros((rows, 16), dtype=np.uint8)
            hashes[:, :8] = np.arange(rows, dtype="<u8").view(np.uint8).reshape(rows, 8)
            generation = writer.begin(record, RowSet(hashes), dim=D)
            for unit in list(generation.pending):
                k = unit.stop - unit.start
                values = rng.standard_normal((k, D)) * 10.0 ** rng.integers(-9, 9, (k, 1))
                status = np.where(rng.random(k) < 0.05, RowStatus.MASKED, RowStatus.OK)
                status[0] = RowStatus.OK
                norms = np.linalg.norm(values, axis=1).astype(np.float32)
                generation.write_unit(unit.index, values.astype(np.float32), norms,
                                      status.astype(np.uint8), np.ones(k, np.int32))  # fmt: skip
            generation.commit()
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scored") / "gradstore", 1)


class Died(Exception):
    """In the place of Ray's words for a process that is gone."""


class NotLoaded(Exception):
    """In the place of Ray's word for whatever a task raises."""


class InProcess:
    """Ray, as far as a scan needs it: tasks run when they are waited for, the last one first.

    What goes to a task and what comes back is pickled, as on the way between processes. What may
    wait for the head has to be called by `ask`.
    """

    def __init__(self) -> None:
        self.exceptions = type("Exceptions", (), dict.fromkeys(
            ("WorkerCrashedError", "NodeDiedError", "OutOfMemoryError", "ObjectLostError"), Died,
        ) | {"RayTaskError": NotLoaded})  # fmt: skip
        self.waiting: dict[int, Any] = {}
        self.largest = self.sent = 0
        self.names: list[str] = []
        self.asked = False

    def remote(self, function: Any) -> Any:
        ray = self

        class Remote:
            def options(self, *, name: str) -> Any:
                ray.names.append(name)
                return self

            def remote(self, *arguments: Any) -> int:
                assert ray.asked
                ray.sent += 1
                ray.waiting[ray.sent] = (function, arguments)
                ray.largest = max(ray.largest, len(ray.waiting))
                return ray.sent

        return Remote()

    def ask(self, call: Any) -> Any:
        self.asked = True
        try:
            return call()
        finally:
            self.asked = False

    def put(self, value: Any) -> bytes:
        return pickle.dumps(value)

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return [max(refs)], sorted(refs)[:-1]

    def get(self, ref: int) -> Any:
        assert self.asked
        function, (shared, *numbers) = self.waiting.pop(ref)
        return pickle.loads(pickle.dumps(function(pickle.loads(shared), *numbers)))


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> InProcess:
    ray = InProcess()

    @contextlib.contextmanager
    def cluster(options: RayOptions, _: Any) -> Iterator[Any]:
        assert options.gpus_per_actor == 0
        members = {"ray": ray, "actors": 3, "check": lambda self: None,
                   "ask": lambda self, call: ray.ask(call),
                   "actor_options": lambda self: {}}  # fmt: skip
        yield type("Cluster", (), members)()

    monkeypatch.setattr(engines, "connected", cluster)
    engines._opened.cache_clear()
    return ray


@pytest.mark.parametrize("preconditioner", ["none", "fisher", "subspace"])
@pytest.mark.parametrize("normalize", ["cosine", "target", "none"])
def test_every_score_is_the_bits_of_one_pass(
    path: Path, ray: InProcess, normalize: Any, preconditioner: Any
) -> None:
    product = InnerProduct(normalize, preconditioner)
    parts = checkpoint_features(open_store(path), "all")
    for aggregation in ("max", "mean"):
        asked: dict[str, Any] = {"product": product, "aggregation": aggregation,
                                 "chunk_rows": CHUNK}  # fmt: skip
        here = influence_scores(parts, **asked)
        counted: list[int] = []
        there = influence_scores(
            parts, **asked, engine=RayScan(path, RayOptions()), on_rows=counted.append
        )
        np.testing.assert_array_equal(here.values, there.values)
        np.testing.assert_array_equal(here.usable, there.usable)
        np.testing.assert_array_equal(here.best_subtask, there.best_subtask)
        assert here.skipped == there.skipped
        assert sum(counted) == N
    assert ray.sent > 6  # several tasks for each process
    assert ray.largest == 3  # no more at once than there are processes
    assert {"scores of rows 0 to 256", "scores of rows 2304 to 2500"} <= set(ray.names)


def test_ranges_cut_all_rows_in_whole_chunks() -> None:
    for rows, actors in itertools.product((1, 255, 256, 257, 10_000, 3_000_000), (1, 3, 100)):
        ranges = ranges_of(rows, actors, CHUNK)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == rows
        assert [stop for _, stop in ranges[:-1]] == [start for start, _ in ranges[1:]]
        assert all(start % CHUNK == 0 for start, _ in ranges)
        assert max(stop - start for start, stop in ranges) <= engines.TASK_ROWS


def test_another_store_at_the_same_path_is_refused(
    path: Path, tmp_path: Path, ray: InProcess
) -> None:
    """On a node whose file system is not ours; the failure comes back with its exit code."""
    parts = checkpoint_features(open_store(path), "last")
    other = write(tmp_path / "gradstore", 2)
    with pytest.raises(StoreError, match="all nodes must see the same store") as caught:
        influence_scores(parts, engine=RayScan(other, RayOptions()))
    assert caught.value.exit_code == 2
    with pytest.raises(StoreError, match="a file system that all its nodes see"):
        influence_scores(parts, engine=RayScan(tmp_path / "none", RayOptions()))


def test_a_node_without_this_dataflex_is_told_as_a_build_tells_it(
    path: Path, ray: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There Ray can't load what it is sent, and raises that with a traceback."""

    def get(_: int) -> Any:
        raise NotLoaded(
            "ray::scores of rows 0 to 256 (pid=7)\nRuntimeError: The remote function failed to "
            "import on the worker:\n\nModuleNotFoundError: No module named 'gradstore'\n"
        )

    monkeypatch.setattr(ray, "get", get)
    parts = checkpoint_features(open_store(path), "last")
    with pytest.raises(BadInput) as caught:
        influence_scores(parts, engine=RayScan(path, RayOptions()))
    assert str(caught.value) == (
        "a process that scores rows could not start: ModuleNotFoundError: No module named "
        "'gradstore'. All nodes need the version of Python and of DataFlex that this process has."
    )


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (TypeError("a bug"), 1, r"(?s)Traceback.*in sums_of_range.*TypeError: a bug \(on "),
        (MemoryError("4 GiB"), 5, r"^MemoryError: 4 GiB \(on "),
        (OSError(5, "Input/output error"), 5, r"^OSError: .*Input/output error \(on "),
    ],
)
def test_what_a_task_meets_is_told_with_its_exit_code_and_host(
    path: Path, ray: InProcess, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int,
    says: str,
) -> None:  # fmt: skip
    def fail(*_: object) -> Any:
        raise error

    parts = checkpoint_features(open_store(path), "last")
    monkeypatch.setattr(engines.RowSums, "chunk", fail)
    with pytest.raises(StoreError, match=says) as caught:
        influence_scores(parts, engine=RayScan(path, RayOptions()))
    assert caught.value.exit_code == code


def test_ranges_that_end_every_process_are_told(
    path: Path, ray: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(_: int) -> Any:
        raise Died

    monkeypatch.setattr(ray, "get", get)
    parts = checkpoint_features(open_store(path), "last")
    with pytest.raises(StoreError, match="died again and again") as caught:
        influence_scores(parts, engine=RayScan(path, RayOptions()))
    assert caught.value.exit_code == 5


def test_what_the_pass_cannot_do_is_refused_before_a_cluster_is_asked(path: Path) -> None:
    parts = checkpoint_features(open_store(path), "last")
    engine = RayScan(path, RayOptions())
    arrays = [CheckpointFeatures(np.eye(3), np.ones((1, 3)))]
    with pytest.raises(BadInput, match="arrays are scored without one"):
        influence_scores(arrays, engine=engine)
    with pytest.raises(BadInput, match="device is meta"):
        influence_scores(parts, engine=engine, device="meta")
