"""Parameters that a model's code works with outside of the calls that hooks see.

A layer's gradient is read from its calls. Where a model also multiplies with the layer's weight by
itself (an output layer written as `hidden @ embedding.weight.T`), that part would be missing from
every row's gradient, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradstore.capture.dense import WatchedModule
from gradstore.capture.slots import ParameterSlot

#: What gives a tensor of which no gradient comes back.
_CUT = {"detach", "data"}


@contextmanager
def uses_elsewhere(
    watched: Sequence[WatchedModule], parameters: Mapping[ParameterSlot, nn.Parameter]
) -> Iterator[set[ParameterSlot]]:
    """Watch a forward; the slots that are worked with outside of the watched modules' calls.

    Args:
        watched: modules whose calls give gradients.
        parameters: by slot.

    Returns:
        A set that fills up as the forward goes on.
    """
    uses = _Uses(watched, parameters)
    with ExitStack() as stack:
        for each in watched:
            enter, leave = partial(uses.enter, each), partial(uses.leave, each)
            stack.callback(each.module.register_forward_pre_hook(enter).remove)
            hook = each.module.register_forward_hook(leave, always_call=True)
            stack.callback(hook.remove)
        stack.enter_context(uses)
        yield uses.found


class _Uses(TorchFunctionMode):
    """Sees every operation; knows in whose call it is."""

    def __init__(
        self, watched: Sequence[WatchedModule], parameters: Mapping[ParameterSlot, nn.Parameter]
    ) -> None:
        super().__init__()
        covered = {slot for each in watched for slot in each.slots.values()}
        self._slots = {id(parameters[slot]): slot for slot in covered}
        self._calls: list[WatchedModule] = []
        self.found: set[ParameterSlot] = set()

    def enter(self, watched: WatchedModule, *_: object) -> None:
        """Note that a module's call begins."""
        self._calls.append(watched)

    def leave(self, watched: WatchedModule, *_: object) -> None:
        """Note that it is over."""
        assert self._calls.pop() is watched

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what the operation returns
        result = func(*args, **(kwargs or {}))
        gives = any(isinstance(each, Tensor) for each in tree_leaves(result))
        if gives and torch.is_grad_enabled() and _name(func) not in _CUT:
            taken = map(id, tree_leaves((args, kwargs)))
            used = {self._slots[each] for each in taken if each in self._slots}
            self.found |= used.difference(*(call.slots.values() for call in self._calls))
        return result


def _name(func: Callable[..., Any]) -> str:
    """Return an operation's name, or that of the property that it gets."""
    name = getattr(func, "__name__", "")
    return str(func.__self__.__name__ if name == "__get__" else name)  # type: ignore[attr-defined]
