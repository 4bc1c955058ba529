"""Per-sample gradients of a whole batch in one forward and backward, block by block.

All parameters are frozen, so autograd computes no weight gradients of its own. A forward hook on
each LoRA matrix keeps its input x (b, t, in) and watches its output's gradient g (b, t, out); the
rows' gradients are then the batched product gᵀx (b, out, in). That is the whole cost: everything
else is the plain forward and backward. Trainable parameters that are not LoRA matrices go through
`gradstore.capture.fallback`.

Letters: b batch, t tokens, p gradient length.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from gradstore.capture.adapters import check_adapters, watched_linears
from gradstore.capture.fallback import RowwiseGradients
from gradstore.capture.hooks import HookedModule, HookedPass, Sink, Tap
from gradstore.capture.losses import BatchStats, RowLoss, Targets, target_losses
from gradstore.capture.modelstate import borrowed, without_autocast
from gradstore.capture.slots import ParameterSlot, trainable_slots, unwrap
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)


class GradientCapture:
    """Per-sample gradients of every parameter that required grad when this was made.

    A context manager: inside it the model is frozen and in eval mode; on leaving, also by an
    exception, it is as it was.

    Args:
        model: a causal language model with LoRA adapters (or other trainable parameters), possibly
            inside DDP or torch.compile.

    Attributes:
        slots: the layout of the flat gradient.
        p: its length.

    Raises:
        BadInput: nothing is trainable, or several adapters are active, or the adapter is merged
            into its base layer or disabled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._parameters = trainable_slots(self._model)
        self.slots: tuple[ParameterSlot, ...] = tuple(self._parameters)
        self.p = sum(slot.numel for slot in self.slots)
        if not self.slots:
            raise BadInput(
                "no parameter of the model requires grad: there is no gradient to take; "
                "add an adapter, or set requires_grad"
            )
        check_adapters(self._model)
        self._watched = watched_linears(self._model, self._parameters)
        self._hooked = {slot for watched in self._watched for slot in watched.slots}
        self._loss = RowLoss(self._model)
        self._rowwise = RowwiseGradients(self._model, self._loss)
        self._pass: HookedPass | None = None
        self._stack: ExitStack | None = None
        self._log_fallback(set(self.slots) - self._hooked)

    def __enter__(self) -> Self:
        """Freeze the model and hook its LoRA matrices."""
        if self._stack is not None:
            raise RuntimeError("this GradientCapture is already entered")
        with ExitStack() as stack:
            stack.enter_context(borrowed(self._model, freeze=True))
            for watched in self._watched:
                hook = partial(self._observe, watched)
                stack.callback(watched.module.register_forward_hook(hook).remove)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore the model's original state."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def capture(
        self, batch: Mapping[str, Tensor], sink: Sink, tap: Tap | None = None
    ) -> BatchStats:
        """Pass every slot's gradient block to `sink`, once each, in no particular order.

        Args:
            batch: inputs (b, t) of the model and `labels` (b, t), right-padded, one sample a row.
            sink: called inside the backward, as soon as a block exists.
            tap: called before it with what a LoRA matrix's block is made of, once for each call of
                the matrix; not called for parameters that hooks don't cover.

        Returns:
            The rows' losses and target counts. A row without any target token has loss nan and a
            gradient of zeros. A row whose gradient is not finite leaves the others alone.
        """
        if self._stack is None:
            raise RuntimeError("capture() needs the context: `with GradientCapture(model) as c:`")
        targets = Targets.of(batch)
        losses: Tensor | None = None
        if len(targets.rows) == 0:
            for slot, parameter in self._parameters.items():
                sink(slot, torch.zeros(targets.grid[0], slot.numel, device=parameter.device))
            losses = targets.row_means(torch.zeros(0, device=targets.counts.device))
        else:
            if self._hooked:
                losses = self._capture_hooked(batch, targets, sink, tap)
            rest = [slot for slot in self.slots if slot not in self._hooked]
            if rest:
                losses = self._capture_rest(rest, batch, targets, sink)
        assert losses is not None  # there is at least one slot
        return BatchStats(losses, targets.counts)

    def _capture_hooked(
        self, batch: Mapping[str, Tensor], targets: Targets, sink: Sink, tap: Tap | None
    ) -> Tensor:
        """Run one forward and backward of the whole batch; return the rows' losses (b,)."""
        self._pass = current = HookedPass(targets, sink, tap)
        try:
            with torch.enable_grad():
                total, token_loss = self._loss(batch, targets)
            missed = {slot for slot in self._hooked if current.missed(slot)}
            self._hooked -= missed
            self._log_fallback(missed)
            current.await_only(self._hooked)
            if total.requires_grad:
                with without_autocast(total.device):
                    total.backward()  # type: ignore[no-untyped-call]
            current.finish(self._parameters)
            return targets.row_means(token_loss)
        finally:
            self._pass = None
            current.close()

    def _capture_rest(
        self, slots: list[ParameterSlot], batch: Mapping[str, Tensor], targets: Targets, sink: Sink
    ) -> Tensor:
        parameters = [self._parameters[slot] for slot in slots]
        blocks, losses = self._rowwise(parameters, batch, targets)
        for slot, block in zip(slots, blocks, strict=True):
            sink(slot, block)
        return losses

    def _observe(
        self, watched: HookedModule, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if self._pass is not None and torch.is_grad_enabled():
            self._pass.watch(watched, args[0], output)

    def _log_fallback(self, slots: set[ParameterSlot]) -> None:
        if slots:
            names = sorted(slot.name for slot in slots)
            _log.info(
                "%d trainable parameters are not plain LoRA matrices (%s%s): their gradients take "
                "a further pass, row by row where the model cannot be vectorised",
                len(names),
                ", ".join(names[:3]),
                ", ..." if len(names) > 3 else "",
            )


def batch_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> BatchStats:
    """Compute the rows' losses as `GradientCapture.capture` reports them, without gradients.

    Args:
        model: a causal language model; evaluated in eval mode, given back as it was.
        batch: inputs (b, t) of the model and `labels` (b, t).
    """
    model = unwrap(model)
    targets = Targets.of(batch)
    with borrowed(model, freeze=False), torch.no_grad():
        token_loss = target_losses(model, batch, targets)
    return BatchStats(targets.row_means(token_loss), targets.counts)
