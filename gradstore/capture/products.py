"""Inner products of rows' gradients, with a direction and with each other, inside one backward.

No row's whole gradient is held: each LoRA matrix's block (b, numel) comes out of the backward, is
multiplied, and is gone. A block is the smaller thing to multiply here. For r = 16, rows of t = 512
tokens and in = 576, the products among b = 32 rows take 0.16 G multiplications with blocks made,
t * r * in a row and r * in a pair, and 160 G from inputs and output gradients alone ("ghost" dot
products of GREATS, t * t * (r + in) a pair).

Letters: n rows, b rows of a batch, p gradient length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot


@dataclass(frozen=True)
class RowProducts:
    """Products of the gradients of n rows.

    Attributes:
        dots: (n,) float64, with the direction; not finite where a row's gradient is not.
        gram: (n, n) float64, with each other; the diagonal holds squared lengths.
        target_tokens: (n,) int64; a row without any has a gradient of zeros.
    """

    dots: Tensor
    gram: Tensor
    target_tokens: Tensor


def row_products(
    capture: GradientCapture,
    batches: Sequence[Mapping[str, Tensor]],
    direction: Tensor,
    scale: Tensor | None = None,
) -> RowProducts:
    """Multiply rows' gradients with a direction and with each other, a backward for each batch.

    Of one batch nothing is kept. Of several, the gradients of all but the last are, in float32 on
    their device, because rows of later batches are multiplied with them.

    Args:
        capture: entered.
        batches: of rows, as for `GradientCapture.capture`; n rows in all.
        direction: (p,) float32 in the layout of `capture.slots`, on the model's device.
        scale: (p,) float32 that every gradient is multiplied with, coordinate by coordinate, such
            as `AdamMoments.step_scale`; None leaves gradients as they are.

    Returns:
        Products in the order of the rows.
    """
    sizes = [len(batch["input_ids"]) for batch in batches]
    n, starts = sum(sizes), [sum(sizes[:i]) for i in range(len(sizes))]
    dots = torch.zeros(n, dtype=torch.float64, device=direction.device)
    gram = torch.zeros(n, n, dtype=torch.float64, device=direction.device)
    held: list[tuple[slice, dict[ParameterSlot, Tensor]]] = []
    tokens = []
    for start, size, batch in zip(starts, sizes, batches, strict=True):
        rows = slice(start, start + size)
        blocks: dict[ParameterSlot, Tensor] = {}

        def sink(
            slot: ParameterSlot,
            block: Tensor,
            rows: slice = rows,
            blocks: dict[ParameterSlot, Tensor] = blocks,
        ) -> None:
            span = slice(slot.start, slot.start + slot.numel)
            if scale is not None:
                block = block * scale[span]
            dots[rows] += block @ direction[span]
            gram[rows, rows] += block @ block.T
            for earlier, theirs in held:
                crossed = (theirs[slot] @ block.T).double()
                gram[earlier, rows] += crossed
                gram[rows, earlier] += crossed.T
            if rows.stop < n:
                blocks[slot] = block

        tokens.append(capture.capture(batch, sink).target_tokens)
        held.append((rows, blocks))
    return RowProducts(dots, gram, torch.cat(tokens))
