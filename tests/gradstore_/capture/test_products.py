"""Products of rows' gradients against explicit gradients, one row at a time."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.products import row_products


def close(found: torch.Tensor, expected: np.ndarray) -> None:
    """To 1e-6 of the largest product."""
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found.numpy() / scale, expected / scale, atol=1e-6)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [1, 4, 4, 3]])
def test_products_are_those_of_explicit_gradients_however_rows_are_batched(
    llama: Any, sizes: list[int]
) -> None:
    model, rows = llama.model().double(), llama.rows(12)
    expected = llama.gradients(model, rows).numpy()
    direction = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(1))
    ends = np.cumsum([0, *sizes])
    batches = [llama.collate(rows[i:j]) for i, j in pairwise(ends)]
    with GradientCapture(model) as capture:
        found = row_products(capture, batches, direction)
    assert found.dots.dtype == found.gram.dtype == torch.float64
    close(found.dots, expected @ direction.double().numpy())
    close(found.gram, expected @ expected.T)
    assert found.target_tokens.tolist() == [
        sum(label != -100 for label in row["labels"][1:]) for row in rows
    ]


@pytest.mark.parametrize("sizes", [[12], [5, 7]])
def test_a_scale_multiplies_every_gradient_first(llama: Any, sizes: list[int]) -> None:
    model, rows = llama.model().double(), llama.rows(12)
    generator = torch.Generator().manual_seed(1)
    expected = llama.gradients(model, rows).numpy()
    direction, scale = torch.rand(2, expected.shape[1], generator=generator)
    ends = np.cumsum([0, *sizes])
    batches = [llama.collate(rows[i:j]) for i, j in pairwise(ends)]
    with GradientCapture(model) as capture:
        found = row_products(capture, batches, direction, scale)
    scaled = expected * scale.double().numpy()
    close(found.dots, scaled @ direction.double().numpy())
    close(found.gram, scaled @ scaled.T)


def test_a_row_that_is_not_finite_leaves_the_others_alone(llama: Any) -> None:
    model, rows = llama.model(broken=True), llama.rows(4)
    rows[1]["input_ids"][1] = llama.broken_token
    with GradientCapture(model) as capture:
        direction = torch.ones(capture.p)
        found = row_products(capture, [llama.collate(rows[:2]), llama.collate(rows[2:])], direction)
        sound = [0, 2, 3]
        alone = row_products(capture, [llama.collate([rows[i] for i in sound])], direction)
    assert not torch.isfinite(found.dots[1])
    assert not torch.isfinite(found.gram[1, 1])
    close(found.dots[sound], alone.dots.numpy())
    close(found.gram[sound][:, sound], alone.gram.numpy())


def test_a_row_without_a_target_has_products_of_zero(llama: Any) -> None:
    model, rows = llama.model(), llama.rows(3)
    rows[0]["labels"] = [-100] * len(rows[0]["labels"])
    with GradientCapture(model) as capture:
        found = row_products(capture, [llama.collate(rows)], torch.ones(capture.p))
    assert found.dots[0] == 0
    assert not found.gram[0].any()
    assert found.target_tokens[0] == 0
