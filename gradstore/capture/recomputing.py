"""A single row that does not fit into memory: its layers are computed twice, and kept once.

With gradient checkpointing a layer keeps its input alone, and is computed again in the backward.
transformers' layers do so in training mode only, where dropout is active too. Here they are
checkpointed one call at a time, with the mode that makes them do so on the layer itself and only
until its forward begins: dropout stays off, and what is computed is what is computed without.

A pass that failed has handed on some of its blocks. They are right, so the pass that follows leaves
them out, and whoever takes the blocks sees each of them once.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, TypeVar
from weakref import WeakSet

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gradstore.capture.hooks import Sink, Tap
from gradstore.capture.limits import ran_out_of_memory, release_memory
from gradstore.capture.slots import ParameterSlot

Made = TypeVar("Made")

_log = logging.getLogger(__name__)

#: transformers' class of layers that can be checkpointed, which is not imported for its name.
_LAYER = "GradientCheckpointingLayer"


def checkpointable(model: nn.Module) -> list[Any]:
    """Find the layers of a model that transformers knows to checkpoint."""
    return [m for m in model.modules() if any(k.__name__ == _LAYER for k in type(m).__mro__)]


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint a model's layers, without the reentrant kind; they are given back as they were.

    Args:
        model: in eval mode, with layers that are `checkpointable`.
    """
    layers = checkpointable(model)
    keys = ("gradient_checkpointing", "_gradient_checkpointing_func", "training")
    before = [{key: vars(layer)[key] for key in keys if key in vars(layer)} for layer in layers]
    try:
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(_twice, layer)
        yield
    finally:
        for layer, held in zip(layers, before, strict=True):
            for key in keys:
                vars(layer).pop(key, None)
            vars(layer).update(held)


def _twice(layer: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:  # noqa: ANN401
    """Run a layer's forward, and again in the backward, both in eval mode."""

    def run(*given: Any) -> Any:  # noqa: ANN401 - whatever the layer returns
        layer.training = False  # some layers drop out by themselves
        try:
            return forward(*given)
        finally:
            layer.training = True

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


class SingleRows:
    """Passes over batches of one row, which checkpoint once one has run out of memory.

    Args:
        model: outside of wrappers. That one of its rows did not fit is remembered with it, so
            that a later capture does not run out again.
    """

    _tight: ClassVar[WeakSet[nn.Module]] = WeakSet()

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def take(
        self, attempt: Callable[[Sink, Tap | None], Made], sink: Sink, tap: Tap | None
    ) -> Made:
        """Take a row's gradients, checkpointed where memory ran out.

        Args:
            attempt: makes one forward and backward, and hands blocks on as it goes.
            sink: gets each block once, whichever attempt made it.
            tap: the same of what blocks are made of.

        Raises whatever `attempt` does; that memory ran out, if the model has no layers to
        checkpoint, or that did not help, or it ran out in `sink` or `tap`.
        """
        if self._model in self._tight:
            with checkpointed(self._model):
                return attempt(sink, tap)
        once = _Once(sink, tap)
        try:
            return attempt(once.sink, once.tap)
        except (MemoryError, RuntimeError) as error:
            if once.inside or not ran_out_of_memory(error) or not checkpointable(self._model):
                raise
        self._tight.add(self._model)
        _log.warning(
            "out of memory in a single row: from here on, batches of one row are computed with "
            "gradient checkpointing, which takes less memory and a forward more; gradients are "
            "the same (a lower cutoff_len avoids it)"
        )
        release_memory()
        once.again()
        with checkpointed(self._model):
            return attempt(once.sink, once.tap)


class _Once:
    """Hands each block on once, over two attempts at the same row.

    Attributes:
        inside: one of the receivers failed, which may have taken a part.
    """

    def __init__(self, sink: Sink, tap: Tap | None) -> None:
        self._sink, self._tap = sink, tap
        self.tap = None if tap is None else self._seen
        self.inside = False
        self._delivered: set[tuple[int, int]] = set()
        self._tapped: Counter[ParameterSlot] = Counter()
        self._passed: Counter[ParameterSlot] = Counter()

    def again(self) -> None:
        """Begin the second attempt."""
        self._passed, self._tapped = self._tapped, Counter()

    def sink(self, slot: ParameterSlot, block: Tensor) -> None:
        """Hand a slot's block, or a part's, on."""
        key = slot.start, slot.numel
        if key not in self._delivered:
            self.inside = True
            self._sink(slot, block)
            self.inside = False
            self._delivered.add(key)

    def _seen(self, slot: ParameterSlot, x: Tensor, gradient: Tensor) -> None:
        """Show one call of a matrix, the n-th of the backward."""
        assert self._tap is not None
        self._tapped[slot] += 1
        if self._tapped[slot] > self._passed[slot]:
            self.inside = True
            self._tap(slot, x, gradient)
            self.inside = False
