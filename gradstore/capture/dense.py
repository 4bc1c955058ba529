"""Per-sample gradients of whole weights, some rows of a weight at a time.

The product gᵀx of a linear layer is (b, out, in), for b rows b times the layer itself. It is made
and handed on for a few outputs at a time, so that never more than `part_elements` numbers of it
exist. What it is made of, x (b, t, in) and g (b, t, out), waits until every call of the layer, and
of those tied to it, has had its gradient: a feature that is not linear needs the whole sum.

Letters: b batch, t tokens, s target positions of a batch, h hidden size.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from gradstore.capture.chosen import is_pointwise
from gradstore.capture.hooks import Sink
from gradstore.capture.losses import Targets
from gradstore.capture.row_sums import (
    Gathered,
    Outer,
    RowSum,
    Scattered,
    Whole,
    vector_gradients,
)
from gradstore.capture.slots import ParameterSlot

Kind = Literal["linear", "transposed", "embedding", "pointwise"]

#: Numbers of a gradient (b, rows, width) that are made at once: 8 MiB on a CPU, 256 on a GPU.
CPU_ELEMENTS, GPU_ELEMENTS = 1 << 21, 1 << 26


def part_elements(device: torch.device) -> int:
    """Return the numbers of a gradient that are made at once on a device."""
    return GPU_ELEMENTS if device.type == "cuda" else CPU_ELEMENTS


def rows_at_once(slot: ParameterSlot, batch_rows: int, elements: int) -> int:
    """Return how many rows of a slot are made at once for so many samples."""
    return max(1, elements // max(1, batch_rows * slot.width))


@dataclass(frozen=True)
class WatchedModule:
    """A module whose calls give the gradients of its own parameters.

    Attributes:
        module: the module.
        kind: how they do.
        slots: by the parameter's name in the module; without those that other modules share and
            no hook covers.
        is_head: it is the output layer, which may run on the target positions (1, s, h) alone.
    """

    module: nn.Module
    kind: Kind
    slots: Mapping[str, ParameterSlot]
    is_head: bool


def watched_modules(
    model: nn.Module, parameters: Mapping[ParameterSlot, nn.Parameter]
) -> list[WatchedModule]:
    """Find the modules that hooks can cover; a parameter that another module shares is left out."""
    slots = {id(parameter): slot for slot, parameter in parameters.items()}
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    found: list[tuple[nn.Module, Kind, dict[str, ParameterSlot]]] = []
    elsewhere: set[ParameterSlot] = set()
    for module in model.modules():
        own = {
            name: slots[id(parameter)]
            for name, parameter in module._parameters.items()
            if id(parameter) in slots
        }
        kind = _kind(module) if own else None
        if kind is None:
            elsewhere.update(own.values())
        else:
            found.append((module, kind, own))
    watched = [
        WatchedModule(
            module,
            kind,
            {name: slot for name, slot in own.items() if slot not in elsewhere},
            module is head,
        )
        for module, kind, own in found
    ]
    return [each for each in watched if each.slots]


def _kind(module: nn.Module) -> Kind | None:
    """Return how a module's gradients follow from its calls; None where that is not known."""
    forward = type(module).forward
    if isinstance(module, nn.Linear):
        return "linear" if forward is nn.Linear.forward else None
    if isinstance(module, nn.Embedding):
        plain = forward is nn.Embedding.forward and not module.scale_grad_by_freq
        return "embedding" if plain and module.max_norm is None else None
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return "transposed"  # GPT-2's linear layer, its weight (in, out)
    return "pointwise" if is_pointwise(module) else None


class DensePass:
    """One forward and backward: what was seen, what has arrived, what is still awaited.

    Args:
        targets: of the batch.
        sink: takes every slot in parts (`ParameterSlot.parts`), each as soon as it is complete.
        elements: numbers of a part (b, rows, width), at most, but one row of a parameter at least.
    """

    def __init__(self, targets: Targets, sink: Sink, elements: int) -> None:
        self._targets, self._sink, self._elements = targets, sink, elements
        self._rows = targets.grid[0]
        self._counts: list[int] = targets.counts.tolist()
        empty = targets.counts == 0
        self._empty = empty if bool(empty.any()) else None
        self._forward_is_over = self._inside = False
        self._wanted: set[ParameterSlot] = set()
        self._expected: Counter[ParameterSlot] = Counter()
        self._unfit: set[ParameterSlot] = set()
        self._held: defaultdict[ParameterSlot, list[RowSum]] = defaultdict(list)
        self._delivered: set[ParameterSlot] = set()

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

    def watch(self, watched: WatchedModule, args: tuple[object, ...], output: object) -> None:
        """Keep one call's input and wait for the gradient of its output."""
        if self._inside:
            return
        x = args[0] if len(args) == 1 else None
        fits = isinstance(x, Tensor) and isinstance(output, Tensor) and self._by_row(watched, x)
        if not fits:
            self._unfit.update(watched.slots.values())
            return
        assert isinstance(x, Tensor)
        assert isinstance(output, Tensor)
        if not output.requires_grad:
            output.requires_grad_(True)  # the lowest modules: nothing below them needs a gradient
        if self._forward_is_over:
            return
        self._expected.update(watched.slots.values())
        # Emptied on use: the graph holds its hooks to the end, the input is freed earlier.
        held = [x.detach()]
        output.register_hook(partial(self._arrive, watched, held))  # type: ignore[no-untyped-call]

    def _by_row(self, watched: WatchedModule, x: Tensor) -> bool:
        """Return whether an input keeps the batch's rows apart, in a way that is known."""
        if self._rows == 1 or self._gathered(watched, x):
            return True
        least = 2 if watched.kind == "embedding" else 3
        # By the tokens, too: as many images as rows need not be one a row. A norm may see them
        # behind the heads, (b, heads, t, width).
        rows, tokens = self._targets.grid
        if watched.kind == "pointwise":
            return x.dim() >= least and x.shape[0] == rows and tokens in x.shape[1:-1]
        return x.dim() >= least and x.shape[:2] == (rows, tokens)

    def _gathered(self, watched: WatchedModule, x: Tensor) -> bool:
        return watched.is_head and tuple(x.shape[:-1]) == (1, len(self._targets.rows))

    def _arrive(self, watched: WatchedModule, held: list[Tensor], gradient: Tensor) -> None:
        x = held.pop()
        if watched.kind == "pointwise":
            self._inside = True
            try:
                blocks = vector_gradients(
                    watched.module, watched.slots, self._of_rows(x), self._of_rows(gradient)
                )
            finally:
                self._inside = False
            sums: dict[str, RowSum] = {name: Whole(block) for name, block in blocks.items()}
        else:
            sums = self._sums(watched, x, gradient)
        for name, slot in watched.slots.items():
            if slot in self._wanted:
                self._held[slot].append(sums[name])
                self._expected[slot] -= 1
                if not self._expected[slot]:
                    self._emit(slot)

    def _sums(self, watched: WatchedModule, x: Tensor, gradient: Tensor) -> dict[str, RowSum]:
        """Say what a matrix's gradient, and its bias's, are made of."""
        if watched.kind == "embedding":
            assert isinstance(watched.module, nn.Embedding)
            flat = gradient.reshape(self._rows, -1, gradient.shape[-1])
            tokens = x.reshape(self._rows, -1)
            return {"weight": Scattered(tokens, flat, watched.module.padding_idx)}
        if self._rows > 1 and self._gathered(watched, x):
            x, gradient = x[0], gradient[0]
            sums: dict[str, RowSum] = {"weight": Gathered(gradient, x, self._counts)}
            if "bias" in watched.slots:
                each = [part.float().sum(0) for part in torch.split(gradient, self._counts)]
                sums["bias"] = Whole(torch.stack(each))
            return sums
        x = x.reshape(self._rows, -1, x.shape[-1])
        gradient = gradient.reshape(self._rows, -1, gradient.shape[-1])
        pair = (x, gradient) if watched.kind == "transposed" else (gradient, x)
        sums = {"weight": Outer(*pair)}
        if "bias" in watched.slots:
            sums["bias"] = Whole(gradient.sum(1, dtype=torch.float32))
        return sums

    def _of_rows(self, x: Tensor) -> Tensor:
        return x if x.shape[0] == self._rows else x.unsqueeze(0)

    def _emit(self, slot: ParameterSlot) -> None:
        """Hand a slot on, part by part; what it was made of is let go of."""
        sums = self._held.pop(slot)
        self._delivered.add(slot)
        for part in slot.parts(rows_at_once(slot, self._rows, self._elements)):
            low = (part.start - slot.start) // slot.width
            high = low + part.numel // slot.width
            block = sums[0].rows(low, high)
            for other in sums[1:]:
                block = block + other.rows(low, high)
            flat = block.reshape(self._rows, -1)
            if self._empty is not None:
                flat[self._empty] = 0.0  # 0 times inf would be nan
            self._sink(part, flat)

    def finish(self, parameters: Mapping[ParameterSlot, nn.Parameter]) -> None:
        """Emit the remaining slots: the sums of some calls if they affected the loss, else zeros.

        Args:
            parameters: by slot; say on which device zeros are made.
        """
        for slot in sorted(self._wanted - self._delivered, key=lambda slot: slot.start):
            if slot in self._held:
                self._emit(slot)
            else:
                zero_parts(slot, self._rows, parameters[slot].device, self._elements, self._sink)

    def close(self) -> None:
        """Release what waits."""
        self._held.clear()


def zero_parts(
    slot: ParameterSlot, batch_rows: int, device: torch.device, elements: int, sink: Sink
) -> None:
    """Hand a slot's parts on as zeros."""
    for part in slot.parts(rows_at_once(slot, batch_rows, elements)):
        sink(part, torch.zeros(batch_rows, part.numel, device=device))
