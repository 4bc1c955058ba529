"""The gradient's layout: which parameters, in which order, under which names."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradstore.errors import expect


@dataclass(frozen=True)
class ParameterSlot:
    """One parameter's place in the flat gradient of length p, or that of some of its rows.

    Attributes:
        name: the parameter's name, without the prefixes of DDP and torch.compile.
        shape: the parameter's shape; its gradient is laid out row-major.
        start: first index in the flat gradient.
        numel: how many indices it takes.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int

    @property
    def width(self) -> int:
        """Indices of one row, along the first dimension."""
        return self.numel // self.shape[0] if self.shape and self.shape[0] else 1

    def parts(self, rows: int) -> Iterator[ParameterSlot]:
        """Cut the slot into parts of so many rows each, in order; the last may have fewer.

        Examples:
            >>> [part.start for part in ParameterSlot("w", (5, 3), 10, 15).parts(2)]
            [10, 16, 22]
        """
        total = self.numel // self.width
        for low in range(0, total, rows):
            count = min(rows, total - low)
            shape = (count, *self.shape[1:]) if self.shape else ()
            yield ParameterSlot(self.name, shape, self.start + low * self.width, count * self.width)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DataParallel and torch.compile wrappers."""
    expect(isinstance(model, nn.Module), "model", model, "a torch module")
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def parameter_name(name: str) -> str:
    """Strip leading `module.` and every `_orig_mod.` from a parameter's name.

    Examples:
        >>> parameter_name("module._orig_mod.layers.0._orig_mod.weight")
        'layers.0.weight'
    """
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def trainable_slots(
    model: nn.Module, without: Container[int] = ()
) -> dict[ParameterSlot, nn.Parameter]:
    """List the parameters that require grad, in `named_parameters()` order, tied ones once.

    Args:
        model: the model, outside of wrappers.
        without: `id` of parameters that are left out.
    """
    slots: dict[ParameterSlot, nn.Parameter] = {}
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in without:
            slot = ParameterSlot(
                parameter_name(name), tuple(parameter.shape), start, parameter.numel()
            )
            slots[slot] = parameter
            start += slot.numel
    return slots
