"""Products of bytes against the float64 oracle, within the bound that their module derives.

`torch._int_mm` gives the same numbers on every processor, slowly where there is no VNNI.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec, dispatch, project, project_reference
from gradkernels.cpu.int8 import TILE_PARAMS, halves
from gradkernels.cpu.vnni import vnni_missing
from gradkernels.dispatch import choose_backend
from gradkernels.randomness import signs
from gradkernels.reference import scale
from hypothesis import given, settings
from hypothesis import strategies as st

CPU = torch.device("cpu")
#: Of a row's largest number in a tile, see `gradkernels.cpu.int8`; and of nothing.
SHARE, NOTHING = 1 / 64_000, 2.0**-126


@pytest.fixture(scope="module", autouse=True)
def everywhere() -> Iterator[None]:
    """Offer the backend on any processor."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "vnni_missing", lambda: None)
        yield


def _spec(p: int, d: int, seed: int = 11) -> ProjectionSpec:
    return ProjectionSpec("rademacher", p=p, d=d, seed=seed)


def _rows(b: int, p: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(b, p, generator=torch.Generator().manual_seed(seed))


def _moved(x: torch.Tensor) -> np.ndarray:
    """Return how far each number of one block (b, p) may be moved: (b, p) float64."""
    parts = []
    for tile in torch.split(x, TILE_PARAMS, dim=1):
        largest = tile.double().abs().amax(dim=1, keepdim=True)
        parts.append((largest * SHARE).clamp(min=NOTHING).expand(tile.shape))
    return torch.cat(parts, dim=1).numpy()


def _within_bound(x: torch.Tensor, spec: ProjectionSpec) -> bool:
    exact = project_reference(x, spec)
    allowed = _moved(x).sum(axis=1, keepdims=True) * scale(spec) + np.abs(exact) * 2.0**-24
    found = project(x, spec, backend="int8").double().numpy()
    return bool((np.abs(found - exact) <= allowed * (1 + 1e-9) + 1e-44).all())


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_an_output_is_off_by_no_more_than_the_bound(data: st.DataObject) -> None:
    """Odd p, d and b; rows of zeros, of numbers of any size, and with one huge number."""
    b, p = data.draw(st.integers(1, 9)), data.draw(st.integers(1, TILE_PARAMS + 90))
    spec = _spec(p, data.draw(st.integers(1, 140)), data.draw(st.integers(0, 2**63 - 1)))
    x = _rows(b, p, data.draw(st.integers(0, 99)))
    for row in x:
        row *= data.draw(st.sampled_from([0.0, 1e-38, 1e-30, 1.0, 1e3, 1e25]))
        if data.draw(st.booleans()):
            row[data.draw(st.integers(0, p - 1))] *= data.draw(st.sampled_from([1e4, 1e8]))
    assert _within_bound(x, spec)


@settings(max_examples=60, deadline=None)
@given(row=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=9))
def test_a_few_numbers_whatever_they_are_stay_within_the_bound(row: list[float]) -> None:
    assert _within_bound(torch.tensor([row]), _spec(len(row), 33))


def test_each_number_is_moved_by_no_more_than_the_bound() -> None:
    x = torch.cat([_rows(40, TILE_PARAMS), _rows(40, TILE_PARAMS) ** 5])
    parts, step = halves(x)
    high, low = parts.double().chunk(2)
    moved = ((255 * high + low) * step - x.double()).abs().numpy()
    assert (moved <= _moved(x)).all()
    assert (moved / _moved(x)).max() > 0.95  # nor is it far below
    lengths = np.linalg.norm(moved, axis=1) / x.double().norm(dim=1).numpy()
    assert lengths.max() < 7.1e-4
    assert lengths[:40].max() < 5e-5


def test_one_huge_number_among_small_ones_costs_at_most_the_share_of_the_length() -> None:
    x = _rows(5, TILE_PARAMS)
    x[:, 77] = torch.tensor([1e2, 1e4, 1e6, -1e4, 3e38])
    parts, step = halves(x)
    high, low = parts.double().chunk(2)
    moved = ((255 * high + low) * step - x.double()).norm(dim=1) / x.double().norm(dim=1)
    assert moved.max() <= TILE_PARAMS**0.5 * SHARE
    assert _within_bound(x, _spec(TILE_PARAMS, 65))


def test_whole_numbers_that_a_step_divides_are_projected_exactly() -> None:
    """Every sign, and every pair of bytes: 65,025 numbers from -32,512 to 32,512."""
    p, d = 65_025, 77
    x = (torch.arange(p) - 32_512).float()
    x = x.view(-1, 255).T.reshape(-1)  # large and small ones in every tile
    x = torch.stack([x, x.flip(0)])
    for tile in torch.split(x, TILE_PARAMS, dim=1):
        tile[:, 0] = 32_512
    spec = _spec(p, d)
    expected = (x.double().numpy() @ signs(spec, np.arange(p), d)) * scale(spec)
    assert torch.equal(project(x, spec, backend="int8"), torch.from_numpy(expected).float())


@pytest.mark.parametrize("size", [32_512.0, -32_512.0, 32_258.0])
def test_the_largest_sums_there_are_fit(size: float) -> None:
    """Both bytes 127, both -127, and 127 beside -127, each with the sign of an output."""
    d = 33
    spec = _spec(TILE_PARAMS, d)
    sign = signs(spec, np.arange(TILE_PARAMS), d)
    x = torch.from_numpy(sign.T * np.float32(size)).contiguous()
    x[:, 0] = 32_512 * int(sign[0, 0])
    expected = (x.double().numpy() @ sign) * scale(spec)
    assert torch.equal(project(x, spec, backend="int8"), torch.from_numpy(expected).float())


def test_outputs_beyond_one_tile_of_words_have_their_own_signs() -> None:
    x = _rows(3, 100)
    for d in (511, 512, 513, 1100):
        assert _within_bound(x, _spec(100, d))


def test_a_block_near_the_last_index_uses_global_indices() -> None:
    p = 2**31 - 1
    spec, block = _spec(p, 64), torch.full((1, 100), 32_512.0)
    sums = Accumulator(spec, 1, backend="int8")
    sums.add(block, p - 100)
    exact = block.double().numpy() @ signs(spec, np.arange(p - 100, p), 64) * scale(spec)
    assert torch.equal(sums.result(), torch.from_numpy(exact).float())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_blocks_in_any_order_are_off_by_no_more_than_their_bounds(data: st.DataObject) -> None:
    p, b = data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 70))
    cuts = sorted({0, p, *data.draw(st.lists(st.integers(0, p), max_size=6))})
    blocks = data.draw(st.permutations(list(itertools.pairwise(cuts))))
    spec, x = _spec(p, data.draw(st.integers(1, 200))), _rows(b, p)
    sums = Accumulator(spec, b, backend="int8")
    allowed = np.zeros((b, 1))
    for start, stop in blocks:
        sums.add(x[:, start:stop], start)
        allowed += _moved(x[:, start:stop]).sum(axis=1, keepdims=True) * scale(spec)
    exact = project_reference(x, spec)
    found = sums.result().double().numpy()
    assert (np.abs(found - exact) <= allowed + np.abs(exact) * 2.0**-23).all()


def test_threads_and_other_rows_change_no_bit_of_a_row() -> None:
    spec, x = _spec(300, 600), _rows(66, 300)
    before = torch.get_num_threads()
    whole = project(x, spec, backend="int8")
    for b in (1, 64):
        assert torch.equal(project(x[:b], spec, backend="int8"), whole[:b])
    try:
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(project(x, spec, backend="int8"), whole)
    finally:
        torch.set_num_threads(before)


def test_a_row_that_is_not_finite_is_nan_alone() -> None:
    spec, x = _spec(3000, 40), _rows(9, 3000)
    clean = project(x, spec, backend="int8")
    x[5], x[2, 17], x[8, 3] = torch.nan, torch.nan, torch.inf
    out = project(x, spec, backend="int8")
    rest = [i for i in range(9) if i not in (2, 5, 8)]
    assert torch.equal(out[rest], clean[rest])
    assert out[[2, 5, 8]].isnan().all()


def test_zeros_and_no_rows_are_projected_to_zeros_and_none() -> None:
    assert not project(torch.zeros(2, 100), _spec(100, 9), backend="int8").any()
    assert project(torch.empty(0, 100), _spec(100, 9), backend="int8").shape == (0, 9)


def test_other_types_strides_and_an_autocast_change_no_bit_and_the_input_is_left_alone() -> None:
    spec, wide = _spec(300, 50), _rows(8, 700)
    before = wide.clone()
    x = wide[::2, 1:601:2]
    expected = project(x.contiguous(), spec, backend="int8")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(x, spec, backend="int8"), expected)
    assert torch.equal(project(x.double(), spec, backend="int8"), expected)
    assert torch.equal(wide, before)


# ---- where it is offered -----------------------------------------------------------------------


def _flags(monkeypatch: pytest.MonkeyPatch, **flags: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, **flags})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "vnni_missing", vnni_missing)


def test_it_is_offered_by_its_name_where_torch_uses_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    _flags(monkeypatch, avx512_vnni=True)
    assert choose_backend(_spec(10, 8), CPU, "int8") == "int8"


def test_it_is_never_chosen_unless_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no export, which names no backend, mixes its rounding into a store."""
    _flags(monkeypatch, avx512_vnni=True)
    assert choose_backend(_spec(10, 8), CPU, None) != "int8"


@pytest.mark.parametrize("flags", [{}, {"avx512_vnni": False}, {"avx_vnni": True}])
def test_a_processor_without_vnni_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool]
) -> None:
    _flags(monkeypatch, **flags)
    with pytest.raises(ValueError, match=r"'int8'.*torch finds no avx512_vnni.*; choose backend"):
        project(torch.ones(1, 10), _spec(10, 8), backend="int8")


def test_a_torch_that_would_not_use_vnni_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _flags(monkeypatch, avx512_vnni=True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="built without oneDNN"):
        choose_backend(_spec(10, 8), CPU, "int8")


def test_another_device_and_another_method_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'int8'.*the device is cuda; choose backend=None"):
        choose_backend(_spec(10, 8), torch.device("cuda"), "int8")
    methods: tuple[Any, ...] = ("gaussian", "sjlt")
    for method in methods:
        with pytest.raises(ValueError, match=f"'int8' does rademacher, not method='{method}'"):
            choose_backend(ProjectionSpec(method, p=10, d=8), CPU, "int8")
