"""Signs of rotated rows: the rotation, the packing, and what their products estimate."""

from __future__ import annotations

import numpy as np
import pytest
from gradkernels.rotation import ROUNDS, rotate, unrotate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gradstore.format.codec import LARGEST, decode, encode
from gradstore.format.quantise import mean_length, pack, unpack

#: Bits of the rows of `test_signs_of_a_row_do_not_depend_on_its_neighbours`.
PINNED = [[16, 0], [16, 0], [182, 1], [174, 3], [175, 3]]


def matrix(dim: int) -> np.ndarray:
    """R (dim, dim) float64, written from its definition with Sylvester's matrices."""

    def mixed(x: int) -> int:
        x ^= x >> 16
        x = x * 0x21F0AAAD % 2**32
        x ^= x >> 15
        x = x * 0xD35A2D97 % 2**32
        return x ^ (x >> 15)

    sylvester = np.ones((1, 1))
    while 2 * len(sylvester) <= dim:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    size = len(sylvester)
    found = np.eye(dim)
    for number in range(ROUNDS):
        if number == 2 and size < dim:
            found = found[[*range(0, dim, 2), *range(1, dim, 2)]]
        offset = (number + 1) * 0x9E3779B9
        flips = [(-1.0) ** (mixed(mixed((i + offset) % 2**32)) >> 31) for i in range(dim)]
        found = np.diag(flips) @ found
        part = np.eye(dim)
        first = 0 if number % 2 == 0 else dim - size
        part[first : first + size, first : first + size] = sylvester / np.sqrt(size)
        found = part @ found
    return found


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 12, 64, 100])
def test_the_rotation_is_the_one_that_is_documented_and_orthogonal(dim: int) -> None:
    rows = np.random.default_rng(0).standard_normal((40, dim)).astype(np.float32)
    expected = matrix(dim)
    np.testing.assert_allclose(expected @ expected.T, np.eye(dim), atol=1e-12)
    np.testing.assert_allclose(rotate(rows), rows @ expected.T, atol=5e-6)
    np.testing.assert_allclose(unrotate(rows), rows @ expected, atol=5e-6)


def test_signs_of_a_row_do_not_depend_on_its_neighbours() -> None:
    """The bits of a store's rows are pinned: stores are read by later releases."""
    rows = np.arange(-24, 26).reshape(5, 10).astype(np.float32)
    bits, scale = pack(rows)
    for i in range(5):
        alone, same = pack(rows[i : i + 1])
        assert alone[0].tolist() == bits[i].tolist()
        assert same[0] == scale[i]
    assert bits.tolist() == PINNED


@settings(max_examples=100, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.integers(1, 40)),
        elements=st.floats(-LARGEST, LARGEST, width=32),
    )
)  # fmt: skip
def test_any_row_comes_back_in_its_half_space(rows: np.ndarray) -> None:
    """The estimate's product with the row itself is exact: a s.y = |y|^2, since s.y = |y|_1.

    Beyond 1e-30 and 1e30 the scale may be cut, but what comes back is neither zero nor infinite.
    """
    usable = rows.any(axis=1)
    found = decode(*encode(rows, usable, "1bit"), "1bit", rows.shape[1]).astype(np.float64)
    wide = rows.astype(np.float64)
    assert found.shape == rows.shape
    assert np.isnan(found[~usable]).all()
    assert np.isfinite(found[usable]).all()
    products, squares = (found * wide).sum(axis=1)[usable], np.square(wide).sum(axis=1)[usable]
    assert found[usable].any(axis=1).all()
    assert (products[squares > 1e-60] > 0).all()
    middle = (squares > 1e-60) & (squares < 1e60)
    np.testing.assert_allclose(products[middle], squares[middle], rtol=1e-4)


def test_packed_bits_are_the_signs_of_the_rotated_row() -> None:
    rows = np.random.default_rng(1).standard_normal((6, 21)).astype(np.float32)
    bits, scale = pack(rows)
    rotated = rows @ matrix(21).T
    for row, y in zip(bits, rotated, strict=True):
        signs = [(int(row[i // 8]) >> (i % 8)) & 1 for i in range(24)]
        assert signs == [*(int(value >= 0) for value in y), 0, 0, 0]
    np.testing.assert_array_equal(unpack(bits, 21), np.where(rotated >= 0, 1, -1))
    np.testing.assert_allclose(scale, (rotated**2).sum(1) / np.abs(rotated).sum(1), rtol=1e-6)


@pytest.mark.parametrize("dim", [100, 255, 1000, 1023, 1024, 1536, 4000])
def test_rows_of_one_entry_or_of_one_side_are_spread_over_all_coordinates(dim: int) -> None:
    """|y|_1 is that of random rows: whatever it lacks, a row's cosines would lack."""
    one = np.eye(dim)[[0, dim // 3, dim // 2, dim - 2, dim - 1]]
    side = np.random.default_rng(5).standard_normal((5, dim))
    side[:, dim // 2 :] = 0
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    for rows in (one, side, side[:, ::-1]):
        found = np.abs(rotate(rows).astype(np.float64)).sum(axis=1) / mean_length(dim)
        np.testing.assert_allclose(found, 1, atol=1.2 / np.sqrt(dim))


@pytest.mark.parametrize("dim", [63, 64])
@pytest.mark.parametrize("shape", ["one entry", "equal entries", "random"])
def test_products_are_unbiased_over_rotations_with_the_stated_variance(
    dim: int, shape: str
) -> None:
    """Also of rows that are not random: a single entry, all entries equal."""
    draw, rotations, rho = np.random.default_rng(3), 1500, 0.4
    x = {
        "one entry": np.eye(dim)[0],
        "equal entries": np.ones(dim),
        "random": draw.standard_normal(dim),
    }[shape]
    x /= np.linalg.norm(x)
    aside = draw.standard_normal(dim)
    aside -= aside @ x * x
    z = rho * x + np.sqrt(1 - rho**2) * aside / np.linalg.norm(aside)
    cosines, products = np.empty(rotations), np.empty(rotations)
    for seed in range(rotations):
        y, rz = rotate(np.stack([x, z]), seed).astype(np.float64)
        signs = np.where(y >= 0, 1.0, -1.0)
        cosines[seed] = signs @ rz / mean_length(dim)
        products[seed] = signs @ rz * (y @ y) / np.abs(y).sum()
    length = mean_length(dim)
    variance = rho**2 * ((1 + (dim - 1) * 2 / np.pi) / length**2 - 1)
    variance += (1 - rho**2) * (1 - 2 / np.pi) / length**2
    assert variance < 0.571 / dim
    for found in (cosines, products):
        assert abs(found.mean() - rho) < 4 * np.sqrt(variance / rotations)
        assert found.var() == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("dim", [1, 2, 7, 4096])
def test_the_mean_length_is_that_of_random_unit_rows(dim: int) -> None:
    rows = np.random.default_rng(2).standard_normal((2000, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert mean_length(dim) == pytest.approx(np.abs(rows).sum(axis=1).mean(), rel=0.02)
    assert mean_length(2**24) == pytest.approx(np.sqrt(2**25 / np.pi), rel=1e-6)
