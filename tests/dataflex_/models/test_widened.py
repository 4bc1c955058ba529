"""A float64 model that asks for float32 in its middle."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dataflex.models.widened import Widened

X = torch.linspace(-2, 3, 12, dtype=torch.float64).view(3, 4)


class Norm(nn.Module):
    """A norm and a softmax as transformers writes them."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        weights = nn.functional.softmax(x.float(), dim=-1, dtype=torch.float32)
        return (weights * torch.arange(4).float()).to(dtype=kind)


def test_nothing_is_rounded_to_float32_on_the_way() -> None:
    exact = X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True) + 1e-6)
    expected = exact.softmax(-1) * torch.arange(4).double()
    assert (Norm()(X) - expected).abs().max() > 1e-9
    with Widened():
        torch.testing.assert_close(Norm()(X), expected, rtol=1e-15, atol=1e-15)


def test_a_small_difference_quotient_agrees_with_the_derivative() -> None:
    at = X.clone().requires_grad_()
    with Widened():
        (slope,) = torch.autograd.grad(Norm()(at).sum(), at)
        step = torch.zeros_like(X)
        step[1, 2] = 1e-5
        quotient = (Norm()(X + step).sum() - Norm()(X - step).sum()) / 2e-5
    torch.testing.assert_close(quotient, slope[1, 2], rtol=1e-7, atol=1e-10)
