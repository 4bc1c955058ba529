"""Features in fewer bits: what comes back, and what is marked as unusable."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from gradstore.format.codec import decode, encode, row_maxima, settle_status
from gradstore.format.layout import FeatureDtype, RowStatus

ALL = np.ones(4, dtype=bool)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8), ("float32", 24)])
def test_rows_of_any_size_come_back_within_half_a_unit_in_the_last_place(
    dtype: str, bits: int
) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    rows *= np.array([[1e-30], [1e-3], [7.0], [1e30]], dtype=np.float32)
    found = decode(*encode(rows, ALL, dtype), dtype)
    largest = np.abs(rows).max(axis=1, keepdims=True)
    assert (np.abs(found - rows) <= largest * 2.0**-bits).all()
    assert np.abs(found / largest).max(axis=1) == pytest.approx(np.ones(4), rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rows_that_differ_by_a_power_of_two_are_stored_alike(dtype: str) -> None:
    row = np.random.default_rng(1).standard_normal(32).astype(np.float32)
    stored, scale = encode(np.stack([row, row * 8, row / 4, -row]), ALL, dtype)
    np.testing.assert_array_equal(stored[0], stored[1])
    np.testing.assert_array_equal(stored[0], stored[2])
    assert (scale / scale[0]).tolist() == [1.0, 8.0, 0.25, 1.0]


def test_int8_rows_come_back_within_half_a_step_of_127() -> None:
    """Whatever their size; also where the scale is subnormal, which float32 rounds coarsely."""
    rows = np.random.default_rng(0).standard_normal((5, 300))
    rows[:, 7] = -9.0
    sizes = np.array([[1e-38], [1e-3], [7.0], [1e37], [2e-44]])
    rows = (rows * sizes).astype(np.float32)
    stored, scale = encode(rows, np.ones(5, bool), "int8")
    assert stored.dtype == np.int8
    assert stored[:4, 7].tolist() == [-127] * 4
    assert np.abs(stored).max() <= 127
    found = decode(stored, scale, "int8").astype(np.float64)
    assert (np.abs(found - rows) <= 0.5001 * scale[:, None].astype(np.float64)).all()
    assert scale[:4] == pytest.approx(9 / 127 * sizes[:4, 0], rel=1e-6)


def test_halves_of_bfloat16_are_rounded_to_even() -> None:
    """Between 1 and 1 + 2^-7, and between that and the next; 1.5 keeps the scale at 1."""
    row = np.array([[1.5, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20]], np.float32)
    found = decode(*encode(row, np.ones(1, bool), "bfloat16"), "bfloat16")
    assert found[0].tolist() == [1.5, 1.0, 1 + 2.0**-6, 1 + 2.0**-7]


def test_entries_are_rounded_to_the_nearest_half_also_where_it_is_subnormal() -> None:
    """Compared with NumPy's cast; the largest entry, 1.5, keeps the scale at 1."""
    rng = np.random.default_rng(0)
    rows = np.ldexp(rng.uniform(-1, 1, (8, 512)), rng.integers(-30, 1, (8, 512)))
    rows = rows.astype(np.float32)
    rows[:, 0] = 1.5
    rows[:, 1] = 1 + 2.0**-11  # between two halves: to the even one
    rows.flags.writeable = False
    stored, scale = encode(rows, np.ones(8, bool), "float16")
    np.testing.assert_array_equal(scale, 1)
    np.testing.assert_array_equal(stored.view(np.uint16), rows.astype(np.float16).view(np.uint16))


def test_every_half_is_decoded_to_its_number_also_from_a_chunk_that_is_mapped_read_only() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    halves.flags.writeable = False
    into = np.empty((256, 256), np.float32)
    found = decode(halves, np.ones(256, np.float32), "float16", out=into)
    assert found is into
    np.testing.assert_array_equal(found, halves.astype(np.float32))


@pytest.mark.parametrize("dtype", get_args(FeatureDtype))
def test_unusable_rows_come_back_as_nan(dtype: str) -> None:
    rows = np.ones((4, 3), np.float32)
    usable = np.array([True, False, True, False])
    assert np.isnan(decode(*encode(rows, usable, dtype), dtype, 3)).all(axis=1).tolist() == [
        False, True, False, True,
    ]  # fmt: skip


def test_a_row_called_ok_that_has_no_direction_is_not() -> None:
    rows = np.array([[1, 0], [0, 0], [np.nan, 1], [np.inf, 1], [0, 0]], np.float32)
    norm = np.array([1, 1, 1, 1, 1], np.float32)
    status = np.array([RowStatus.OK] * 4 + [RowStatus.MASKED], np.uint8)
    assert [RowStatus(s) for s in settle_status(row_maxima(rows), norm, status)] == [
        RowStatus.OK, RowStatus.ZERO_NORM, RowStatus.NON_FINITE, RowStatus.NON_FINITE,
        RowStatus.MASKED,
    ]  # fmt: skip
