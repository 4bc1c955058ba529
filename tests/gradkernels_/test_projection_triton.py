"""The Triton kernels, interpreted on a CPU: the matrix and the numbers of the other paths."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec
from gradkernels.dispatch import choose_backend
from gradkernels.gpu import usable
from gradkernels.portable import rademacher_sums
from gradkernels.reference import matrix_rows

if TYPE_CHECKING:
    from interpreted import Interpreter

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

P = 2**31 - 1
CPU = torch.device("cpu")
#: float32, or what a part of it loses beside the largest number of a chain.
ULP = 2.0**-23


methods = pytest.mark.parametrize("method", ["rademacher", "sjlt"])


def spec_of(d: int, method: str = "rademacher") -> ProjectionSpec:
    return ProjectionSpec(method, p=P, d=d, seed=11, s=min(8, d))  # type: ignore[arg-type]


def rows_of(b: int, m: int) -> torch.Tensor:
    return torch.randn(b, m, generator=torch.Generator().manual_seed(b))


def error(out: torch.Tensor, exact: np.ndarray) -> float:
    """Largest relative error of a row, in the Euclidean norm."""
    miss = np.linalg.norm(out.double().numpy() - exact, axis=1)
    return float((miss / np.linalg.norm(exact, axis=1)).max())


@methods
@pytest.mark.parametrize(("start", "m", "d"), [(0, 1, 1), (P - 64, 64, 33), (12_345, 16, 300)])
def test_the_matrix_is_the_oracles_bit_for_bit(
    triton: Interpreter, method: str, start: int, m: int, d: int
) -> None:
    """One-hot rows read the matrix out, at the first and the last parameters."""
    spec = spec_of(d, method)
    matrix = matrix_rows(spec, np.arange(start, start + m))
    np.testing.assert_array_equal(triton.sums(spec, [(torch.eye(m), start)]), matrix)


def test_whole_numbers_keep_what_float64_would(triton: Interpreter) -> None:
    """An SJLT's sums are exact but for a power of two far below a row's largest number."""
    spec = spec_of(40, "sjlt")
    sizes = torch.tensor([1e-40, 1e-30, 1.0, 1e30, 3e38])[:, None]
    x = rows_of(5, 35).clamp(-1, 1) * sizes
    exact = x.double().numpy() @ matrix_rows(spec, np.arange(35))
    for blocks in ([(x, 0)], [(x[:, 33:], 33), (x[:, :33], 0)]):
        assert error(triton.sums(spec, blocks), exact) < 1e-12
    for dtype in (torch.float16, torch.bfloat16):
        low = x[2:3].to(dtype)
        assert torch.equal(triton.sums(spec, [(low, 0)]), triton.sums(spec, [(low.float(), 0)]))


def test_rows_of_an_sjlt_are_alone(triton: Interpreter) -> None:
    """Zero stays zero; an inf or a NaN makes its row NaN, and leaves the others their bits."""
    spec, x = spec_of(40, "sjlt"), rows_of(9, 60)
    clean = triton.sums(spec, [(x, 5)])
    assert torch.equal(triton.sums(spec, [(x[:1], 5)]), clean[:1])
    x[1] = 0
    x[3, 20], x[4, 2], x[6] = torch.inf, -torch.inf, torch.nan
    found = triton.sums(spec, [(x, 5)])
    assert found[[3, 4, 6]].isnan().all()
    assert not found[1].any()
    untouched = [0, 2, 5, 7, 8]
    assert torch.equal(found[untouched], clean[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("b", "m", "d"), [(3, 203, 33), (17, 129, 129)])
def test_error_is_at_most_that_of_a_float32_matrix_product(
    triton: Interpreter, dtype: torch.dtype, b: int, m: int, d: int
) -> None:
    """The interpreter rounds every sum, where a tensor core cuts off: a GPU may take twice it."""
    x = (rows_of(b, m) * torch.rand(m, generator=torch.Generator().manual_seed(1)) ** 4).to(dtype)
    matrix = matrix_rows(spec_of(d), np.arange(m))
    exact = x.double().numpy() @ matrix
    naive = error(x.float() @ torch.from_numpy(matrix).float(), exact)
    assert error(triton.sums(spec_of(d), [(x, 0)]), exact) <= max(naive, ULP / 4)


def test_zero_infinite_and_undefined_rows_are_those_of_plain_torch(triton: Interpreter) -> None:
    x = rows_of(9, 100)
    clean = triton.sums(spec_of(40), [(x, 5)])
    x[1] = 0
    x[3, 70] = torch.inf
    x[4, 2], x[4, 99] = torch.inf, -torch.inf
    x[6] = torch.nan
    x[8, 7] = -torch.inf
    x[8, 8] = torch.nan
    plain = rademacher_sums(spec_of(40), 9, CPU)
    plain.add(x, 5)
    found = triton.sums(spec_of(40), [(x, 5)])
    odd = [1, 3, 4, 6, 8]
    torch.testing.assert_close(found[odd], plain.total()[odd], rtol=0, atol=0, equal_nan=True)
    untouched = [0, 2, 5, 7]
    assert torch.equal(found[untouched], clean[untouched])


@pytest.mark.parametrize("size", [1e36, 1e-30, 1e-37, 1e-44])
def test_numbers_of_any_size_keep_their_bits(triton: Interpreter, size: float) -> None:
    x = rows_of(2, 64).clamp(-1, 1) * size
    x[1] = 1  # another row's scale is its own
    exact = x.double().numpy() @ matrix_rows(spec_of(64), np.arange(64))
    found = triton.sums(spec_of(64), [(x, 0)])
    largest = x.abs().max(dim=1, keepdim=True).values.double().numpy()
    assert (np.abs(found.numpy() - exact) <= 64 * ULP * largest + 1e-43).all()


def test_other_rows_change_no_bit_of_a_row(triton: Interpreter) -> None:
    x = rows_of(16, 150)
    whole = triton.sums(spec_of(100), [(x, 0)])
    assert torch.equal(triton.sums(spec_of(100), [(x[:1], 0)]), whole[:1])
    x[1:] *= 1e20
    assert torch.equal(triton.sums(spec_of(100), [(x, 0)])[0], whole[0])


def test_a_stage_filled_often_and_blocks_in_any_order_give_the_same_sums(
    triton: Interpreter,
) -> None:
    """Two chains staged, one program per tile: every flush, loop and boundary happens."""
    x = rows_of(5, 331)
    exact = x.double().numpy() @ matrix_rows(spec_of(70), np.arange(9, 340))
    cuts = [0, 1, 64, 65, 200, 331]
    blocks = [(x[:, low:high], 9 + low) for low, high in itertools.pairwise(cuts)]
    for order in (blocks, blocks[::-1]):
        found = triton.sums(spec_of(70), order, CHAINS=2, PROGRAMS=1)
        assert error(found, exact) < 4 * ULP
    assert error(triton.sums(spec_of(70), [(x, 9)], PROGRAMS=2), exact) < 4 * ULP


def test_types_may_change_between_blocks(triton: Interpreter) -> None:
    """A float32 takes two parts: one staged with half the parts would lose 13 of its bits."""
    x = rows_of(3, 192)
    x[:, :64] = x[:, :64].half()
    blocks = [(x[:, :64].half(), 0), (x[:, 64:128], 64), (x[:, 128:], 128)]
    exact = x.double().numpy() @ matrix_rows(spec_of(40), np.arange(192))
    assert error(triton.sums(spec_of(40), blocks), exact) < 4 * ULP


def test_a_low_precision_block_is_computed_as_its_float32(triton: Interpreter) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = rows_of(4, 100).to(dtype)
        wide = triton.sums(spec_of(50), [(x.float(), 0)])
        assert torch.equal(triton.sums(spec_of(50), [(x, 0)]), wide)


def test_strides_do_not_matter(triton: Interpreter) -> None:
    wide = rows_of(8, 300)
    plain = triton.sums(spec_of(40), [(wide[::2, 1:201:2].contiguous(), 0)])
    turned = wide[::2, 1:201:2].T.contiguous().T
    assert torch.equal(triton.sums(spec_of(40), [(wide[::2, 1:201:2], 0)]), plain)
    assert torch.equal(triton.sums(spec_of(40), [(turned, 0)]), plain)
    same = triton.sums(spec_of(40), [(wide[:1, :100].expand(4, 100), 0)])
    assert torch.equal(same[3], same[0])


@pytest.mark.parametrize("width", [16, 64])
@methods
def test_the_test_at_first_use_passes(triton: Interpreter, method: str, width: int) -> None:
    assert triton.difference(method, width) is None


@methods
def test_the_test_at_first_use_finds_another_matrix(triton: Interpreter, method: str) -> None:
    why = triton.difference(method, 16, fault="key")
    assert why is not None
    assert "of 2600 sums of torch.float32 differ from torch's, first row 0, output" in why


def cuda_that(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Pretend that there is a CUDA device, on which only names are asked for."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    usable._tested.cache_clear()


@pytest.mark.parametrize("fault", ["differs", "raises", "differs in small batches"])
def test_failing_kernels_give_way_to_plain_torch_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def difference(device: torch.device, method: str, width: int, kind: Any) -> str | None:
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return None if "small" in fault and width == 64 else "3 of 4 sums differ"

    cuda_that(monkeypatch)
    monkeypatch.setattr(usable, "difference", difference)
    monkeypatch.setattr(usable._log, "propagate", True)
    device = torch.device("cuda")
    try:
        with caplog.at_level(logging.WARNING, usable._log.name):
            for _ in range(3):
                assert choose_backend(spec_of(40), device, None) == "torch"
        why = "RuntimeError: no kernel image" if fault == "raises" else "3 of 4 sums differ"
        assert [why in record.getMessage() for record in caplog.records] == [True]
        with pytest.raises(ValueError, match=f"backend='triton' .* not this: .*{why}"):
            choose_backend(spec_of(40), device, "triton")
    finally:
        usable._tested.cache_clear()


def test_triton_is_chosen_on_cuda_where_its_test_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda_that(monkeypatch)
    monkeypatch.setattr(usable, "difference", lambda device, method, width, kind: None)
    device = torch.device("cuda", 1)
    try:
        assert choose_backend(spec_of(40), device, None) == "triton"
        assert choose_backend(spec_of(40), device, "triton") == "triton"
        assert choose_backend(spec_of(40), device, "torch") == "torch"
        assert choose_backend(spec_of(40, "sjlt"), device, None) == "triton"
        assert choose_backend(spec_of(40, "gaussian"), device, None) == "torch"
        cuda_that(monkeypatch, (7, 5))
        assert choose_backend(spec_of(40), device, None) == "torch"
    finally:
        usable._tested.cache_clear()


def test_triton_is_refused_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' .* not this: the device is cpu"):
        Accumulator(spec_of(40), 3, backend="triton")
