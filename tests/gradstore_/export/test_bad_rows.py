"""Rows without a finite gradient: reported, never spread, and never let through by a second try."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradkernels import ProjectionSpec

from gradstore import open_store
from gradstore.errors import BadInput
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batches
from gradstore.format.layout import RowStatus
from gradstore.store.filling import ExportSummary, fill

N, BAD = 40, tuple(range(2, 40, 3))


@pytest.fixture
def spoilt(llama: Any) -> list[dict[str, list[int]]]:
    """13 of 40 rows begin with the token whose embedding is infinite."""
    rows = [dict(row) for row in llama.rows(N)]
    for i in BAD:
        rows[i]["input_ids"] = [llama.broken_token, *rows[i]["input_ids"][1:]]
    return rows


def export(
    kit: Any, llama: Any, rows: list[dict[str, list[int]]], path: Path, allowed: float
) -> ExportSummary:
    model = llama.model(broken=True)
    p = sum(x.numel() for x in model.parameters() if x.requires_grad)
    projection = ProjectionSpec("sjlt", p=p, d=16, seed=7)
    with kit.writer(path) as writer:
        record = kit.record(projection=projection.to_dict(), feature="sgd", optimizer_hash=None)
        generation = writer.begin(record, kit.rows(N), dim=16, unit_rows=8)
        batches = Batches(rows, llama.collate, [len(row["input_ids"]) for row in rows], 100)
        recipe = Recipe(FeatureSpec("sgd"), projection)
        compute = partial(compute_unit, model, batches, recipe)
        summary = fill(generation, compute, max_bad_fraction=allowed)
        generation.commit()
    return summary


def test_a_bad_row_keeps_its_nan_to_itself(
    kit: Any, llama: Any, spoilt: Any, tmp_path: Path
) -> None:
    summary = export(kit, llama, spoilt, tmp_path / "s", allowed=1.0)
    assert summary.status_counts == {"ok": N - 13, "non_finite": 13}
    generation = open_store(tmp_path / "s").generation("train/1")
    bad = np.isin(np.arange(N), BAD)
    np.testing.assert_array_equal(generation.status == RowStatus.NON_FINITE, bad)
    values = generation.read(0, N)
    assert np.isnan(values[bad]).all()
    assert np.isfinite(values[~bad]).all()
    told: Any = open_store(tmp_path / "s").info()
    assert told["generations"][0]["status"]["non_finite"] == 13


def test_above_the_limit_the_first_ten_are_named_and_nothing_is_committed(
    kit: Any, llama: Any, spoilt: Any, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=r"13 of 40 rows .* more than max_bad_fraction=0\.26 allows; "
                       r"the first: \[2, 5, 8, 11, 14, 17, 20, 23, 26, 29\]\..*lower"):  # fmt: skip
        export(kit, llama, spoilt, tmp_path / "s", allowed=0.26)
    assert open_store(tmp_path / "s").generations() == []


def test_running_again_does_not_slip_past_the_limit(
    kit: Any, llama: Any, spoilt: Any, tmp_path: Path
) -> None:
    """Units finished before the refusal are reused; their bad rows still count."""
    for _ in range(6):
        with pytest.raises(BadInput, match=r"more than max_bad_fraction=0\.2 allows"):
            export(kit, llama, spoilt, tmp_path / "s", allowed=0.2)
    assert export(kit, llama, spoilt, tmp_path / "s", allowed=0.5).rows < N
    assert open_store(tmp_path / "s").generation("train/1").usable.sum() == N - 13
