"""Every fast path against the float64 oracle: odd sizes, dtypes, order, threads, batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec, project, project_reference
from gradkernels.randomness import sjlt_entries
from gradkernels.reference import matrix_rows, scale
from hypothesis import given, settings
from hypothesis import strategies as st

PATHS = [
    ("rademacher", "numba"),
    ("rademacher", "torch"),
    ("sjlt", "numba"),
    ("sjlt", "torch"),
    ("gaussian", "numba"),
    ("gaussian", "torch"),
]
paths = pytest.mark.parametrize(("method", "backend"), PATHS)


def _spec(method: str, p: int, d: int, seed: int = 11) -> ProjectionSpec:
    return ProjectionSpec(method, p=p, d=d, seed=seed, s=min(8, d))  # type: ignore[arg-type]


def _rows(b: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, p, generator=torch.Generator().manual_seed(seed))


def _error(out: torch.Tensor, exact: np.ndarray) -> float:
    """Return the largest relative error of a row, in the Euclidean norm."""
    miss = np.linalg.norm(out.double().numpy() - exact, axis=1)
    return float((miss / np.maximum(np.linalg.norm(exact, axis=1), 1e-30)).max())


@paths
@pytest.mark.parametrize("p", [1, 7, 64, 65, 1003])
@pytest.mark.parametrize("d", [1, 7, 31, 33, 300])
def test_odd_sizes_equal_the_oracle(method: str, backend: str, p: int, d: int) -> None:
    spec = _spec(method, p, d)
    for b in (1, 3, 17):
        x = _rows(b, p)
        out = project(x, spec, backend=backend)  # type: ignore[arg-type]
        assert out.shape == (b, d)
        assert out.dtype == torch.float32
        exact = project_reference(x, spec)
        # Relative to the size of what was summed: an output may cancel to almost nothing.
        size = x.norm(dim=1, keepdim=True).numpy() * max(1, p) ** 0.5 * scale(spec)
        assert np.abs((out.numpy() - exact) / size).max() < 1e-6


@pytest.mark.parametrize("method", ["rademacher", "sjlt", "gaussian"])
@pytest.mark.parametrize(("p", "d", "b"), [(2000, 4097, 5), (70_001, 129, 65)])
def test_error_is_at_most_twice_that_of_a_float32_matrix_product(
    method: str, p: int, d: int, b: int
) -> None:
    spec = _spec(method, p, d)
    x = _rows(b, p) * torch.rand(p, generator=torch.Generator().manual_seed(1)) ** 4
    matrix = matrix_rows(spec, np.arange(p)) * scale(spec)
    exact = x.double().numpy() @ matrix
    naive = _error(x @ torch.from_numpy(matrix).float(), exact)
    for backend in (path[1] for path in PATHS if path[0] == method):
        assert _error(project(x, spec, backend=backend), exact) <= 2 * naive  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["rademacher", "sjlt"])
def test_the_number_of_threads_changes_no_bit(method: str) -> None:
    spec = _spec(method, 70_000, 4100)
    x = _rows(9, 70_000)
    before = torch.get_num_threads()
    outs = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            outs.append(project(x, spec))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(outs[0], out) for out in outs[1:])


def test_an_sjlts_bits_are_those_of_one_addition_after_the_other() -> None:
    """In float32 over 16,384 parameters, these in float64: whatever tile the loop works in."""
    p, chunk = 40_000, 2**14
    spec, x = _spec("sjlt", p, 4100), _rows(3, p)
    outputs, sign = sjlt_entries(spec, np.arange(p))
    total = np.zeros((3, spec.d))
    for low in range(0, p, chunk):
        here = slice(low, low + chunk)
        for row, sums in zip(x.numpy(), total, strict=True):
            acc = np.zeros(spec.d, np.float32)
            np.add.at(acc, outputs[here], row[here, None] * sign[here])
            sums += acc
    expected = torch.from_numpy(total).mul_(scale(spec)).float()
    assert torch.equal(project(x, spec), expected)


@pytest.mark.parametrize("method", ["rademacher", "sjlt"])
def test_other_rows_of_the_batch_change_no_bit_of_a_row(method: str) -> None:
    spec = _spec(method, 5000, 300)
    x = _rows(70, 5000)
    whole = project(x, spec)
    for b in (1, 2, 8, 17, 64):
        assert torch.equal(project(x[:b], spec), whole[:b])
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2))
    assert torch.equal(project(x[order], spec), whole[order])


@paths
def test_batch_size_changes_a_row_by_at_most_1e_5(method: str, backend: str) -> None:
    spec = _spec(method, 20_000, 300)
    x = _rows(21, 20_000)
    whole = project(x, spec, backend=backend).double().numpy()  # type: ignore[arg-type]
    for b in (1, 8):
        assert _error(project(x[:b], spec, backend=backend), whole[:b]) <= 1e-5  # type: ignore[arg-type]


@paths
def test_a_row_of_nan_stays_alone(method: str, backend: str) -> None:
    spec = _spec(method, 1000, 40)
    x = _rows(19, 1000)
    clean = project(x, spec, backend=backend)  # type: ignore[arg-type]
    x[5] = torch.nan
    x[18, 3] = torch.inf
    out = project(x, spec, backend=backend)  # type: ignore[arg-type]
    rest = [i for i in range(19) if i not in (5, 18)]
    assert torch.equal(out[rest], clean[rest])
    assert out[5].isnan().all()
    assert not out[18].isfinite().all()


@paths
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_blocks_in_any_order_equal_the_whole(
    method: str, backend: str, data: st.DataObject
) -> None:
    p = data.draw(st.integers(1, 3000))
    b = data.draw(st.integers(1, 20))
    cuts = sorted({0, p, *data.draw(st.lists(st.integers(0, p), max_size=6))})
    blocks = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    spec = _spec(method, p, data.draw(st.integers(1, 200)))
    x = _rows(b, p)
    accumulator = Accumulator(spec, b, backend=backend)  # type: ignore[arg-type]
    for start, stop in blocks:
        accumulator.add(x[:, start:stop], start)
    whole = project(x, spec, backend=backend)  # type: ignore[arg-type]
    size = x.norm(dim=1, keepdim=True) * p**0.5 * scale(spec)
    assert ((accumulator.result() - whole) / size).abs().max() < 1e-6


def test_a_block_near_the_last_index_uses_global_indices() -> None:
    p = 2**31 - 1
    for method, backend in PATHS:
        spec = _spec(method, p, 64)
        accumulator = Accumulator(spec, 2, backend=backend)  # type: ignore[arg-type]
        block = _rows(2, 100)
        accumulator.add(block, p - 100)
        exact = block.double().numpy() @ matrix_rows(spec, np.arange(p - 100, p)) * scale(spec)
        assert _error(accumulator.result(), exact) < 1e-6


def test_uncovered_parameters_count_as_zeros_and_result_can_be_asked_again() -> None:
    spec = _spec("sjlt", 500, 32)
    x = _rows(3, 500)
    accumulator = Accumulator(spec, 3)
    assert not accumulator.result().any()
    accumulator.add(x[:, 100:200], 100)
    first = accumulator.result()
    x[:, :100] = x[:, 200:] = 0
    torch.testing.assert_close(first, project(x, spec))
    accumulator.add(x[:, 100:200], 100)
    torch.testing.assert_close(accumulator.result(), 2 * first)
    torch.testing.assert_close(first, project(x, spec))


@paths
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_computed_in_float32(
    method: str, backend: str, dtype: torch.dtype
) -> None:
    spec = _spec(method, 300, 50)
    x = _rows(4, 300).to(dtype)
    out = project(x, spec, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(out, project(x.float(), spec, backend=backend))  # type: ignore[arg-type]


@paths
def test_strides_do_not_matter_and_input_is_left_alone(method: str, backend: str) -> None:
    spec = _spec(method, 300, 50)
    wide = _rows(8, 700)
    before = wide.clone()
    expected = project(wide[::2, 1:601:2].contiguous(), spec, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(project(wide[::2, 1:601:2], spec, backend=backend), expected)  # type: ignore[arg-type]
    turned = wide[::2, 1:601:2].T.contiguous().T
    assert torch.equal(project(turned, spec, backend=backend), expected)  # type: ignore[arg-type]
    same = project(wide[:1, :300].expand(4, 300), spec, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(same[3], same[0])
    assert torch.equal(wide, before)


def test_tensors_that_require_grad_are_projected_without_a_graph() -> None:
    x = _rows(2, 30).requires_grad_()
    for method, backend in PATHS:
        assert not project(x, _spec(method, 30, 8), backend=backend).requires_grad  # type: ignore[arg-type]


@paths
def test_no_rows_give_no_features(method: str, backend: str) -> None:
    out = project(torch.empty(0, 30), _spec(method, 30, 9), backend=backend)  # type: ignore[arg-type]
    assert out.shape == (0, 9)


@paths
def test_an_autocast_around_it_changes_no_bit(method: str, backend: str) -> None:
    spec, x = _spec(method, 1003, 33), _rows(5, 1003)
    alone = project(x, spec, backend=backend)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project(x, spec, backend=backend)  # type: ignore[arg-type]
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(found, alone)


def test_reduced_matmul_precision_is_not_used_and_left_as_it_was() -> None:
    spec = _spec("gaussian", 2000, 64)
    x = _rows(32, 2000)
    expected = project(x, spec)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(project(x, spec), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("massive", [1, 30])
@pytest.mark.parametrize("method", ["rademacher", "gaussian", "sjlt"])
def test_cosines_deviate_no_more_than_they_must(method: str, massive: float) -> None:
    # std of a cosine <= (1 - rho^2) / sqrt(d), also with three massive coordinates.
    d, seeds = 256, 400
    x = _rows(2, 400)
    x[:, [3, 131, 259]] *= massive
    exact = torch.cosine_similarity(x[0], x[1], dim=0).item()
    misses = []
    for seed in range(seeds):
        y = project(x, _spec(method, 400, d, seed))
        misses.append(torch.cosine_similarity(y[0], y[1], dim=0).item() - exact)
    limit = (1 - exact**2) / d**0.5
    assert abs(np.mean(misses)) < 4.5 * limit / np.sqrt(seeds)
    assert np.std(misses) < 1.15 * limit  # 1.1 and the deviation of an estimate from 400 seeds
