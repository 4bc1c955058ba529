"""Products of packed signs with float queries, against the same product unpacked in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradkernels.cpu.signs import SignProducts
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn(m: int, d: int, q: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs (m, d), the same packed, and queries (q, d)."""
    rng = np.random.default_rng(seed)
    positive = rng.integers(0, 2, (m, d), dtype=np.uint8)
    bits = np.packbits(positive, axis=1, bitorder="little")
    return 2.0 * positive - 1, bits, rng.standard_normal((q, d), dtype=np.float32)


@settings(max_examples=100)
@given(
    m=st.integers(0, 70),
    d=st.integers(1, 300),
    q=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    spare=st.integers(0, 1),
)
def test_products_are_those_of_the_signs(m: int, d: int, q: int, seed: int, spare: int) -> None:
    """Any width, whole groups of 8 bytes or not; bits beyond d count nothing."""
    signs, bits, queries = drawn(m, d, q, seed)
    if spare and d % 8:
        bits[:, -1] |= 0xFF << d % 8 & 0xFF
    bits.flags.writeable = False  # as a chunk is mapped
    found = SignProducts(queries).products(bits)
    assert (found.shape, found.dtype) == ((m, q), np.float32)
    np.testing.assert_allclose(found, signs @ queries.T.astype(np.float64), atol=2e-4)


def test_large_products_keep_the_precision_of_float32() -> None:
    signs, bits, queries = drawn(64, 4096, 4, seed=0)
    exact = signs @ queries.T.astype(np.float64)
    found = SignProducts(queries).products(bits)
    naive = signs.astype(np.float32) @ queries.T
    assert np.abs(found - exact).max() <= 2 * np.abs(naive - exact).max() + 1e-5


def test_equal_rows_get_equal_bits_wherever_they_are_and_in_every_thread() -> None:
    _, bits, queries = drawn(1, 4100, 3, seed=1)
    products = SignProducts(queries)
    many = np.repeat(bits, 77, axis=0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(products.products, [many] * 8):
            assert (found == products.products(bits)).all()


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of \(2,\) bytes, not 1"):
        SignProducts(np.ones((1, 8), np.float32)).products(np.zeros((3, 2), np.uint8))
