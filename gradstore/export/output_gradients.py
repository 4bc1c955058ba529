"""Each row's gradient by the model's output layer, from a forward pass alone, in a few numbers.

Where the output layer is W, logits = W x, the loss's derivative by x is W^T (softmax - one-hot): no
backward is needed. Its product with x, summed over a row's target tokens,

    G_i = sum_t  weight_t  (W^T e_t)  x_t^T          (h, h)

is the gradient of a square matrix put before the output layer, as LoRA there would see it. It is
projected on both sides, A G_i B with Gaussian A and B, to k x k numbers.

Letters: b batch, t tokens, s target positions, h hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.capture.losses import RowLoss, Targets
from gradstore.capture.modelstate import borrowed
from gradstore.capture.slots import unwrap
from gradstore.errors import BadInput
from gradstore.export.units import Batch

#: k of either side: 2 KB a row in float16.
SIDE = 32


class OutputGradients:
    """`Embed` of a row by its gradient at the output layer, (b, 1024); zeros without a target.

    Each call runs in evaluation mode without autograd, and gives every flag of the model back.

    Args:
        model: a causal language model whose output layer is linear.
        seed: of the two projections.

    Raises:
        BadInput: its output layer is something else.
    """

    dim = SIDE * SIDE

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._model = unwrap(model)
        get: Any = getattr(self._model, "get_output_embeddings", lambda: None)
        head = get()
        if not isinstance(head, nn.Linear):
            raise BadInput(
                f"the model's output layer is {type(head).__name__}, not linear: its rows have no "
                "gradient that a forward pass gives. Choose less or cluster_less."
            )
        self._head, self._rows = head, RowLoss(self._model)
        generator = torch.Generator().manual_seed(seed)
        width = head.weight.shape[1]
        self._sides = [
            torch.randn(width, SIDE, generator=generator) / math.sqrt(SIDE) for _ in range(2)
        ]

    def __call__(self, batch: Batch) -> Tensor:
        """Embed a batch with `labels` (b, t): (b, 1024) float32, of any length."""
        device = self._head.weight.device
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        targets, inputs = Targets.of(moved), []
        if len(targets.rows) == 0:
            return torch.zeros(targets.grid[0], self.dim, device=device)
        handle = self._head.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        try:
            with borrowed(self._model, freeze=False), torch.no_grad():
                logits = self._rows.logits(moved, targets)
        finally:
            handle.remove()
        at = targets.rows, targets.columns
        # In float32, also under autocast: errors of a learnt token are small differences.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            errors = logits.float().softmax(-1)
            errors[torch.arange(len(errors), device=device), targets.tokens] -= 1
            left, right = (side.to(device) for side in self._sides)
            by_input = errors @ (self._head.weight.float() @ left)
            seen = inputs[-1][at].float() @ right
            products = (by_input * targets.weights()[:, None])[:, :, None] * seen[:, None, :]
            found: Tensor = products.new_zeros(targets.grid[0], SIDE, SIDE)
            found.index_add_(0, targets.rows, products)
            return found.flatten(1)


def target_tokens(batch: Batch) -> Tensor:
    """Count the target tokens of each row, (b,)."""
    return Targets.of(batch).counts
