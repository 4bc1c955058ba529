"""Weighted sums of gradients: what plain autograd says, in any batch, projected or whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project_reference

from gradstore.errors import BadInput
from gradstore.export.combined import (
    WeightedRow,
    WeightedSums,
    combined_directions,
    compute_combined_unit,
)
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange

SGD = FeatureSpec("sgd")


def weighted(llama: Any, weights: list[list[float]], first: int = 0) -> list[WeightedRow]:
    """One row per list of weights, each of other sequences."""
    sequences = llama.rows(sum(map(len, weights)), seed=11)
    rows, at = [], 0
    for number, mine in enumerate(weights, start=first):
        held = sequences[at : at + len(mine)]
        at += len(mine)
        targets = sum(label != -100 for s in held for label in s["labels"][1:])
        lengths = [len(s["input_ids"]) for s in held]
        rows.append(WeightedRow(number, held, mine, lengths, targets))
    return rows


def expected(llama: Any, model: Any, row: WeightedRow) -> torch.Tensor:
    """(p,) float64: sum of weight * gradient of the summed token loss."""
    counts = [sum(label != -100 for label in s["labels"][1:]) for s in row.sequences]
    scale = torch.tensor(row.weights, dtype=torch.float64) * torch.tensor(counts)
    return scale @ llama.gradients(model, row.sequences)


@pytest.mark.parametrize("budget", [1, 60, 4096])
@pytest.mark.parametrize("kind", ["sgd", "sign"])
def test_a_unit_holds_the_projected_sums_whatever_the_batches(
    llama: Any, budget: int, kind: Any
) -> None:
    model = llama.model()
    rows = weighted(llama, [[0.5, -1.0, 0.25], [2.0], [-0.3, 0.3]], first=4)
    p = sum(q.numel() for q in model.parameters() if q.requires_grad)
    spec = ProjectionSpec("sjlt", p=p, d=64, seed=3)
    done = compute_combined_unit(
        model,
        WeightedSums(rows[::-1], llama.collate, budget),
        Recipe(FeatureSpec(kind), spec),
        UnitRange(1, 4, 7),
    )
    sums = torch.stack([expected(llama, model, row) for row in rows]).float()
    if kind == "sign":
        sums = sums.sign()
    assert done.norm == pytest.approx(sums.norm(dim=1).numpy(), rel=2e-3)
    reference = np.asarray(project_reference(sums.numpy(), spec))
    cosine = (reference * done.features).sum(1) / np.linalg.norm(reference, axis=1)
    cosine /= np.linalg.norm(done.features, axis=1)
    assert cosine == pytest.approx(np.ones(3), abs=1e-5 if kind == "sgd" else 2e-3)
    assert done.status.tolist() == [RowStatus.OK] * 3
    assert done.tokens.tolist() == [row.tokens for row in rows]
    assert np.isnan(done.loss).all()  # of several sequences there is none
    assert all(q.requires_grad == ("lora_" in name) for name, q in model.named_parameters())


def test_rows_without_a_signal_without_sequences_or_with_infinities_stay_apart(llama: Any) -> None:
    model = llama.model(broken=True)
    good, broken = weighted(llama, [[1.0], [1.0]])
    ids = [llama.broken_token, *broken.sequences[0]["input_ids"][1:]]
    broken = WeightedRow(1, [{**broken.sequences[0], "input_ids": ids}], [1.0], [len(ids)], 3)
    silent = WeightedRow(2, [], [], [], tokens=5)
    masked = WeightedRow(3, [], [], [], tokens=0)
    p = sum(q.numel() for q in model.parameters() if q.requires_grad)
    done = compute_combined_unit(
        model,
        WeightedSums([good, broken, silent, masked], llama.collate),
        Recipe(SGD, ProjectionSpec("sjlt", p=p, d=32, seed=0)),
        UnitRange(0, 0, 5),
    )
    assert done.status.tolist() == [
        RowStatus.OK, RowStatus.NON_FINITE, RowStatus.ZERO_NORM, RowStatus.MASKED,
        RowStatus.TOO_LONG,
    ]  # fmt: skip
    assert np.isfinite(done.features[0]).all()


def test_directions_are_means_of_unit_sums(llama: Any) -> None:
    model = llama.model()
    rows = weighted(llama, [[1.0, -0.5], [0.2], [0.7, 0.7]])
    silent = WeightedRow(3, [], [], [], tokens=2)
    found = combined_directions(model, [[*rows[:2], silent], rows[2:]], llama.collate, SGD)
    units = [expected(llama, model, row) for row in rows]
    units = [u / u.norm() for u in units]
    assert found.rows == (2, 1)
    assert torch.allclose(found.matrix[0].double(), (units[0] + units[1]) / 2, atol=1e-6)
    assert torch.allclose(found.matrix[1].double(), units[2], atol=1e-6)
    assert found.each is None
    kept = combined_directions(
        model, [[silent, *rows[:2]], rows[2:]], llama.collate, SGD, each_row=True
    )
    assert kept.each is not None
    assert torch.allclose(kept.each.double(), torch.stack(units), atol=1e-6)
    assert torch.equal(kept.all, torch.cat([found.matrix, kept.each]))
    sums = combined_directions(model, [[*rows[:2], silent]], llama.collate, SGD, unit=False)
    whole = [expected(llama, model, row) for row in rows[:2]]
    assert torch.allclose(sums.matrix[0].double(), (whole[0] + whole[1]) / 2, rtol=1e-4, atol=1e-6)
    with pytest.raises(BadInput, match="sub-task 0 of the target has no usable row"):
        combined_directions(model, [[silent]], llama.collate, SGD)
