"""Products of packed signs with float queries, against the same product unpacked in float64."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from gradkernels.cpu import compiled
from gradkernels.cpu.signs import SignProducts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def drawn(m: int, d: int, q: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signs (m, d), the same packed, and queries (q, d)."""
    rng = np.random.default_rng(seed)
    positive = rng.integers(0, 2, (m, d), dtype=np.uint8)
    bits = np.packbits(positive, axis=1, bitorder="little")
    return 2.0 * positive - 1, bits, rng.standard_normal((q, d), dtype=np.float32)


def bound(queries: np.ndarray) -> np.ndarray:
    """Return the largest error, for each query: what rounding sums allows, or less."""
    dim = queries.shape[1]
    padded = np.zeros((len(queries), -(-dim // 4) * 4))
    padded[:, :dim] = np.abs(queries)
    sums = padded.reshape(len(queries), padded.shape[1] // 4, 4).sum(axis=2)
    rounding = sums.shape[1] * sums.max(axis=1, initial=0) / 2**21
    return np.asarray(np.minimum(rounding + 1e-5, 2e-4))


@pytest.fixture(params=["shuffle_loop", "gather_loop"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have products use one of the loops."""
    if request.param == "gather_loop":
        monkeypatch.setattr(compiled, "has_avx2", lambda: False)
    elif not compiled.has_avx2():
        pytest.skip("this processor has no AVX2")


@pytest.mark.usefixtures("loop")
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(0, 70),
    d=st.integers(1, 300),
    q=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    spare=st.integers(0, 1),
)
def test_products_are_those_of_the_signs(m: int, d: int, q: int, seed: int, spare: int) -> None:
    """Any width, whole groups of 16 bytes or not; bits beyond d count nothing."""
    signs, bits, queries = drawn(m, d, q, seed)
    if spare and d % 8:
        bits[:, -1] |= 0xFF << d % 8 & 0xFF
    bits.flags.writeable = False  # as a chunk is mapped
    found = SignProducts(queries).products(bits)
    assert (found.shape, found.dtype) == ((m, q), np.float32)
    assert (np.abs(found - signs @ queries.T.astype(np.float64)) <= bound(queries)).all()


@pytest.mark.usefixtures("loop")
def test_large_products_keep_the_precision_of_float32() -> None:
    signs, bits, queries = drawn(64, 4096, 4, seed=0)
    exact = signs @ queries.T.astype(np.float64)
    found = SignProducts(queries).products(bits)
    naive = signs.astype(np.float32) @ queries.T
    assert np.abs(found - exact).max() <= 2 * np.abs(naive - exact).max() + 1e-5


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("d", [2**14 - 8, 2**14])
def test_the_largest_sums_there_are_fit(d: int) -> None:
    rows = np.array([[0xFF], [0]], np.uint8).repeat(d // 8, axis=1)
    found = SignProducts(np.ones((1, d), np.float32)).products(rows)
    np.testing.assert_array_equal(found, [[d], [-d]])


def test_both_loops_give_equal_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled.has_avx2():
        pytest.skip("this processor has no AVX2")
    for d in (100, 4096, 4100):
        _, bits, queries = drawn(77, d, 3, seed=d)
        shuffled = SignProducts(queries).products(bits)
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "has_avx2", lambda: False)
            assert (SignProducts(queries).products(bits) == shuffled).all()


@pytest.mark.usefixtures("loop")
def test_equal_rows_get_equal_bits_wherever_they_are_and_in_every_thread() -> None:
    _, bits, queries = drawn(1, 4100, 3, seed=1)
    products = SignProducts(queries)
    many = np.repeat(bits, 77, axis=0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(products.products, [many] * 8):
            assert (found == products.products(bits)).all()


def test_rows_of_another_width_and_queries_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows of \(2,\) bytes, not 1"):
        SignProducts(np.ones((1, 8), np.float32)).products(np.zeros((3, 2), np.uint8))
    with pytest.raises(ValueError, match="queries must be finite"):
        SignProducts(np.array([[1, np.nan]], np.float32))
