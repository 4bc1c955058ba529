"""One forward and backward under watch: inputs kept on the way in, products made on the way out.

Letters: b batch, t tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gradstore.capture.adapters import HookedModule
from gradstore.capture.losses import Targets
from gradstore.capture.siblings import Place, Siblings
from gradstore.capture.slots import ParameterSlot

#: Takes a slot and its gradient block (b, numel), float32, row-major; the block is the sink's, and
#: its rows may lie apart in memory. Of whole weights the slot is a part of a parameter's, some of
#: its rows (`gradstore.capture.dense`).
Sink = Callable[[ParameterSlot, Tensor], None]
#: Takes a weight's slot and what its gradient is made of in one call of its module: the inputs
#: (b, t, in) and the gradient of the outputs (b, t, out), in the dtypes they came in. The factor of
#: a LoRA layer is with the gradients of B, or with its inputs (`gradstore.capture.lora`).
Tap = Callable[[ParameterSlot, Tensor, Tensor], None]


class HookedPass:
    """One forward and backward: what was seen, what has arrived, what is still awaited."""

    def __init__(self, targets: Targets, sink: Sink, tap: Tap | None = None) -> None:
        self._tap = tap
        self._forward_is_over = False
        self._wanted: set[ParameterSlot] = set()
        self._sink: Sink | None = sink
        self._rows, self._grid = targets.grid[0], targets.grid
        empty = targets.counts == 0
        self._empty = empty if bool(empty.any()) else None
        self._expected: Counter[ParameterSlot] = Counter()
        self._unfit: set[ParameterSlot] = set()
        self._partial: dict[ParameterSlot, Tensor] = {}
        self._delivered: set[ParameterSlot] = set()
        self._ignored: Tensor | None = None
        self._siblings = Siblings()

    def unfit(self, slot: ParameterSlot) -> bool:
        """Return whether hooks can't cover this slot: inputs mixed across rows, or of no row."""
        return slot in self._unfit

    def called(self, slot: ParameterSlot) -> bool:
        """Return whether gradients of this slot are awaited."""
        return self._expected[slot] > 0

    def await_only(self, slots: set[ParameterSlot]) -> None:
        """End the forward; what checkpointed layers recompute later is not counted."""
        self._wanted = slots
        self._forward_is_over = True

    def watch(self, watched: HookedModule, x: Tensor, output: Tensor) -> None:
        """Keep one call's input (b, ..., in) and wait for the gradient of its output."""
        if x is self._ignored or _is_identity(x):
            # DoRA multiplies its matrices by calling them on an identity, and detaches the result.
            self._ignored = output
            return
        if not self.fits(x):
            self._unfit.update(watched.slots)
            return
        if not output.requires_grad:
            output.requires_grad_(True)  # the lowest matrices: nothing below them needs a gradient
        if not self.expect(watched):
            return
        # Emptied on use: the graph holds its hooks to the end, the input is freed earlier.
        held = [x.detach()]

        def arrive(gradient: Tensor) -> None:
            self.arrive(held.pop(), gradient, watched)

        output.register_hook(arrive)  # type: ignore[no-untyped-call]

    def fits(self, x: Tensor) -> bool:
        """Return whether a call's input keeps the batch's rows apart."""
        # By the tokens, too: as many images as rows need not be one a row.
        return self._rows == 1 or (x.dim() >= 3 and x.shape[:2] == self._grid)

    def expect(self, *watched: HookedModule) -> bool:
        """Count a call of each module; False, and not counted, where a layer is recomputed."""
        if not self._forward_is_over:
            self._expected.update(slot for each in watched for slot in each.slots)
        return not self._forward_is_over

    def join(self, watched: HookedModule, x: Tensor, dtype: torch.dtype) -> Place:
        """Find the place of a call that was counted, beside others of its input.

        Args:
            watched: the module; without a bias.
            x: (b, ..., in), the very tensor that it was called with.
            dtype: that it computes in.
        """
        return self._siblings.join(watched, x, dtype)

    def arrive_beside(self, place: Place, x: Tensor, gradient: Tensor) -> None:
        """Take what one call's gradient is made of; deliver when its siblings' is there, too.

        Args:
            place: the call's.
            x: (b, ..., in), its input.
            gradient: (n, out), n tokens in all, of its output, in the memory that the place gave.
        """
        for product in self._siblings.arrive(place, x, gradient):
            self.arrive(product.x, product.gradient, *product.watched)

    def arrive(self, x: Tensor, gradient: Tensor, *watched: HookedModule) -> None:
        """Make the gradients of calls of one input that were expected, and deliver them.

        Args:
            x: (b, ..., in), or of one row with any first dimensions: the input.
            gradient: (b, ..., out), of the outputs side by side; a factor may be with either.
            watched: the modules, in the order of the outputs.
        """
        x = x.reshape(self._rows, -1, watched[0].module.in_features)
        widths = [each.module.out_features for each in watched]
        gradient = gradient.reshape(self._rows, -1, sum(widths))
        parts = torch.split(gradient, widths, dim=2)
        if any(each.weight in self._wanted for each in watched):
            sizes = [width * x.shape[2] for width in widths]
            blocks = torch.split(outer_sums(gradient, x), sizes, dim=1)
            for each, part, block in zip(watched, parts, blocks, strict=True):
                if each.weight is not None and each.weight in self._wanted:
                    if self._tap is not None:
                        self._tap(each.weight, x, part)
                    self._deliver(each.weight, block)
        for each, part in zip(watched, parts, strict=True):
            if each.bias is not None and each.bias in self._wanted:
                self._deliver(each.bias, part.sum(1, dtype=torch.float32))

    def _deliver(self, slot: ParameterSlot, block: Tensor) -> None:
        self._expected[slot] -= 1
        if slot in self._partial:
            block += self._partial.pop(slot)
        if self._expected[slot] > 0:
            self._partial[slot] = block
        else:
            self._emit(slot, block)

    def _emit(self, slot: ParameterSlot, block: Tensor) -> None:
        if self._empty is not None:
            block[self._empty] = 0.0  # 0 times inf would be nan
        self._delivered.add(slot)
        assert self._sink is not None  # only close() removes it, after the backward
        self._sink(slot, block)

    @torch.no_grad()
    def finish(self, parameters: Mapping[ParameterSlot, nn.Parameter]) -> None:
        """Emit the remaining slots: partial sums if some calls affected the loss, zeros if none."""
        for product in self._siblings.rest():
            self.arrive(product.x, product.gradient, *product.watched)
        for slot in sorted(self._wanted - self._delivered, key=lambda slot: slot.start):
            block = self._partial.pop(slot, None)
            if block is None:
                block = torch.zeros(self._rows, slot.numel, device=parameters[slot].device)
            self._emit(slot, block)

    def close(self) -> None:
        """Release the sink, the tap and unfinished blocks."""
        self._sink = self._tap = None
        self._partial.clear()
        self._siblings = Siblings()
        self._ignored = None


def outer_sums(gradient: Tensor, x: Tensor) -> Tensor:
    """Multiply gᵀx row by row: (b, t, out), (b, t, in) -> (b, out * in) float32."""
    left = gradient.transpose(1, 2)
    if gradient.dtype == torch.float32 == x.dtype:
        product = torch.bmm(left, x)
    elif gradient.is_cuda and gradient.dtype in (torch.bfloat16, torch.float16):
        # Under autocast x is still float32; the forward has used it in the gradient's dtype.
        product = torch.bmm(left, x.to(gradient.dtype), out_dtype=torch.float32)
    else:
        product = torch.bmm(left.float(), x.float())
    return product.reshape(product.shape[0], -1)


def _is_identity(x: Tensor) -> bool:
    if x.dim() != 2 or x.shape[0] != x.shape[1]:
        return False
    return torch.equal(x, torch.eye(x.shape[0], dtype=x.dtype, device=x.device))
