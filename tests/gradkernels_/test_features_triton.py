"""Features that the Triton kernels make as they read gradients, interpreted on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gradkernels import Feature, ProjectionSpec
from gradkernels.features import VECTORS
from gradkernels.reference import matrix_rows

if TYPE_CHECKING:
    from interpreted import Interpreter

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

P, START = 2**31 - 1, 12_345
methods = pytest.mark.parametrize("method", ["rademacher", "sjlt"])
kinds = pytest.mark.parametrize("kind", list(VECTORS))


def spec_of(method: str, d: int = 33) -> ProjectionSpec:
    return ProjectionSpec(method, p=P, d=d, seed=11, s=2)  # type: ignore[arg-type]


def rows_of(b: int, m: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (0.3 * torch.randn(b, m, generator=torch.Generator().manual_seed(b))).to(dtype)


def feature_of(kind: Any, m: int, outer: float = 0.0) -> Feature:
    """A feature as an optimizer's moments of many sizes give it."""
    generator = torch.Generator().manual_seed(m)
    size = 10.0 ** (4 * torch.rand(m, generator=generator) - 4)
    a, v = size * torch.randn(2, m, generator=generator)
    base = v.square() + 1e-6
    still = base.sqrt()
    made = {"a": a, "base": base, "still": still, "pull": 0.1 * a / (still + outer)}
    return Feature(kind, **{name: made[name] for name in VECTORS[kind]}, curve=0.1, outer=outer)


def exact(feature: Feature, g: torch.Tensor) -> np.ndarray:
    """The formulas of `gradkernels.features` in float64, of the same float32 vectors."""
    g = g.double()
    if feature.kind == "sign":
        return g.sign().numpy()
    assert feature.base is not None
    root = (feature.base.double() + feature.curve * g.square()).sqrt()
    if feature.kind == "adam":
        assert feature.a is not None
        return ((feature.a.double() + g) / (root + feature.outer)).numpy()
    assert feature.still is not None
    assert feature.pull is not None
    both = root + feature.still.double()
    return (g * (both - feature.pull.double() * g) / ((root + feature.outer) * both)).numpy()


def error(out: torch.Tensor, expected: np.ndarray) -> float:
    """Largest relative error of a row, in the Euclidean norm."""
    miss = np.linalg.norm(out.double().numpy() - expected, axis=1)
    return float((miss / np.linalg.norm(expected, axis=1)).max())


@methods
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("b", "m", "outer"), [(3, 67, 0.0), (17, 65, 1e-7)])
def test_error_is_at_most_twice_that_of_features_and_product_in_float32(
    triton: Interpreter, method: str, kind: str, dtype: torch.dtype, b: int, m: int, outer: float
) -> None:
    """Rows and their squared norms; `naive` is plain torch, first the features, then a product."""
    spec, x, feature = spec_of(method), rows_of(b, m, dtype), feature_of(kind, m, outer)
    matrix = matrix_rows(spec, np.arange(START, START + m))
    true = exact(feature, x)
    plain = feature.apply_(x.to(torch.float32, copy=True))
    naive = max(error(plain @ torch.from_numpy(matrix).float(), true @ matrix), 2.0**-24)
    sums, squares = triton.features(spec, x, START, feature)
    assert error(sums, true @ matrix) <= 2 * naive
    lengths = (true**2).sum(axis=1)
    np.testing.assert_allclose(squares.numpy(), lengths, rtol=1e-6)


@methods
def test_gradients_without_a_feature_have_their_own_norms(triton: Interpreter, method: str) -> None:
    """Also where their squares would leave float32's range."""
    x = rows_of(4, 131) * torch.tensor([1.0, 1e30, 1e-35, 0.0])[:, None]
    _, squares = triton.features(spec_of(method), x, START, None)
    np.testing.assert_allclose(squares.numpy(), (x.double().numpy() ** 2).sum(1), rtol=1e-6)


@methods
@pytest.mark.parametrize("kind", ["adam_marginal", None])
def test_factors_come_before_the_feature(triton: Interpreter, method: str, kind: str) -> None:
    """A factor of a power of two is exact: the same bits as gradients of that size."""
    feature = None if kind is None else feature_of(kind, 70)
    x, factors = rows_of(3, 70), torch.tensor([0.5, 1.0, 0.0])
    found = triton.features(spec_of(method), x, START, feature, factors)
    expected = triton.features(spec_of(method), x * factors[:, None], START, feature)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    low = triton.features(spec_of(method), x.half(), START, feature, factors / 3)
    wide = triton.features(spec_of(method), x.half().float(), START, feature, factors / 3)
    assert torch.equal(low[0], wide[0])


@methods
@kinds
def test_other_rows_change_no_bit_of_a_row(triton: Interpreter, method: str, kind: str) -> None:
    """Neither their number, which chooses other kernels, nor what they hold."""
    x, feature = rows_of(17, 70), feature_of(kind, 70)
    sums, squares = triton.features(spec_of(method), x, START, feature)
    alone = triton.features(spec_of(method), x[2:3], START, feature)
    assert torch.equal(alone[0], sums[2:3])
    assert torch.equal(alone[1], squares[2:3])
    x[5], x[6, 3], x[7] = 0, torch.nan, torch.inf
    odd, odd_squares = triton.features(spec_of(method), x, START, feature)
    rest = [row for row in range(17) if row not in (5, 6, 7)]
    assert torch.equal(odd[rest], sums[rest])
    assert torch.equal(odd_squares[rest], squares[rest])
    assert not odd[6:8].isfinite().any()
    assert not odd_squares[6:8].isfinite().any()
    if kind != "adam":  # whose feature of no gradient is the momentum's
        assert not odd[5].any()
        assert odd_squares[5] == 0


@methods
@pytest.mark.parametrize("kind", ["adam", "adam_marginal", "sign"])
def test_the_test_at_first_use_compares_features(
    triton: Interpreter, method: str, kind: str
) -> None:
    assert triton.difference(method, 16, kind) is None
    if kind != "sign":
        why = triton.difference(method, 16, kind, fault="outer")
        assert why is not None
        assert "sums of torch.float32 differ from torch's" in why
