"""Method `trak`: the bits of TRAK's `BasicProjector`, whatever batch and blocks a row comes in."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec, canary, project, project_reference
from gradkernels.published import published_bytes
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its source holds an escape that Python warns of
    from trak.projectors import BasicProjector, ProjectionType

P, D = 1003, 300
SPEC = ProjectionSpec("trak", p=P, d=D, seed=5)


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, P, generator=torch.Generator().manual_seed(seed))


def theirs(x: Tensor, d: int = D, seed: int = 5) -> Tensor:
    """LESS's call: its blocks of 128 outputs, model 0."""
    projector = BasicProjector(
        grad_dim=x.shape[1], proj_dim=d, seed=seed, proj_type=ProjectionType.rademacher,
        device=torch.device("cpu"), dtype=torch.float32, block_size=128,
    )  # fmt: skip
    return projector.project(x, model_id=0)


@pytest.mark.parametrize("d", [1, 5, 127, 128, 129, 300])
def test_sixteen_rows_have_the_bits_that_trak_gives_them(d: int) -> None:
    x = rows(16)
    assert torch.equal(project(x, ProjectionSpec("trak", p=P, d=d, seed=5)), theirs(x, d))


@pytest.mark.parametrize("count", [1, 2, 15, 17, 70])
def test_other_rows_and_their_number_change_no_bit(count: int) -> None:
    x = rows(70)
    whole = project(x, SPEC)
    for low in range(0, 70, 16):
        part = x[low : low + 16]
        filled = torch.cat([part, torch.zeros(16 - len(part), P)])
        assert torch.equal(whole[low : low + 16], theirs(filled)[: len(part)])
    assert torch.equal(project(x[-count:], SPEC), whole[-count:])


def test_blocks_in_any_order_have_the_bits_of_the_whole() -> None:
    x = rows(5)
    sums = Accumulator(SPEC, 5, squares=True)
    for low, high in ((600, P), (0, 17), (17, 600)):
        sums.add(x[:, low:high], low)
    assert torch.equal(sums.result(), project(x, SPEC))
    torch.testing.assert_close(sums.squares(), x.double().square().sum(dim=1), rtol=1e-6, atol=0)
    sums.add(x, 0)
    torch.testing.assert_close(sums.result(), 2 * project(x, SPEC))
    assert not Accumulator(SPEC, 2).result().any()
    assert project(x[:0], SPEC).shape == (0, D)


def test_an_autocast_around_it_changes_no_bit() -> None:
    x = rows(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = project(x, SPEC)
    assert torch.equal(found, project(x, SPEC))


def test_the_oracle_has_the_same_matrix_and_the_canary_tells_seeds_apart() -> None:
    x = rows(4)
    exact = project_reference(x, SPEC)
    np.testing.assert_allclose(project(x, SPEC).numpy(), exact, rtol=0, atol=1e-3)
    assert (canary(SPEC) == canary(SPEC)).all()
    assert (canary(SPEC) != canary(SPEC.with_seed(0))).any()
    assert (canary(SPEC)[5:] != canary(ProjectionSpec("trak", p=P, d=5, seed=5))[5:]).any()


def test_what_is_not_finite_stays_in_its_row() -> None:
    x = rows(4)
    broken = x.clone()
    broken[1, 7] = torch.inf
    found = project(broken, SPEC)
    assert not torch.isfinite(found[1]).any()
    assert torch.equal(found[[0, 2, 3]], project(x, SPEC)[[0, 2, 3]])


@pytest.mark.parametrize("backend", ["numba", "torch", "triton"])
def test_no_kernel_of_ours_claims_to_do_it(backend: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{backend}' does not do method trak"):
        project(rows(1), SPEC, backend=backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='trak' does method trak, not sjlt"):
        project(rows(1), ProjectionSpec("sjlt", p=P, d=D), backend="trak")


def test_without_trak_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trak", None)
    for ask in (lambda: Accumulator(SPEC, 2), lambda: canary(SPEC)):
        with pytest.raises(ValueError, match=r"the package traker \(TRAK\) is not installed"):
            ask()


def test_its_memory_is_a_matrix_of_128_outputs_and_the_rows() -> None:
    assert published_bytes(SPEC, rows=64) == 4 * P * (128 + 64 + 16)
    assert published_bytes(ProjectionSpec("trak", p=P, d=3), rows=1) == 4 * P * (3 + 1 + 16)
