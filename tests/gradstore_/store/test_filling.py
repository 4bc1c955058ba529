"""Units of one generation computed by several ranks and written by one: the same bytes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradkernels import ProjectionSpec

from gradstore.errors import BadInput
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batches, UnitFeatures
from gradstore.format.layout import RowStatus, generation_path
from gradstore.format.plans import UnitRange
from gradstore.store.filling import UnitSink, fill
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

N, DIM = 44, 32
Rows = list[dict[str, list[int]]]


@pytest.fixture(scope="module")
def rows(llama: Any) -> Rows:
    """Row 3 is masked, rows 9, 20 and 41 have an infinite embedding."""
    found: Rows = [dict(row) for row in llama.rows(N)]
    found[3]["labels"] = [-100] * len(found[3]["labels"])
    for i in (9, 20, 41):
        found[i]["input_ids"] = [llama.broken_token, *found[i]["input_ids"][1:]]
    return found


class Job:
    """What every rank knows; no store among it."""

    def __init__(self, llama: Any, rows: Rows) -> None:
        self.model = llama.model(broken=True)
        p = sum(x.numel() for x in self.model.parameters() if x.requires_grad)
        self.projection = ProjectionSpec("sjlt", p=p, d=DIM, seed=7)
        self.lengths = [len(row["input_ids"]) for row in rows]
        self.batches = Batches(rows, llama.collate, self.lengths, token_budget=100, longest=23)
        self.recipe = Recipe(FeatureSpec("sgd"), self.projection)

    def compute(self, unit: UnitRange) -> UnitFeatures:
        return compute_unit(self.model, self.batches, self.recipe, unit)

    def begin(self, kit: Any, writer: Any) -> GenerationWriter:
        made = kit.record(projection=self.projection.to_dict(), feature="sgd", optimizer_hash=None)
        generation: GenerationWriter = writer.begin(made, kit.rows(N), dim=DIM, unit_rows=8)
        return generation


def shared(
    kit: Any, job: Job, path: Path, world: int, *, allowed: float = 1.0, rounds: int = 99
) -> UnitSink:
    """As `world` processes would: plans and units only travel as pickles."""
    with kit.writer(path) as writer:
        generation = job.begin(kit, writer)
        pending: list[UnitRange] = pickle.loads(pickle.dumps(list(generation.pending)))
        sink = UnitSink(generation, max_bad_fraction=allowed)
        for first in range(0, len(pending), world)[:rounds]:
            sent = [pickle.dumps(job.compute(unit)) for unit in pending[first : first + world]]
            for data in sent:
                sink.write(pickle.loads(data))
        if not generation.pending:
            generation.commit()
    return sink


def alone(kit: Any, job: Job, path: Path) -> Any:
    with kit.writer(path) as writer:
        generation = job.begin(kit, writer)
        summary = fill(generation, job.compute, max_bad_fraction=1.0)
        generation.commit()
    return summary


def files(path: Path) -> dict[str, bytes]:
    base = path / generation_path("train/1")
    return {str(f.relative_to(base)): f.read_bytes() for f in base.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def job(llama: Any, rows: Rows) -> Job:
    return Job(llama, rows)


@pytest.mark.parametrize("world", [2, 4])
def test_shared_units_are_the_bytes_of_a_single_process(
    kit: Any, job: Job, tmp_path: Path, world: int
) -> None:
    summary = alone(kit, job, tmp_path / "one")
    sink = shared(kit, job, tmp_path / "many", world)
    assert files(tmp_path / "many") == files(tmp_path / "one")
    assert sink.summary.rows == summary.rows == N
    assert sink.summary.tokens == summary.tokens
    assert sink.summary.status_counts == summary.status_counts
    assert summary.status_counts["non_finite"] == 3
    assert verify_store(tmp_path / "many").ok


def test_another_number_of_ranks_goes_on_where_the_first_stopped(
    kit: Any, job: Job, tmp_path: Path
) -> None:
    alone(kit, job, tmp_path / "one")
    assert shared(kit, job, tmp_path / "many", 3, rounds=1).summary.rows == 24
    assert open_store(tmp_path / "many").generations() == []
    assert shared(kit, job, tmp_path / "many", 2).summary.rows == N - 24
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_bad_rows_of_all_ranks_and_of_earlier_tries_count_together(
    kit: Any, job: Job, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"2 of 44 rows .* the first: \[9, 20\]"):
        shared(kit, job, tmp_path / "s", 2, allowed=0.03)
    with pytest.raises(BadInput, match=r"2 of 44 rows .* the first: \[20\]"):
        shared(kit, job, tmp_path / "s", 2, allowed=0.03)
    assert open_store(tmp_path / "s").generations() == []
    shared(kit, job, tmp_path / "s", 2, allowed=0.07)
    usable = open_store(tmp_path / "s").generation("train/1").usable
    assert not usable[[3, 9, 20, 41]].any()


def test_a_computed_unit_is_plain_arrays_of_its_rows(job: Job) -> None:
    found = job.compute(UnitRange(1, 8, 16))
    assert {type(getattr(found, name)) for name in ("features", "norm", "status", "tokens")} == {
        np.ndarray
    }
    assert found.features.shape == (8, DIM)
    assert found.status[1] == RowStatus.NON_FINITE
    lengths = np.array(job.lengths[8:16])
    assert found.model_tokens == lengths[lengths <= 23].sum()
    np.testing.assert_array_equal(found.status == RowStatus.TOO_LONG, lengths > 23)


def test_a_unit_that_is_not_pending_is_refused(kit: Any, job: Job, tmp_path: Path) -> None:
    with kit.writer(tmp_path / "s") as writer:
        sink = UnitSink(job.begin(kit, writer), max_bad_fraction=1.0)
        done = job.compute(UnitRange(0, 0, 8))
        sink.write(done)
        with pytest.raises(BadInput, match="is not pending"):
            sink.write(done)
