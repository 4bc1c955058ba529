"""The gradient's layout: which parameters, in which order, under which names."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from gradstore.errors import expect


@dataclass(frozen=True)
class ParameterSlot:
    """One parameter's place in the flat gradient of length p.

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


def trainable_slots(model: nn.Module) -> dict[ParameterSlot, nn.Parameter]:
    """List the parameters that require grad, in `named_parameters()` order, tied ones once."""
    slots: dict[ParameterSlot, nn.Parameter] = {}
    start = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            slot = ParameterSlot(
                parameter_name(name), tuple(parameter.shape), start, parameter.numel()
            )
            slots[slot] = parameter
            start += slot.numel
    return slots
