"""The share of a row in a step, against real optimizer steps and every batch that there is."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, project_reference

from gradstore.capture.slots import ParameterSlot, trainable_slots
from gradstore.errors import BadInput
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments
from gradstore.export.projected import export_features
from gradstore.export.share import OptimizerStep, StepShare, expected_share
from gradstore.export.units import SAMPLE_ROWS, Batches

SHARE = StepShare(rows=8, max_grad_norm=1.0, tokens=10.0, norm=4.0)


def tokens_of(rows: list[dict[str, list[int]]]) -> np.ndarray:
    return np.array([sum(label != -100 for label in row["labels"][1:]) for row in rows])


def batches(llama: Any, rows: list[dict[str, list[int]]]) -> Batches:
    return Batches(rows, llama.collate, [len(row["input_ids"]) for row in rows], 60)


def test_a_rows_share_is_its_tokens_of_a_clipped_steps() -> None:
    assert SHARE.clip == 0.25
    found = SHARE.of(torch.tensor([0, 10, 30]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.25 / 8, 0.25 * 30 / 100]))


def test_a_row_alone_in_its_step_has_the_whole_share() -> None:
    alone = StepShare(rows=1, max_grad_norm=1.0, tokens=10.0, norm=4.0)
    torch.testing.assert_close(
        alone.of(torch.tensor([0, 3, 10, 400])), torch.tensor([0.0, 0.25, 0.25, 0.25])
    )


@pytest.mark.parametrize(("limit", "norm"), [(0.0, 4.0), (4.0, 4.0), (9.0, 4.0), (1.0, 0.0)])
def test_nothing_is_clipped_without_a_limit_or_below_it(limit: float, norm: float) -> None:
    assert StepShare(8, limit, 10.0, norm).clip == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_the_feature_is_what_a_real_step_makes_of_the_rows_share(seed: int) -> None:
    """AdamW's step on the row's share of a batch, less its step on a gradient of zero."""
    generator = torch.Generator().manual_seed(seed)
    p, rate = 40, 1e-2
    weight = torch.nn.Parameter(torch.randn(p, generator=generator, dtype=torch.float64))
    adam = torch.optim.AdamW([weight], lr=rate, weight_decay=0.0)
    for _ in range(7):
        weight.grad = torch.randn(p, generator=generator, dtype=torch.float64)
        adam.step()
    row = 5 * torch.randn(p, generator=generator, dtype=torch.float64)
    moments = AdamMoments.from_optimizer(adam, torch.nn.ParameterDict({"w": weight}))
    before, state = weight.detach().clone(), copy.deepcopy(adam.state_dict())

    def moved(gradient: torch.Tensor) -> torch.Tensor:
        adam.load_state_dict(copy.deepcopy(state))
        with torch.no_grad():
            weight.copy_(before)
        weight.grad = gradient.clone()
        adam.step()
        return weight.detach() - before

    # Seven others of ten tokens on average, this row of twelve; a norm of 4 is clipped to 1.
    share = 0.25 * 12 / 82
    real = moved(share * row) - moved(torch.zeros(p, dtype=torch.float64))
    spec = FeatureSpec("adam_share", "outside", bias_correction=True, share=SHARE)
    slot = ParameterSlot("w", (p,), 0, p)
    found = FeatureMap(spec, [slot], moments).apply_(
        slot, row.float()[None].clone(), torch.tensor([12])
    )
    torch.testing.assert_close(-rate * found[0].double(), real, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("rows_of_step", [1, 2, 3])
def test_the_expected_norm_is_the_mean_over_every_batch_of_the_sampled_rows(
    llama: Any, rows_of_step: int
) -> None:
    model, rows = llama.model(), llama.rows(6)
    gradients, tokens = llama.gradients(model, rows), torch.from_numpy(tokens_of(rows))
    weighted = gradients * (tokens / tokens.double().mean())[:, None]
    squares = [
        weighted[list(batch)].mean(dim=0).square().sum()
        for batch in combinations(range(len(rows)), rows_of_step)
    ]
    step = OptimizerStep(rows_of_step, 0.5)
    found = expected_share(model, batches(llama, rows).sample(0), step)
    assert found.norm == pytest.approx(float(torch.stack(squares).mean().sqrt()), rel=1e-5)
    assert found.tokens == pytest.approx(float(tokens.double().mean()))
    assert (found.rows, found.max_grad_norm) == (rows_of_step, 0.5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_sample_is_of_different_rows_by_lot_and_the_same_again(llama: Any) -> None:
    rows = llama.rows(3) * 200

    def drawn(seed: int) -> list[int]:
        return np.concatenate([part for part, _ in batches(llama, rows).sample(seed)]).tolist()

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(set(drawn(1))) == len(drawn(1)) == SAMPLE_ROWS


def test_a_row_that_is_not_finite_spoils_no_estimate(llama: Any) -> None:
    model, rows = llama.model(broken=True), llama.rows(4)
    alone = expected_share(model, batches(llama, rows).sample(0), OptimizerStep(2))
    rows[1]["input_ids"][-2] = llama.broken_token
    found = expected_share(model, batches(llama, rows).sample(0), OptimizerStep(2))
    assert 0 < found.norm < 2 * alone.norm


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
@pytest.mark.parametrize("size", [1, 4])
def test_every_row_is_exported_at_its_own_share(llama: Any, method: Any, size: int) -> None:
    model, rows = llama.model(), llama.rows(7)
    moments, tokens = llama.moments(model), torch.from_numpy(tokens_of(rows))
    gradients = llama.gradients(model, rows)
    scaled = (0.25 * (tokens / (tokens + 70))[:, None] * gradients).float()
    expected = by_hand(model, scaled, moments)
    spec = ProjectionSpec(method, p=gradients.shape[1], d=64, seed=2)
    parts = list(
        export_features(model, llama.batches(rows, size), projection=spec, moments=moments,
                        features=FeatureSpec("adam_share", share=SHARE))
    )  # fmt: skip
    norm = np.concatenate([part.norm for part in parts])
    np.testing.assert_allclose(norm, expected.norm(dim=1), rtol=1e-4)
    found = np.concatenate([part.features for part in parts])
    oracle = project_reference(expected, spec)
    assert np.linalg.norm(found - oracle) <= 1e-4 * np.linalg.norm(oracle)


def by_hand(model: Any, gradients: torch.Tensor, moments: Any) -> torch.Tensor:
    """(n, p) marginal steps of gradients as they are."""
    slots = list(trainable_slots(model))
    marginal = FeatureMap(FeatureSpec("adam_marginal"), slots, moments)
    spans = [(slot, slice(slot.start, slot.start + slot.numel)) for slot in slots]
    return torch.cat([marginal.apply_(s, gradients[:, at].clone()) for s, at in spans], dim=1)


def test_a_feature_that_needs_a_share_is_refused_without_one_or_without_tokens() -> None:
    slot = ParameterSlot("w", (2,), 0, 2)
    state = ParameterMoments(torch.zeros(2), torch.ones(2), AdamConstants(0.9, 0.999, 1e-8, 3))
    moments = AdamMoments({"w": state})
    for share, tokens in ((None, torch.tensor([3])), (SHARE, None)):
        needing = FeatureMap(FeatureSpec("adam_share", share=share), [slot], moments)
        with pytest.raises(BadInput, match=r"'adam_share' needs the rows of a step.*FeatureSpec"):
            needing.apply_(slot, torch.ones(1, 2), tokens)


@pytest.mark.parametrize(
    ("rows", "limit", "said"),
    [(0, 1.0, "rows of a step"), (8, -1.0, "max_grad_norm"), (8, float("nan"), "max_grad_norm")],
)
def test_an_impossible_step_is_refused(rows: int, limit: float, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        OptimizerStep(rows, limit)


def test_options_of_features_without_a_share_are_those_of_older_stores() -> None:
    assert FeatureSpec().options() == {
        "kind": "adam_marginal", "adam_eps_mode": "inside", "bias_correction": False,
    }  # fmt: skip
    kept = FeatureSpec("adam_share", share=SHARE).options()["share"]
    assert StepShare(**kept) == SHARE
