"""Passes that run out of memory go on in smaller batches, and give what smaller batches give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec
from torch import nn

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import trainable_slots
from gradstore.export.combined import (
    WeightedRow,
    WeightedSums,
    combined_directions,
    compute_combined_unit,
)
from gradstore.export.direct import direct_products, target_directions
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.kronecker_fit import fit_factors
from gradstore.export.room import Room
from gradstore.export.row_products import planned_products
from gradstore.export.share import OptimizerStep, expected_share
from gradstore.export.smaller import computed_batches, computed_whole
from gradstore.export.units import Batches, PlannedRows
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange

SGD = FeatureSpec("sgd")
#: Padded tokens that the stand-in for a small device has room for: two or three rows.
ROOM = 50


@contextmanager
def small(model: Any, room: int = ROOM) -> Iterator[list[int]]:
    """Let memory run out in the middle of the backward of a larger batch; its sizes, as they come.

    The upper of the model's two layers has given its gradients by then.
    """
    sizes: list[int] = []

    def fail(_gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def watch(_layer: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            sizes.append(hidden.shape[0] * hidden.shape[1])
            if sizes[-1] > room:
                hidden.register_hook(fail)

    layer = model.base_model.model.model.layers[0]
    handle = layer.register_forward_hook(watch)
    try:
        yield sizes
    finally:
        handle.remove()


@pytest.fixture
def model(llama: Any) -> Any:
    return llama.model()


@pytest.fixture
def rows(llama: Any) -> list[dict[str, list[int]]]:
    return llama.rows(14)  # type: ignore[no-any-return]


@pytest.fixture
def cut(llama: Any, rows: Any) -> Callable[..., PlannedRows]:
    """Put the rows into batches of a budget."""

    def make(budget: int = 4096, chosen: Any = None, **options: Any) -> PlannedRows:
        lengths = [len(row["input_ids"]) for row in rows]
        batches = Batches(rows, llama.collate, lengths, budget, **options)
        return PlannedRows(batches, batches.cut(np.arange(len(rows)) if chosen is None else chosen))

    return make


def flags(model: Any) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def test_direct_products_lose_and_double_no_row(model: Any, cut: Any, llama: Any) -> None:
    target = target_directions(model, [llama.batches(llama.rows(3, seed=6), 1)], SGD)
    expected = direct_products(model, cut(20), 14, target, SGD)
    before, status, told = flags(model), np.full(14, 9, np.uint8), list[int]()
    planned = cut()
    planned = PlannedRows(planned.batches, planned.planned, told.append)
    with small(model) as sizes:
        found = direct_products(model, planned, 14, target, SGD, None, status)
    assert max(sizes) > ROOM
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert status.tolist() == [RowStatus.OK] * 14
    assert sum(told) == 14
    assert flags(model) == before


@pytest.mark.parametrize("unit", [True, False])
def test_target_directions_are_means_over_each_row_once(model: Any, cut: Any, unit: bool) -> None:
    expected = target_directions(model, [cut(20)], SGD, each_row=True, unit=unit)
    with small(model):
        found = target_directions(model, [cut()], SGD, each_row=True, unit=unit)
    assert found.rows == expected.rows == (14,)
    for one, other in ((found.matrix, expected.matrix), (found.each, expected.each)):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_expected_norm_of_a_step_counts_each_row_once(model: Any, cut: Any) -> None:
    step = OptimizerStep(4, 1.0)
    expected = expected_share(model, cut(20), step)
    with small(model):
        found = expected_share(model, cut().batches.sample(0), step)
    assert found.tokens == expected.tokens
    assert found.norm == pytest.approx(expected.norm, rel=1e-5)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_factors_are_fitted_on_each_row_once(
    model: Any, cut: Any, rows: Any, llama: Any, kind: Any
) -> None:
    gradients = llama.gradients(model, rows[:4]).float()
    expected = fit_factors(model, cut(20), kind)
    with small(model):
        found = fit_factors(model, cut(), kind)
    for slot in trainable_slots(model):
        block = gradients[:, slot.start : slot.start + slot.numel]
        one, other = (factors.root_(slot, block.clone()) for factors in (found, expected))
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-4 * float(other.abs().max()))


def test_products_of_candidates_are_in_the_order_of_their_rows(model: Any, cut: Any) -> None:
    direction = torch.randn(sum(s.numel for s in trainable_slots(model)),
                            generator=torch.Generator().manual_seed(1))  # fmt: skip
    results = []
    for planned in (cut(20), cut()):
        with GradientCapture(model) as capture, small(model):
            where, products = planned_products(capture, planned, direction)
        order = np.argsort(where)
        assert where[order].tolist() == list(range(14))
        results.append((products.dots[order], products.gram[order][:, order],
                        products.target_tokens[order]))  # fmt: skip
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def weighted(rows: Any) -> list[WeightedRow]:
    """Three rows, of six, no and eight sequences."""
    parts = (rows[:6], [], rows[6:])
    return [
        WeightedRow(at, part, [0.5 - i for i in range(len(part))],
                    [len(row["input_ids"]) for row in part],
                    sum(label != -100 for row in part for label in row["labels"][1:]))
        for at, part in enumerate(parts)
    ]  # fmt: skip


def test_weighted_sums_hold_each_sequence_once(model: Any, rows: Any, llama: Any) -> None:
    p = sum(slot.numel for slot in trainable_slots(model))
    recipe = Recipe(SGD, ProjectionSpec("sjlt", p=p, d=64, seed=3))
    room, made = Room(), []
    for budget in (20, 4096):
        sums = WeightedSums(weighted(rows), llama.collate, budget, room)
        with small(model):
            made.append(compute_combined_unit(model, sums, recipe, UnitRange(0, 0, 3)))
    expected, found = made
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-4)
    np.testing.assert_allclose(found.features, expected.features, rtol=1e-3, atol=1e-4)
    assert room.tokens is not None
    with small(model) as sizes:
        directions = combined_directions(model, [weighted(rows)], llama.collate, SGD, room=room)
    assert max(sizes) <= ROOM, "the size that was found is kept"
    assert directions.rows == (2,)


def test_what_was_found_is_kept_for_the_batches_that_follow(
    model: Any, cut: Any, caplog: pytest.LogCaptureFixture
) -> None:
    room = Room()
    with small(model) as sizes:
        target_directions(model, [cut(room=room), cut(room=room)], SGD)
    first = sum(size > ROOM for size in sizes)
    assert len([line for line in caplog.messages if "out of memory" in line]) == first > 0
    with small(model) as sizes:
        target_directions(model, [cut(room=room)], SGD)
    assert max(sizes) <= ROOM


def test_a_row_too_large_by_itself_is_an_error_of_every_pass(cut: Any) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def whole(pairs: Any) -> None:
        list(map(full, pairs))

    with pytest.raises(torch.OutOfMemoryError):
        list(computed_batches(cut(), full))
    with pytest.raises(torch.OutOfMemoryError):
        computed_whole(cut(), whole)


def test_batches_that_somebody_else_cut_are_taken_as_they_are(cut: Any) -> None:
    """Nobody knows how to cut them: that memory ran out is told."""
    given = list(cut())
    assert [rows.tolist() for rows in computed_batches(given, lambda rows, _: rows)] == [
        rows.tolist() for rows, _ in given
    ]

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        list(computed_batches(given, full))
    with pytest.raises(torch.OutOfMemoryError):
        computed_whole(given, lambda pairs: [full(pair) for pair in pairs])
