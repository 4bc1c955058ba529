"""On a GPU: the same matrix as on a CPU, in any order of blocks, for every float type."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec, project
from gradkernels.reference import matrix_rows, scale

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
methods = pytest.mark.parametrize("method", ["rademacher", "sjlt", "gaussian"])


def spec_of(method: str, p: int, d: int) -> ProjectionSpec:
    return ProjectionSpec(method, p=p, d=d, seed=11, s=min(8, d))  # type: ignore[arg-type]


def rows_of(b: int, p: int) -> torch.Tensor:
    return torch.randn(b, p, generator=torch.Generator().manual_seed(b))


@methods
@pytest.mark.parametrize(("p", "d"), [(1, 1), (65, 33), (1003, 300), (4097, 4096)])
def test_every_column_of_the_matrix_is_the_cpus(method: str, p: int, d: int) -> None:
    """One-hot rows read the matrix out; signs and places are equal, a Gaussian to rounding."""
    spec = spec_of(method, p, d)
    picked = torch.eye(p)[torch.arange(0, p, max(1, p // 40))]
    cpu, gpu = project(picked, spec), project(picked.cuda(), spec).cpu()
    if method == "gaussian":
        torch.testing.assert_close(gpu, cpu, rtol=2e-6, atol=2e-6)
    else:
        assert torch.equal(gpu, cpu)


@methods
@pytest.mark.parametrize(("p", "d", "b"), [(2000, 4097, 5), (70_001, 129, 65)])
def test_error_is_at_most_twice_that_of_a_float32_matrix_product(
    method: str, p: int, d: int, b: int
) -> None:
    spec, x = spec_of(method, p, d), rows_of(b, p)
    matrix = matrix_rows(spec, np.arange(p)) * scale(spec)
    exact = x.double().numpy() @ matrix
    naive = x.cuda() @ torch.from_numpy(matrix).float().cuda()

    def error(out: torch.Tensor) -> float:
        miss = np.linalg.norm(out.double().cpu().numpy() - exact, axis=1)
        return float((miss / np.linalg.norm(exact, axis=1)).max())

    assert error(project(x.cuda(), spec)) <= 2 * error(naive)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_in_any_order_give_the_whole_projection(method: str, dtype: torch.dtype) -> None:
    spec, x = spec_of(method, 5000, 257), rows_of(70, 5000).to(dtype).cuda()
    whole = project(x, spec)
    accumulator = Accumulator(spec, 70, device="cuda")
    cuts = [0, 1, 64, 1000, 1001, 4096, 5000]
    for low, high in sorted(itertools.pairwise(cuts), reverse=True):
        accumulator.add(x[:, low:high], low)
    torch.testing.assert_close(accumulator.result(), whole, rtol=1e-4, atol=1e-4)


@methods
def test_the_same_input_gives_the_same_bits_twice(method: str) -> None:
    spec, x = spec_of(method, 50_000, 1024), rows_of(33, 50_000).cuda()
    assert torch.equal(project(x, spec), project(x, spec))
