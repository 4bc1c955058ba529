"""Choice of the trained parameters whose gradients are taken, where a model has no adapter.

`linear` takes the linear layers of the model's body. An embedding's gradient says which tokens a
row has, the output layer's which it should have, so that rows with common words look alike in both
(and the two are one parameter where they are tied); norms are a thousandth of a model. What is
neither an embedding, the output layer nor a norm is taken: biases of linear layers, convolutions,
experts kept in one tensor. Where that is not the choice, modules are listed by their names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from gradstore.capture.adapters import has_adapter
from gradstore.capture.slots import ParameterSlot, parameter_name, trainable_slots
from gradstore.errors import BadInput

#: What is taken, by a word or by patterns of module names, see `named_modules`.
Modules = Literal["linear", "all"] | Sequence[str]


def taken_slots(
    model: nn.Module, modules: Modules
) -> tuple[dict[ParameterSlot, nn.Parameter], tuple[str, ...]]:
    """Find the parameters whose gradients are taken, in gradient order, and those left out.

    Args:
        model: the model, outside of wrappers.
        modules: linear leaves out embeddings, the output layer and norms, with whatever is tied to
            them; all takes everything that requires grad; patterns take what lies in the modules
            that they name. Of a model with an adapter everything is taken.

    Returns:
        Parameters by slot; names of parameters that require grad and are left out.

    Raises:
        BadInput: nothing requires grad, or nothing of it is taken, or a pattern names nothing that
            does, or the model has an adapter.
    """
    everything = trainable_slots(model)
    if not everything:
        raise BadInput(
            "no parameter of the model requires grad: there is no gradient to take; "
            "add an adapter, or set requires_grad"
        )
    if has_adapter(model) and not isinstance(modules, str):
        raise BadInput(
            f"gradient_modules names modules ({', '.join(modules)}), but the model has an adapter, "
            "whose gradients are taken, all of them; choose its layers by lora_target"
        )
    if modules == "all" or has_adapter(model):
        return everything, ()
    out = left_out(model) if modules == "linear" else unnamed(model, modules, everything)
    taken = trainable_slots(model, out)
    if not taken:
        raise BadInput(
            f"the {len(everything)} parameters that the model trains are embeddings, an output "
            "layer or norms, of which gradient_modules: linear takes none; set gradient_modules: "
            "all, or train other parameters"
        )
    names = (name for name, p in model.named_parameters() if p.requires_grad and id(p) in out)
    return taken, tuple(parameter_name(name) for name in names)


def unnamed(
    model: nn.Module, patterns: Sequence[str], everything: Mapping[ParameterSlot, nn.Parameter]
) -> set[int]:
    """Return the `id` of every trained parameter that lies in no module of these names.

    A pattern is a part of a module's dotted name, whole names between the dots, as in lists that
    peft takes: `q_proj`, `self_attn` with all that lies in it, `layers.3`; `*` stands for any
    characters. A parameter that several modules share is taken if one of them is named.

    Args:
        model: the model, outside of wrappers.
        patterns: one or more.
        everything: the trained parameters by slot.

    Raises:
        BadInput: a pattern names no module with a trained parameter.
    """
    trained = {id(parameter) for parameter in everything.values()}
    named, names, idle = set[int](), list[str](), list[str](patterns)
    for name, module in model.named_modules():
        own = {id(p) for p in module._parameters.values()} & trained
        if own:
            names.append(parameter_name(name))
            fitting = [p for p in patterns if fnmatchcase(f".{names[-1]}.", f"*.{p}.*")]
            named |= own if fitting else set()
            idle = [pattern for pattern in idle if pattern not in fitting]
    if idle or not patterns:
        told = ", ".join(map(repr, idle)) or "an empty list"
        raise BadInput(
            f"gradient_modules names no module that the model trains: {told}; there are "
            f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}. Give parts of such names, "
            "as q_proj, or layers.3, or *norm; or linear, or all"
        )
    return trained - named


def left_out(model: nn.Module) -> set[int]:
    """Return the `id` of every parameter of embeddings, of the output layer and of norms."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return {
        id(parameter)
        for module in model.modules()
        if module is head or isinstance(module, nn.Embedding) or is_pointwise(module)
        for parameter in module._parameters.values()
        if parameter is not None
    }


def is_pointwise(module: nn.Module) -> bool:
    """Return whether a module is a norm, or another one whose parameters are all vectors."""
    own = [p for p in module._parameters.values() if p is not None]
    return bool(own) and not isinstance(module, nn.Linear) and all(p.dim() == 1 for p in own)
