"""Detection of the adapter a model trains, and of its matrices that hooks can cover.

Known by names and module types alone: `gradstore` does not import peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput

_LORA_MATRICES = ("lora_A", "lora_B")
_ADAPTER_PARTS = (*_LORA_MATRICES, "lora_embedding_A", "lora_embedding_B")


@dataclass(frozen=True)
class HookedModule:
    """A LoRA matrix and where its gradients go; a slot of another module if they are tied."""

    module: nn.Linear
    weight: ParameterSlot | None
    bias: ParameterSlot | None

    @property
    def slots(self) -> list[ParameterSlot]:
        """The slots this module's calls give gradients for."""
        return [slot for slot in (self.weight, self.bias) if slot is not None]


def check_adapters(model: nn.Module) -> None:
    """Raise BadInput unless every LoRA layer runs exactly one adapter, beside its base."""
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


def has_adapter(model: nn.Module) -> bool:
    """Return whether a model trains an adapter: one of peft's, or LoRA matrices made otherwise.

    A base that an adapter was merged into, or unloaded from, keeps peft's configuration alone.
    """
    wrapped = any(base.__name__ == "PeftModel" for base in type(model).__mro__)
    layers = any(hasattr(module, "adapter_layer_names") for module in model.modules())
    return (
        wrapped
        or layers
        or any(
            parameter.requires_grad and not set(_ADAPTER_PARTS).isdisjoint(name.split("."))
            for name, parameter in model.named_parameters()
        )
    )


def check_frozen(model: nn.Module) -> None:
    """Raise BadInput where a model trains all that its adapter is to stand for."""
    parameters = list(model.parameters())
    if has_adapter(model) and all(parameter.requires_grad for parameter in parameters):
        count = sum(parameter.numel() for parameter in parameters)
        raise BadInput(
            f"the model has an adapter, and all of its {count:,} parameters are trained: freeze "
            "those beside the adapter, or take the model without one"
        )


def watched_linears(
    model: nn.Module, parameters: Mapping[ParameterSlot, nn.Parameter]
) -> list[HookedModule]:
    """Find the LoRA matrices that hooks can cover, except tied ones that they cover in part."""
    slots = {id(parameter): slot for slot, parameter in parameters.items()}
    found: list[HookedModule] = []
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
                found.append(HookedModule(module, own.get("weight"), own.get("bias")))
        else:
            elsewhere.update(own.values())
    return [
        HookedModule(
            watched.module,
            None if watched.weight in elsewhere else watched.weight,
            None if watched.bias in elsewhere else watched.bias,
        )
        for watched in found
    ]
