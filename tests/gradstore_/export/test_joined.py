"""Blocks of neighbouring slots become runs: a few large blocks of one feature each."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gradstore.capture.slots import ParameterSlot
from gradstore.export import joined
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.joined import JoiningSink, Run, runs_of
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments


def layout(sizes: list[int]) -> list[ParameterSlot]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        ParameterSlot(f"w{i}", (size,), start, size)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def moments_of(slots: list[ParameterSlot], steps: list[int]) -> AdamMoments:
    generator = torch.Generator().manual_seed(0)
    return AdamMoments({
        slot.name: ParameterMoments(
            torch.randn(slot.shape, generator=generator),
            torch.rand(slot.shape, generator=generator),
            AdamConstants(0.9, 0.999, 1e-8, step),
        )
        for slot, step in zip(slots, steps, strict=True)
    })  # fmt: skip


def test_runs_are_neighbours_of_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot of that size is one by itself, and is not copied."""
    monkeypatch.setattr(joined, "RUN_PARAMETERS", 10)
    slots = layout([4, 5, 1, 30, 2, 3, 10])
    runs = runs_of(slots, FeatureMap(FeatureSpec("sgd"), slots, None), slots)
    assert [[slot.name for slot in run.slots] for run in runs] == [
        ["w0", "w1", "w2"], ["w3"], ["w4", "w5"], ["w6"],
    ]  # fmt: skip
    assert [(run.start, run.stop) for run in runs] == [(0, 10), (10, 40), (40, 45), (45, 55)]


def test_a_run_waits_for_no_slot_that_comes_after_the_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As magnitudes of DoRA do, one between every two matrices; the whole gradient would wait."""
    monkeypatch.setattr(joined, "RUN_PARAMETERS", 10)
    slots = layout([2, 3, 1, 2, 3, 1])
    hooked = [slot for slot in slots if slot.numel > 1]
    runs = runs_of(slots, FeatureMap(FeatureSpec("sgd"), slots, None), hooked)
    assert [[slot.numel for slot in run.slots] for run in runs] == [[2, 3], [1], [2, 3], [1]]


@pytest.mark.parametrize("kind", ["adam", "adam_marginal"])
def test_a_run_has_one_feature_that_gives_what_its_slots_give(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where parameters have had other numbers of steps, which are corrected for."""
    monkeypatch.setattr(joined, "RUN_PARAMETERS", 6)
    slots = layout([4, 5, 3, 2, 5])
    moments = moments_of(slots, [3, 3, 3, 8, 8])
    spec = FeatureSpec(kind, bias_correction=True)  # type: ignore[arg-type]
    apart, together = (FeatureMap(spec, slots, moments) for _ in range(2))
    runs = runs_of(slots, together, slots)
    assert [len(run.slots) for run in runs] == [2, 1, 2]
    gradient = torch.randn(3, 19, generator=torch.Generator().manual_seed(1))
    expected = torch.cat(
        [apart.apply_(s, gradient[:, s.start : s.start + s.numel].clone()) for s in slots], dim=1
    )
    for run in runs:
        assert run.feature is not None
        found = run.feature.apply_(gradient[:, run.start : run.stop].clone())
        assert torch.equal(found, expected[:, run.start : run.stop])
        whole = run.feature.base
        for slot in run.slots:  # as it was, and in the run's memory
            own = together.of(slot)
            assert own is not None
            assert own.base is not None
            assert whole is not None
            assert own.base.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
            block = gradient[:, slot.start : slot.start + slot.numel].clone()
            stop = slot.start + slot.numel
            assert torch.equal(own.apply_(block), expected[:, slot.start : stop])


def test_runs_cut_again_are_in_the_memory_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joined, "RUN_PARAMETERS", 6)
    slots = layout([4, 5, 9, 2])
    features = FeatureMap(FeatureSpec("adam"), slots, moments_of(slots, [3] * 4))
    first, second = (runs_of(slots, features, slots) for _ in range(2))
    assert [len(run.slots) for run in first] == [2, 1, 1]
    for run, again in zip(first, second, strict=True):
        assert run.feature is again.feature


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_blocks_in_any_order_are_handed_on_once_and_in_the_layout_s(
    sizes: list[int], data: st.DataObject
) -> None:
    slots = layout(sizes)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes)), max_size=3)) | {0, len(sizes)})
    runs = [Run(tuple(slots[a:b]), None) for a, b in itertools.pairwise(cuts)]
    whole = torch.arange(2 * sum(sizes)).reshape(2, -1)
    found = torch.full_like(whole, -1)

    def take(run: Run, block: Tensor) -> None:
        assert (found[:, run.start : run.stop] == -1).all()
        found[:, run.start : run.stop] = block

    sink = JoiningSink(runs, take)
    for slot in data.draw(st.permutations(slots)):
        sink(slot, whole[:, slot.start : slot.start + slot.numel])
    assert torch.equal(found, whole)


def test_a_block_that_is_a_run_is_not_copied() -> None:
    (slot,) = layout([4])
    taken: list[Tensor] = []
    block = torch.ones(2, 4)
    JoiningSink([Run((slot,), None)], lambda _, given: taken.append(given))(slot, block)
    assert taken[0] is block
