"""On a GPU: the Triton kernels are chosen, agree with plain torch, and cost what they say."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, Feature, ProjectionSpec, project
from gradkernels.features import VECTORS
from gradkernels.reference import matrix_rows, scale

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

from gradkernels.gpu import launching, usable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
methods = pytest.mark.parametrize("method", ["rademacher", "sjlt"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)
SMOLLM2 = 4_884_480  # LoRA r=16 on all linear layers


def spec_of(p: int, d: int, method: str = "rademacher") -> ProjectionSpec:
    return ProjectionSpec(method, p=p, d=d, seed=11, s=min(8, d))  # type: ignore[arg-type]


def rows_of(b: int, p: int) -> torch.Tensor:
    return torch.randn(b, p, device="cuda", generator=torch.Generator("cuda").manual_seed(b))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance of a row, beside the row's norm."""
    miss = (found.double() - expected.double()).norm(dim=1)
    return float((miss / expected.double().norm(dim=1)).max())


@contextmanager
def no_waiting() -> Iterator[None]:
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@methods
@pytest.mark.parametrize("kind", [None, *VECTORS])
@pytest.mark.parametrize("width", launching.WIDTHS)
def test_the_test_at_first_use_passes(method: Any, kind: Any, width: int) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    assert usable.difference(device, method, width, kind) is None


@methods
def test_triton_is_what_runs(method: str) -> None:
    for rows in (1, 16, 17, 64, 200):
        assert Accumulator(spec_of(100, 40, method), rows, device="cuda").backend == "triton"


@methods
@dtypes
@pytest.mark.parametrize(("b", "p", "d"), [(1, 1, 1), (3, 65, 33), (17, 1003, 300),
                                           (64, 70_001, 129), (130, 9000, 4097)])  # fmt: skip
def test_features_are_those_of_plain_torch(
    method: str, dtype: torch.dtype, b: int, p: int, d: int
) -> None:
    spec, x = spec_of(p, d, method), rows_of(b, p).to(dtype)
    found, plain = project(x, spec), project(x, spec, backend="torch")
    # An output may cancel to almost nothing: beside the size of what was summed.
    size = x.float().norm(dim=1, keepdim=True) * p**0.5 * scale(spec)
    assert ((found - plain) / size).abs().max() < 1e-6


@dtypes
@pytest.mark.parametrize(("b", "p", "d"), [(5, 2000, 4097), (65, 70_001, 129)])
def test_error_is_at_most_twice_that_of_a_float32_matrix_product(
    dtype: torch.dtype, b: int, p: int, d: int
) -> None:
    spec, x = spec_of(p, d), rows_of(b, p).to(dtype)
    matrix = torch.from_numpy(matrix_rows(spec, np.arange(p)) * scale(spec)).cuda()
    exact = x.double() @ matrix
    naive = apart(x.float() @ matrix.float(), exact)
    assert apart(project(x, spec), exact) <= 2 * naive


@methods
@dtypes
def test_neither_the_batch_nor_its_size_changes_a_bit_of_a_row(
    method: str, dtype: torch.dtype
) -> None:
    spec, x = spec_of(200_000, 1000, method), rows_of(130, 200_000).to(dtype)
    whole = project(x, spec)
    for b in (1, 2, 16, 17, 64, 65):  # both widths of a product, alone and in groups
        assert torch.equal(project(x[:b], spec), whole[:b]), b
    order = torch.randperm(130, generator=torch.Generator().manual_seed(2)).cuda()
    assert torch.equal(project(x[order], spec), whole[order])
    assert torch.equal(project(x, spec), whole)


@methods
def test_a_low_precision_block_is_computed_as_its_float32(method: str) -> None:
    spec = spec_of(50_000, 500, method)
    for dtype in (torch.bfloat16, torch.float16):
        x = rows_of(20, 50_000).to(dtype)
        assert torch.equal(project(x, spec), project(x.float(), spec))


@methods
def test_blocks_in_any_order_and_cut_anyhow_give_the_whole(method: str) -> None:
    """Enough that the stage of a dense projection is filled more than once."""
    spec, x = spec_of(1_300_000, 500, method), rows_of(20, 1_300_000)
    whole = project(x, spec)
    cuts = [0, 1, 64, 1000, 1001, 600_000, 600_063, 1_300_000]
    accumulator = Accumulator(spec, 20, device="cuda")
    for low, high in sorted(itertools.pairwise(cuts), reverse=True):
        accumulator.add(x[:, low:high], low)
    assert apart(accumulator.result(), whole) < 1e-6


@methods
def test_strides_do_not_matter(method: str) -> None:
    spec, wide = spec_of(3000, 500, method), rows_of(8, 7000)
    expected = project(wide[::2, 1:6001:2].contiguous(), spec)
    assert torch.equal(project(wide[::2, 1:6001:2], spec), expected)
    assert torch.equal(project(wide[::2, 1:6001:2].T.contiguous().T, spec), expected)


def test_zero_infinite_and_undefined_rows_are_those_of_plain_torch() -> None:
    spec, x = spec_of(5000, 300), rows_of(40, 5000)
    clean = project(x, spec)
    x[1] = 0
    x[3, 70] = torch.inf
    x[4, 2], x[4, 4999] = torch.inf, -torch.inf
    x[6] = torch.nan
    x[39, 7] = -torch.inf
    found, plain = project(x, spec), project(x, spec, backend="torch")
    odd = [1, 3, 4, 6, 39]
    torch.testing.assert_close(found[odd], plain[odd], rtol=0, atol=0, equal_nan=True)
    untouched = [row for row in range(40) if row not in odd]
    assert torch.equal(found[untouched], clean[untouched])


def test_rows_of_an_sjlt_are_alone() -> None:
    spec, x = spec_of(5000, 300, "sjlt"), rows_of(40, 5000)
    clean = project(x, spec)
    x[1] = 0
    x[3, 70], x[6], x[39, 7] = torch.inf, torch.nan, -torch.inf
    found = project(x, spec)
    assert found[[3, 6, 39]].isnan().all()
    assert not found[1].any()
    untouched = [row for row in range(40) if row not in (1, 3, 6, 39)]
    assert torch.equal(found[untouched], clean[untouched])


@methods
@pytest.mark.parametrize("b", [16, 64])
def test_a_whole_gradient_is_projected_as_by_plain_torch(method: str, b: int) -> None:
    """The blocks of one layer's matrices and all the rest at once."""
    spec, x = spec_of(SMOLLM2, 4096, method), rows_of(b, SMOLLM2)
    plain = project(x, spec, backend="torch")
    assert apart(project(x, spec), plain) < 2e-6
    accumulator = Accumulator(spec, b, device="cuda")
    cuts = [0, 9216, 18_432, 27_648, 30_720, SMOLLM2]
    for low, high in itertools.pairwise(cuts):
        accumulator.add(x[:, low:high], low)
    assert apart(accumulator.result(), plain) < 2e-6


@methods
def test_adding_waits_for_nothing(method: str) -> None:
    spec, x = spec_of(1_300_000, 4096, method), rows_of(64, 1_300_000)
    cuts = list(itertools.pairwise(range(0, 1_300_001, 100_000)))

    def projected() -> torch.Tensor:
        accumulator = Accumulator(spec, 64, device="cuda")
        for low, high in cuts:
            accumulator.add(x[:, low:high], low)
        return accumulator.result()

    warm = projected()  # compiles
    with no_waiting():
        found = projected()
    assert torch.equal(found, warm)


@methods
def test_memory_does_not_grow_with_the_gradient(method: str) -> None:
    peaks = []
    for p in (1_300_000, SMOLLM2):
        spec, x = spec_of(p, 4096, method), rows_of(64, p)
        project(x, spec)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        project(x, spec)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del x
    assert peaks[1] <= peaks[0] + 2**20
    assert peaks[0] <= 200 * 2**20


def feature_of(kind: Any, m: int) -> Feature:
    """A feature of m parameters, as an optimizer of some steps would have it."""
    generator = torch.Generator("cuda").manual_seed(7)
    a, v = 0.3 * torch.randn(2, m, device="cuda", generator=generator)
    base = v.square() + 1e-6
    still = base.sqrt()
    made = {"a": a, "base": base, "still": still, "pull": 0.1 * a / still}
    return Feature(kind, **{name: made[name] for name in VECTORS[kind]}, curve=0.1)


@methods
@dtypes
@pytest.mark.parametrize("kind", list(VECTORS))
def test_features_made_by_a_projection_are_those_of_plain_torch(
    method: str, dtype: torch.dtype, kind: Any
) -> None:
    """Blocks of two parameters' slots; and the same bits whatever the batch."""
    spec, x, cut = spec_of(70_001, 300, method), rows_of(70, 70_001).to(dtype), 9216
    factors = torch.rand(70, device="cuda", generator=torch.Generator("cuda").manual_seed(3))
    whole = feature_of(kind, 70_001)

    def found(b: int, backend: Any) -> tuple[torch.Tensor, torch.Tensor]:
        sums = Accumulator(spec, b, device="cuda", backend=backend, squares=True)
        for low, high in ((0, cut), (cut, 70_001)):
            sums.add(x[:b, low:high], low, whole.part(low, high), factors[:b])
        return sums.result(), sums.squares()

    ours, squares = found(70, None)
    plain, expected = found(70, "torch")
    assert apart(ours, plain) < 2e-6
    torch.testing.assert_close(squares, expected, rtol=1e-6, atol=0)
    for b in (1, 16, 17, 64):
        few, few_squares = found(b, None)
        assert torch.equal(few, ours[:b]), b
        assert torch.equal(few_squares, squares[:b]), b


@methods
def test_making_features_waits_for_nothing(method: str) -> None:
    spec, x = spec_of(500_000, 4096, method), rows_of(64, 500_000)
    feature = feature_of("adam_marginal", 500_000)

    def projected() -> tuple[torch.Tensor, torch.Tensor]:
        sums = Accumulator(spec, 64, device="cuda")
        sums.add(x, 0, feature)
        return sums.result(), sums.squares()

    warm = projected()  # compiles
    with no_waiting():
        found = projected()
    assert torch.equal(found[0], warm[0])
    assert torch.equal(found[1], warm[1])
