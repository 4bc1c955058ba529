"""Weighted token cross-entropy whose gradient is made while the logits are in cache.

Softmax, loss and gradient of a few positions at a time take one pass over memory where autograd's
own chain (log-softmax, its backward, the scattered ones) takes five. Logits that nobody else reads
make room for their gradient: the largest tensor of a pass exists once.

Letters: s positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Elements of the logits that are worked on at once: 1 MiB on a CPU, all of them on a GPU.
_CPU_ELEMENTS = 1 << 18
_GPU_ELEMENTS = 1 << 28


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - autograd's context has no public type
        logits: Tensor,
        tokens: Tensor,
        weights: Tensor,
        overwrites: bool,
    ) -> tuple[Tensor, Tensor]:
        positions, vocabulary = logits.shape
        ctx.overwrites, gradient = overwrites, None
        if ctx.needs_input_grad[0]:
            gradient = logits.detach() if overwrites else torch.empty_like(logits)
        losses = torch.empty(positions, device=logits.device)
        limit = _GPU_ELEMENTS if logits.is_cuda else _CPU_ELEMENTS
        step = max(1, min(positions, limit // vocabulary))
        in_place = gradient is not None and logits.dtype == torch.float32
        work = None if in_place else torch.empty(step, vocabulary, device=logits.device)
        for start in range(0, positions, step):
            span = slice(start, start + step)
            chunk = logits[span]
            target = tokens[span].unsqueeze(1)
            source = gradient if work is None else work
            assert source is not None
            odds = source[span] if work is None else source[: chunk.shape[0]]
            peak = chunk.amax(1, keepdim=True).float()
            torch.sub(chunk, peak, out=odds)
            chosen = odds.gather(1, target)
            total = odds.exp_().sum(1, keepdim=True)
            losses[span] = (total.log() - chosen).squeeze(1)
            if gradient is not None:
                weight = weights[span].unsqueeze(1)
                odds.mul_(weight / total).scatter_add_(1, target, -weight)
                if work is not None:
                    gradient[span] = odds
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        (gradient,) = ctx.saved_tensors
        scale = upstream[0]
        # A pass over all logits saved; on a GPU to look at the value would cost more than the pass.
        if not scale.is_cuda and scale.item() == 1.0:
            return gradient, None, None, None
        scale = scale.to(gradient.dtype)
        # In place a second backward of the same graph is refused by autograd.
        return gradient.mul_(scale) if ctx.overwrites else gradient * scale, None, None, None


def weighted_cross_entropy(
    logits: Tensor, tokens: Tensor, weights: Tensor, *, overwrites: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute the weighted sum of token losses, and the losses.

    Args:
        logits: (s, V), any floating dtype; computed with in float32.
        tokens: (s,) int64, the classes.
        weights: (s,) float32.
        overwrites: the gradient, if one is wanted, is made in the logits' memory. Only of logits
            that nothing reads afterwards, what made them included.

    Returns:
        The sum, a float32 scalar with a gradient for `logits`, and (s,) float32 losses without.
    """
    total, losses = _WeightedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, tokens, weights, overwrites
    )
    return total, losses
