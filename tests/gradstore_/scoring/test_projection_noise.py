"""The error of a projected cosine stays within what theory says: (1 - rho^2) / sqrt(d)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project

from gradstore.format.codec import decode, encode
from gradstore.scoring.scan import unit_rows

P, SEEDS = 20_000, 6


def gradient_like(n: int, seed: int) -> torch.Tensor:
    """(n, P) rows with common directions and coordinates of very different size."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(6, P, generator=torch.Generator().manual_seed(99))
    mixed = torch.randn(n, 6, generator=random) @ common + torch.randn(n, P, generator=random)
    return mixed * torch.rand(P, generator=torch.Generator().manual_seed(98)) ** 3


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return unit_rows(left)[0] @ unit_rows(right)[0].T


def stored(features: np.ndarray) -> np.ndarray:
    """As a store gives them back."""
    usable = np.ones(len(features), dtype=bool)
    return decode(*encode(features, usable, "float16"), "float16")


@pytest.mark.parametrize(("method", "d"), [("sjlt", 1024), ("sjlt", 4096), ("rademacher", 1024)])
def test_cosines_after_projection_err_by_no_more_than_theory(method: str, d: int) -> None:
    train, target = gradient_like(48, 1), gradient_like(24, 2)
    exact = cosines(train.numpy(), target.numpy())
    assert np.abs(exact).max() > 0.7  # so that 1 - rho^2 matters
    errors: dict[str, list[np.ndarray]] = {"float32": [], "float16": []}
    for seed in range(SEEDS):
        spec = ProjectionSpec(method, p=P, d=d, seed=seed)  # type: ignore[arg-type]
        left, right = (project(x, spec).numpy() for x in (train, target))
        for name, found in (
            ("float32", cosines(left, right)),
            ("float16", cosines(stored(left), stored(right))),
        ):
            errors[name].append((found - exact) * np.sqrt(d) / (1 - exact**2))
    for name, parts in errors.items():
        ratio = float(np.sqrt(np.square(parts).mean()))
        assert 0.8 <= ratio <= 1.1, (name, ratio)
        assert abs(float(np.mean(parts))) <= 0.2  # unbiased
