"""Per-sample gradients of a whole batch in one forward and backward, block by block.

All parameters are frozen, so autograd computes no weight gradients of its own. A forward hook on
each LoRA matrix keeps its input x (b, t, in) and watches its output's gradient g (b, t, out); the
rows' gradients are then the batched product gᵀx (b, out, in). That is the whole cost: everything
else is the plain forward and backward. Trainable parameters that are not LoRA matrices go through
`gradstore.capture.fallback`. A model without an adapter is watched at all its layers, and its
blocks come in parts: `gradstore.capture.dense`.

Letters: b batch, t tokens, p gradient length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gradstore.capture.adapters import (
    HookedModule,
    check_adapters,
    has_adapter,
    watched_linears,
)
from gradstore.capture.chosen import Modules, taken_slots
from gradstore.capture.dense import (
    DensePass,
    WatchedModule,
    part_elements,
    watched_modules,
    zero_parts,
)
from gradstore.capture.fallback import RowwiseGradients, tell_of_fallback
from gradstore.capture.hooks import HookedPass, Sink, Tap
from gradstore.capture.lora import fused_layers
from gradstore.capture.losses import BatchStats, RowLoss, Targets, target_losses
from gradstore.capture.modelstate import borrowed, without_autocast
from gradstore.capture.recomputing import SingleRows
from gradstore.capture.rows import of_first, one_more_row
from gradstore.capture.scaling import Unscaling, in_float16, row_scales, tell_overflow
from gradstore.capture.slots import ParameterSlot, unwrap
from gradstore.capture.uses import uses_elsewhere

#: Numbers of gradients (b, numel) that one further pass makes, of parameters of a model without an
#: adapter that no hook covers; a single parameter may have more.
FALLBACK_ELEMENTS = 1 << 26


class GradientCapture:
    """Per-sample gradients of every parameter that required grad when this was made.

    A context manager: inside it the model is frozen and in eval mode; on leaving, also by an
    exception, it is as it was.

    Args:
        model: a causal language model, possibly inside DDP or torch.compile; with LoRA adapters,
            or with any parameters that require grad.
        modules: linear | all | names of modules, which of these are taken of a model without an
            adapter (`gradstore.capture.chosen`).
        elements: numbers of a part of whole weights' gradients; None goes by the device.

    Attributes:
        slots: the layout of the flat gradient.
        p: its length.
        dense: the model has no adapter, and a sink gets parts of slots.
        left_out: names of parameters that require grad and are not taken.

    Raises:
        BadInput: nothing is trainable, or nothing of it is taken, or several adapters are active,
            or the adapter is merged into its base layer or disabled.
    """

    def __init__(
        self, model: nn.Module, modules: Modules = "all", *, elements: int | None = None
    ) -> None:
        self._model = unwrap(model)
        self._parameters, self.left_out = taken_slots(self._model, modules)
        self.slots: tuple[ParameterSlot, ...] = tuple(self._parameters)
        self.p = sum(slot.numel for slot in self.slots)
        check_adapters(self._model)
        self.dense = not has_adapter(self._model)
        self._watched: list[HookedModule] | list[WatchedModule]
        if self.dense:
            whole = self._watched = watched_modules(self._model, self._parameters)
            self._hooked = {slot for each in whole for slot in each.slots.values()}
        else:
            matrices = self._watched = watched_linears(self._model, self._parameters)
            self._hooked = {slot for each in matrices for slot in each.slots}
        device = next(iter(self._parameters.values())).device
        self._elements = part_elements(device) if elements is None else elements
        self._loss = RowLoss(self._model)
        self._rowwise = RowwiseGradients(self._model, self._loss)
        self._single = SingleRows(self._model)
        self._pass: HookedPass | DensePass | None = None
        self._note: Callable[[tuple[Tensor, ...]], None] | None = None
        self._looked = self._overflowed = False
        self._called: set[ParameterSlot] = set()
        self._told: set[ParameterSlot] = set()
        self._stack: ExitStack | None = None
        self._log_fallback(set(self.slots) - self._hooked)

    def __enter__(self) -> Self:
        """Freeze the model and hook what is watched."""
        if self._stack is not None:
            raise RuntimeError("this GradientCapture is already entered")
        with ExitStack() as stack:
            stack.enter_context(borrowed(self._model, freeze=True))
            if not self.dense:
                matrices = cast(list[HookedModule], self._watched)
                running = lambda: cast(HookedPass | None, self._pass)  # noqa: E731 - the one that is
                stack.enter_context(fused_layers(self._model, matrices, running))
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

        Of a `dense` model a slot comes in parts, each once; they are cut otherwise for another
        number of rows.

        Args:
            batch: inputs (b, t) of the model and `labels` (b, t), right-padded, one sample a row.
            sink: called inside the backward, as soon as a block exists.
            tap: called before it with what a LoRA matrix's block is made of, once for each call of
                the matrix; not called for parameters that hooks don't cover.

        A single row that does not fit into memory is computed with gradient checkpointing
        (`gradstore.capture.recomputing`); of several rows that memory ran out is told. In float16
        losses are scaled, and gradients handed on without (`gradstore.capture.scaling`).

        Returns:
            The rows' losses and target counts. A row without any target token has loss nan and a
            gradient of zeros. A row whose gradient is not finite leaves the others alone.

        Raises:
            BadInput: the batch has no labels, or parameters that no hook covers need rows by
                themselves and an input is not divided by row.
        """
        if self._stack is None:
            raise RuntimeError("capture() needs the context: `with GradientCapture(model) as c:`")
        targets = Targets.of(batch)
        rows, tokens = targets.grid
        if rows == tokens > 1:  # where shapes don't tell rows from tokens
            batch = one_more_row(batch, targets.grid)
            targets = Targets.of(batch)
            sink, tap = of_first(rows, sink), None if tap is None else of_first(rows, tap)
        half = None
        if in_float16(self._model, targets.counts.device):
            targets = targets.scaled(scale := row_scales(targets.counts))
            half = Unscaling(scale, sink, tap)
            sink, tap = half.sink, half.tap
        attempt = partial(self._captured, batch, targets)
        stats = self._single.take(attempt, sink, tap) if rows == 1 else attempt(sink, tap)
        if half is not None and not self._overflowed and (over := half.overflowed(stats.loss)):
            self._overflowed = True
            tell_overflow(over)
        return BatchStats(stats.loss[:rows], stats.target_tokens[:rows])

    def _captured(
        self, batch: Mapping[str, Tensor], targets: Targets, sink: Sink, tap: Tap | None
    ) -> BatchStats:
        """Take the blocks of one batch, see `capture`."""
        if len(targets.rows) == 0:
            for slot, parameter in self._parameters.items():
                self._zeros(slot, targets.grid[0], parameter.device, sink)
            none = torch.zeros(0, device=targets.counts.device)
            return BatchStats(targets.row_means(none), targets.counts)
        losses: Tensor | None = None
        covered: set[ParameterSlot] = set()
        if self._hooked:
            losses, covered = self._capture_hooked(batch, targets, sink, tap)
        rest = [slot for slot in self.slots if slot not in covered]
        for some in self._passes(rest, targets.grid[0]):
            losses = self._capture_rest(some, batch, targets, sink)
        assert losses is not None  # there is at least one slot
        return BatchStats(losses, targets.counts)

    def kept_bytes(self, batch: Mapping[str, Tensor]) -> tuple[int, int]:
        """Measure what one forward keeps for its backward, activations and logits' gradient.

        Args:
            batch: as for `capture`, with a target token.

        Returns:
            Bytes of everything, and of the largest tensor.
        """
        weights = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return x.detach()

        def note(args: tuple[Tensor, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                keep(args[0])

        targets = Targets.of(batch)
        with torch.no_grad():
            self._loss(batch, targets)  # the first may take two forwards
        self._pass, self._note = self._new_pass(targets, lambda *_: None), note
        try:
            with torch.enable_grad(), saved_tensors_hooks(keep, lambda x: x):
                graph = self._loss(batch, targets)
        finally:
            self._pass = self._note = None
        del graph
        return sum(kept.values()), max(kept.values(), default=0)

    def _capture_hooked(
        self, batch: Mapping[str, Tensor], targets: Targets, sink: Sink, tap: Tap | None
    ) -> tuple[Tensor, set[ParameterSlot]]:
        """Run one forward and backward of the whole batch.

        Returns:
            The rows' losses (b,), and the slots that were handed on.
        """
        self._pass = current = self._new_pass(targets, sink, tap)
        try:
            with torch.enable_grad(), self._look() as elsewhere:
                total, token_loss = self._loss(batch, targets)
            self._looked = True
            self._hooked -= {slot for slot in self._hooked if current.unfit(slot)} | elsewhere
            self._called |= {slot for slot in self._hooked if current.called(slot)}
            # Zeros where a slot takes no part this time, as an expert that no token is sent to;
            # one that was never called may be multiplied with otherwise.
            covered = self._hooked & self._called
            self._log_fallback(set(self.slots) - covered)
            current.await_only(covered)
            if total.requires_grad:
                with without_autocast(total.device):
                    total.backward()  # type: ignore[no-untyped-call]
            current.finish(self._parameters)
            return targets.row_means(token_loss), covered
        finally:
            self._pass = None
            current.close()

    def _new_pass(
        self, targets: Targets, sink: Sink, tap: Tap | None = None
    ) -> HookedPass | DensePass:
        if self.dense:
            return DensePass(targets, sink, self._elements)
        return HookedPass(targets, sink, tap)

    def _look(self) -> AbstractContextManager[set[ParameterSlot]]:
        """Watch the first forward for weights that are used outside of their layers' calls."""
        if self._looked or not self.dense:
            return nullcontext(set())
        return uses_elsewhere(cast(list[WatchedModule], self._watched), self._parameters)

    def _capture_rest(
        self, slots: list[ParameterSlot], batch: Mapping[str, Tensor], targets: Targets, sink: Sink
    ) -> Tensor:
        parameters = [self._parameters[slot] for slot in slots]
        blocks, losses = self._rowwise(parameters, batch, targets)
        for slot, block in zip(slots, blocks, strict=True):
            sink(slot, block)
        return losses

    @property
    def hooked(self) -> frozenset[ParameterSlot]:
        """Slots whose blocks come out of the backward, so far as is known; others come after it."""
        return frozenset(self._hooked)

    def further_elements(self, rows: int) -> int:
        """Count the numbers that a further pass over so many rows makes; 0 where there is none."""
        rest = [slot for slot in self.slots if slot not in self._hooked]
        return max((rows * sum(s.numel for s in some) for some in self._passes(rest, rows)),
                   default=0)  # fmt: skip

    def _passes(self, slots: list[ParameterSlot], rows: int) -> list[list[ParameterSlot]]:
        """Group slots that no hook covers by what one pass may make of them."""
        if not self.dense:
            return [slots] if slots else []
        groups: list[list[ParameterSlot]] = []
        room = 0
        for slot in slots:
            if not groups or rows * slot.numel > room:
                groups.append([])
                room = FALLBACK_ELEMENTS
            groups[-1].append(slot)
            room -= rows * slot.numel
        return groups

    def _zeros(self, slot: ParameterSlot, rows: int, device: torch.device, sink: Sink) -> None:
        if self.dense:
            zero_parts(slot, rows, device, self._elements, sink)
        else:
            sink(slot, torch.zeros(rows, slot.numel, device=device))

    def _observe(
        self,
        watched: HookedModule | WatchedModule,
        _module: nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        if self._pass is None or not torch.is_grad_enabled():
            return
        if self._note is not None:
            self._note(args)
        if isinstance(watched, WatchedModule):
            assert isinstance(self._pass, DensePass)
            self._pass.watch(watched, args, output)
        else:
            assert isinstance(self._pass, HookedPass)
            self._pass.watch(watched, args[0], output)

    def _log_fallback(self, slots: set[ParameterSlot]) -> None:
        tell_of_fallback(slots - self._told, "layers" if self.dense else "LoRA matrices")
        self._told |= slots


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
