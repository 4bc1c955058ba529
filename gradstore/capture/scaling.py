"""Scaled losses, where gradients are computed in float16, of which the small ones would vanish.

A row's loss is a mean: of 1,000 target tokens each gives 0.001 of its gradient, spread over the
vocabulary and then over layers. float16 has full precision from 6e-5 and nothing below 6e-8. So a
row's loss is multiplied by a power of two, and its gradient divided by it again, in float32. The
factor is the row's own: neither its neighbours nor its length matter to how much is lost.

Letters: b batch, t tokens.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from gradstore.capture.hooks import Sink, Tap
from gradstore.capture.slots import ParameterSlot

_log = logging.getLogger(__name__)

#: A target token's part of the scaled loss, at most, and more than half of it. A trainer's scaler
#: begins with as much, 2^16 of the mean over 1,024 tokens of a step. Gradients may be 1,000 times
#: as large in the layers below before they overflow, and a millionth before they lose digits.
TOKEN_SCALE = 64.0


def in_float16(model: nn.Module, device: torch.device) -> bool:
    """Return whether a model computes in float16: under autocast now, or by its weights."""
    half = torch.float16
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == half:
        return True
    return any(parameter.dtype == half for parameter in model.parameters())


def row_scales(counts: Tensor) -> Tensor:
    """Compute the power of two for each row's loss, (b,) float32, from its target tokens (b,).

    Examples:
        >>> row_scales(torch.tensor([0, 1, 2, 3, 1000])).tolist()
        [64.0, 64.0, 128.0, 128.0, 32768.0]
    """
    counts = counts.clamp(min=1).float()
    # m 2^e with m in [0.5, 1): the division leaves 2^(e - 1), exactly.
    return TOKEN_SCALE * counts / (2 * torch.frexp(counts).mantissa)


class Unscaling:
    """Hands on what a backward of scaled losses makes, divided by each row's scale.

    A row whose gradient passes float16's 65,504 on its way is not finite, as it would be in a step
    that a trainer's scaler then leaves out: it counts as such in a store, and a warning says why.

    Args:
        scale: (b,) float32.
        sink: takes blocks.
        tap: takes what they are made of.
    """

    def __init__(self, scale: Tensor, sink: Sink, tap: Tap | None) -> None:
        self._scale, self._sink, self._tap = scale, sink, tap
        self.tap = None if tap is None else self._show
        self._finite = torch.ones_like(scale, dtype=torch.bool)

    def sink(self, slot: ParameterSlot, block: Tensor) -> None:
        """Take a block (b, numel) float32."""
        block.div_(self._scale.to(block.device)[:, None])
        self._finite &= torch.isfinite(block).all(dim=1).to(self._finite.device)
        self._sink(slot, block)

    def _show(self, slot: ParameterSlot, x: Tensor, gradient: Tensor) -> None:
        """Show one call of a matrix: inputs (b, t, in) and output gradients (b, t, out)."""
        assert self._tap is not None
        self._tap(slot, x, gradient.float() / self._scale.to(gradient.device)[:, None, None])

    def overflowed(self, loss: Tensor) -> int:
        """Count the rows, of losses (b,), whose gradients alone are not finite."""
        return int((torch.isfinite(loss) & ~self._finite).sum())


def tell_overflow(rows: int) -> None:
    """Warn of rows that overflowed."""
    _log.warning(
        "gradients of %d rows overflow float16 at a scale of %d for each target token, though "
        "their losses are finite: they count as not finite (bf16 in place of fp16 has room for "
        "them)", rows, int(TOKEN_SCALE),
    )  # fmt: skip
