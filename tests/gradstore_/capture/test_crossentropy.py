"""The fused cross-entropy against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gradstore.capture import crossentropy
from gradstore.capture.crossentropy import weighted_cross_entropy


def _reference(
    logits: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    leaf = logits.detach().double().requires_grad_(True)
    losses = F.cross_entropy(leaf, tokens, reduction="none")
    total = (losses * weights.double()).sum()
    total.backward()
    assert leaf.grad is not None
    return total.detach(), losses.detach(), leaf.grad


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 64), (33, 101)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("elements", [1, 303, 1 << 18])
def test_sum_losses_and_gradient_equal_the_definition(
    shape: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crossentropy, "_CPU_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(sum(shape))
    logits = (5 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_(True)
    tokens = torch.randint(shape[1], shape[:1], generator=generator)
    weights = torch.rand(shape[0], generator=generator)
    total, losses = weighted_cross_entropy(logits, tokens, weights)
    (scale * total).backward()
    expected_total, expected_losses, expected_gradient = _reference(logits, tokens, weights)
    tight = {"rtol": 1e-5, "atol": 1e-6}
    loose = tight if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(total, expected_total.float(), **tight)
    torch.testing.assert_close(losses, expected_losses.float(), **tight)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.float(), scale * expected_gradient.float(), **loose)
    with torch.no_grad():
        again, _ = weighted_cross_entropy(logits, tokens, weights)
    torch.testing.assert_close(again, total.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("elements", [1, 303, 1 << 18])
def test_a_gradient_in_the_memory_of_the_logits_has_the_same_bits(
    dtype: torch.dtype, scale: float, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crossentropy, "_CPU_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1, 33, 8, generator=generator).to(dtype)
    matrix = (5 * torch.randn(101, 8, generator=generator)).to(dtype)
    tokens = torch.randint(101, (33,), generator=generator)
    weights = torch.rand(33, generator=generator)
    found = []
    for overwrites in (False, True):
        leaf = inputs.clone().requires_grad_(True)
        output = F.linear(leaf, matrix)
        values, arrived = output.detach().clone(), list[torch.Tensor]()
        output.register_hook(arrived.append)  # type: ignore[no-untyped-call]
        loss = weighted_cross_entropy(output.flatten(0, 1), tokens, weights, overwrites=overwrites)
        (scale * loss[0]).backward(retain_graph=True)
        assert leaf.grad is not None
        found.append((*loss, leaf.grad))
        assert (arrived[0].data_ptr() == output.data_ptr()) == overwrites
        assert torch.equal(output, values) != overwrites
    for apart, within in zip(*found, strict=True):
        assert torch.equal(apart, within)
    if scale != 1:  # the gradient has been scaled where it lies
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss[0].backward()


def test_an_unlikely_target_has_a_finite_loss_and_a_bad_position_stays_alone() -> None:
    logits = torch.zeros(4, 6)
    logits[0, 3] = 500.0  # the target's probability underflows
    logits[1, 2] = torch.nan
    logits[2, 4] = -torch.inf  # a token that can't be
    logits.requires_grad_(True)
    total, losses = weighted_cross_entropy(logits, torch.zeros(4, dtype=torch.long), torch.ones(4))
    total.backward()
    assert losses[0].item() == pytest.approx(500.0)
    assert torch.isnan(losses).tolist() == [False, True, False, False]
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all(dim=1).tolist() == [True, False, True, True]
