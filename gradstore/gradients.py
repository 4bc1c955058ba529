"""Per-sample gradients of a whole batch in one forward and backward, block by block.

All parameters are frozen, so autograd computes no weight gradients of its own. A forward hook on
each LoRA matrix keeps its input x (b, t, in) and watches its output's gradient g (b, t, out); the
rows' gradients are then the batched product gᵀx (b, out, in). That is the whole cost: everything
else is the plain forward and backward. Trainable parameters that are not LoRA matrices go through
`gradstore.fallback`.

Letters: b batch, t tokens, p gradient length.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from gradstore.errors import BadInput
from gradstore.fallback import RowwiseGradients
from gradstore.losses import BatchStats, RowLoss, Targets
from gradstore.modelstate import borrowed, without_autocast
from gradstore.slots import ParameterSlot, trainable_slots, unwrap

__all__ = ["BatchStats", "GradientCapture", "ParameterSlot", "Sink", "batch_losses"]

logger = logging.getLogger(__name__)

Sink = Callable[[ParameterSlot, Tensor], None]
"""Takes a slot and its gradient block (b, numel), float32, row-major; the block is the sink's."""

_LORA_MATRICES = ("lora_A", "lora_B")
_ADAPTER_PARTS = (*_LORA_MATRICES, "lora_embedding_A", "lora_embedding_B")


class GradientCapture:
    """Per-sample gradients of every parameter that required grad when this was made.

    A context manager: inside it the model is frozen and in eval mode; on leaving, also by an
    exception, it is as it was.

    Args:
        model: A causal language model with LoRA adapters (or other trainable parameters), possibly
            inside DDP or torch.compile.

    Attributes:
        slots: The layout of the flat gradient.
        p: Its length.

    Raises:
        BadInput: Nothing is trainable, or several adapters are active, or the adapter is merged
            into its base layer or disabled.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._parameters = trainable_slots(self._model)
        self.slots: tuple[ParameterSlot, ...] = tuple(self._parameters)
        self.p = sum(slot.numel for slot in self.slots)
        if not self.slots:
            raise BadInput("no parameter of the model requires grad: there is no gradient to take")
        _check_adapters(self._model)
        self._watched = _watched_linears(self._model, self._parameters)
        self._hooked = {slot for watched in self._watched for slot in watched.slots}
        self._loss = RowLoss(self._model)
        self._rowwise = RowwiseGradients(self._model, self._loss)
        self._pass: _Pass | None = None
        self._stack: ExitStack | None = None
        self._log_fallback(set(self.slots) - self._hooked)

    def __enter__(self) -> Self:
        """Freezes the model and hooks its LoRA matrices."""
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
        """Gives the model back as it was."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def capture(self, batch: Mapping[str, Tensor], sink: Sink) -> BatchStats:
        """Hands every slot's gradient block to `sink`, once each, in no particular order.

        Args:
            batch: Inputs (b, t) of the model and `labels` (b, t), right-padded, one sample a row.
            sink: Called inside the backward, as soon as a block exists.

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
                losses = self._capture_hooked(batch, targets, sink)
            rest = [slot for slot in self.slots if slot not in self._hooked]
            if rest:
                losses = self._capture_rest(rest, batch, targets, sink)
        assert losses is not None  # there is at least one slot
        return BatchStats(losses, targets.counts)

    def _capture_hooked(self, batch: Mapping[str, Tensor], targets: Targets, sink: Sink) -> Tensor:
        """One forward and backward of the whole batch; returns the rows' losses (b,)."""
        self._pass = current = _Pass(targets, sink)
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
        self, watched: _Watched, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if self._pass is not None and torch.is_grad_enabled():
            self._pass.watch(watched, args[0], output)

    def _log_fallback(self, slots: set[ParameterSlot]) -> None:
        if slots:
            names = sorted(slot.name for slot in slots)
            logger.info(
                "%d trainable parameters are not plain LoRA matrices (%s%s): their gradients take "
                "a further pass, row by row where the model cannot be vectorised",
                len(names),
                ", ".join(names[:3]),
                ", ..." if len(names) > 3 else "",
            )


@dataclass(frozen=True)
class _Watched:
    """A LoRA matrix and where its gradients go; a slot of another module if they are tied."""

    module: nn.Linear
    weight: ParameterSlot | None
    bias: ParameterSlot | None

    @property
    def slots(self) -> list[ParameterSlot]:
        return [slot for slot in (self.weight, self.bias) if slot is not None]


class _Pass:
    """One forward and backward: what was seen, what has arrived, what is still awaited."""

    def __init__(self, targets: Targets, sink: Sink) -> None:
        self._forward_is_over = False
        self._wanted: set[ParameterSlot] = set()
        self._sink: Sink | None = sink
        self._rows = targets.grid[0]
        empty = targets.counts == 0
        self._empty = empty if bool(empty.any()) else None
        self._expected: Counter[ParameterSlot] = Counter()
        self._unfit: set[ParameterSlot] = set()
        self._partial: dict[ParameterSlot, Tensor] = {}
        self._delivered: set[ParameterSlot] = set()
        self._ignored: Tensor | None = None

    def missed(self, slot: ParameterSlot) -> bool:
        """Whether hooks can't give this slot: never called, or with inputs mixed across rows."""
        return slot in self._unfit or not self._expected[slot]

    def await_only(self, slots: set[ParameterSlot]) -> None:
        """Ends the forward: what checkpointed layers compute again later is not counted."""
        self._wanted = slots
        self._forward_is_over = True

    def watch(self, watched: _Watched, x: Tensor, output: Tensor) -> None:
        """Keeps one call's input (b, ..., in) and waits for the gradient of its output."""
        if x is self._ignored or _is_identity(x):
            # DoRA multiplies its matrices by calling them on an identity, and detaches the result.
            self._ignored = output
            return
        if self._rows > 1 and (x.dim() < 3 or x.shape[0] != self._rows):
            self._unfit.update(watched.slots)
            return
        if not output.requires_grad:
            output.requires_grad_(True)  # the lowest matrices: nothing below them needs a gradient
        if self._forward_is_over:
            return
        self._expected.update(watched.slots)
        # Emptied on use: the graph keeps its hooks to the end, the input need not live so long.
        held = [x.detach()]
        arrive = partial(self._arrive, watched, held)
        output.register_hook(arrive)  # type: ignore[no-untyped-call]

    def _arrive(self, watched: _Watched, held: list[Tensor], gradient: Tensor) -> None:
        x = held.pop().reshape(self._rows, -1, watched.module.in_features)
        gradient = gradient.reshape(self._rows, -1, watched.module.out_features)
        if watched.weight is not None and watched.weight in self._wanted:
            self._deliver(watched.weight, _row_products(gradient, x))
        if watched.bias is not None and watched.bias in self._wanted:
            self._deliver(watched.bias, gradient.sum(1, dtype=torch.float32))

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

    def finish(self, parameters: Mapping[ParameterSlot, nn.Parameter]) -> None:
        """Delivers what some call had no part in the loss of, zeros where none had."""
        for slot in self._wanted - self._delivered:
            block = self._partial.pop(slot, None)
            if block is None:
                block = torch.zeros(self._rows, slot.numel, device=parameters[slot].device)
            self._emit(slot, block)

    def close(self) -> None:
        """Lets go of the sink and of unfinished blocks."""
        self._sink = None
        self._partial.clear()
        self._ignored = None


def _row_products(gradient: Tensor, x: Tensor) -> Tensor:
    """Multiplies gᵀx row by row: (b, t, out), (b, t, in) -> (b, out * in) float32."""
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


def _check_adapters(model: nn.Module) -> None:
    """Raises BadInput unless every LoRA layer runs exactly one adapter, beside its base."""
    active: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(getattr(module, "lora_A", None), nn.ModuleDict):
            continue
        adapters = getattr(module, "active_adapters", ())
        active.update(adapters if isinstance(adapters, list | tuple) else ())
        if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
            raise BadInput(
                f"the adapter of {name} is merged into its base layer or disabled, so it has no "
                "gradient: unmerge and enable it first"
            )
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        for part in _ADAPTER_PARTS:
            if parameter.requires_grad and part in parts[:-1]:
                active.add(parts[parts.index(part) + 1])
    if len(active) > 1:
        raise BadInput(
            f"{len(active)} adapters are active or trainable ({', '.join(sorted(active))}); "
            "gradient features need exactly one: activate and train a single adapter"
        )


def _watched_linears(
    model: nn.Module, parameters: Mapping[ParameterSlot, nn.Parameter]
) -> list[_Watched]:
    """Finds the LoRA matrices that hooks can cover, leaving out tied ones they cover in part."""
    slots = {id(parameter): slot for slot, parameter in parameters.items()}
    found: list[_Watched] = []
    elsewhere: set[ParameterSlot] = set()
    for name, module in model.named_modules():
        own = {
            key: slots[id(parameter)]
            for key, parameter in module._parameters.items()
            if id(parameter) in slots
        }
        is_lora = len(parts := name.split(".")) > 1 and parts[-2] in _LORA_MATRICES
        if is_lora and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            if own:
                found.append(_Watched(module, own.get("weight"), own.get("bias")))
        else:
            elsewhere.update(own.values())
    return [
        _Watched(
            watched.module,
            None if watched.weight in elsewhere else watched.weight,
            None if watched.bias in elsewhere else watched.bias,
        )
        for watched in found
    ]


def batch_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> BatchStats:
    """Computes the rows' losses as `GradientCapture.capture` reports them, without gradients.

    Args:
        model: A causal language model; evaluated in eval mode, given back as it was.
        batch: Inputs (b, t) of the model and `labels` (b, t).
    """
    model = unwrap(model)
    targets = Targets.of(batch)
    with borrowed(model, freeze=False), torch.no_grad():
        if len(targets.rows) == 0:
            token_loss = torch.zeros(0, device=targets.counts.device)
        else:
            _, token_loss = RowLoss(model)(batch, targets)
    return BatchStats(targets.row_means(token_loss), targets.counts)
