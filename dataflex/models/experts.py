"""Mixture-of-experts models: which modules route, and which experts they choose.

Found by type and structure, not by a module's name: `gate_proj` of a dense MLP is no router. In
transformers 5 a layer's experts are one module, which is handed the chosen experts of every token:
what it gets is what the router has decided, with biases and groups. A router stands beside it.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradstore.errors import BadInput

_log = logging.getLogger(__name__)

#: Parameter names under which layers of experts receive the chosen experts: (tokens, k) int64.
CHOICES = ("top_k_index", "router_indices", "selected_experts")

#: Classes of transformers that route, where they are no plain linear layer.
ROUTER = re.compile(r"(Router|TopKGating|MoE\w*Gate)$")


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """List the experts module of each layer, from the first layer to the last."""
    return [module for module in model.modules() if _takes_choices(module)]


def routers(model: nn.Module) -> list[nn.Module]:
    """List every module that routes tokens to experts."""
    found = [module for module in model.modules() if ROUTER.search(type(module).__name__)]
    for parent in model.modules():
        children = list(parent.children())
        for experts in filter(_takes_choices, children):
            width = expert_count(experts)
            found += [c for c in children if getattr(c, "out_features", None) == width]
    return list(dict.fromkeys(found))


def expert_count(experts: nn.Module) -> int:
    """Return the number of experts of a layer."""
    count = getattr(experts, "num_experts", None)
    return int(next(experts.parameters()).shape[0] if count is None else count)


def freeze_routers(model: nn.Module) -> None:
    """Take the routers' parameters out of training (`freeze_gate`).

    Raises:
        BadInput: the model has none.
    """
    found = routers(model)
    if not found:
        raise BadInput(
            f"freeze_gate is true, but {type(model).__name__} is no mixture of experts: it has no "
            "router. Set freeze_gate: false."
        )
    for module in found:
        module.requires_grad_(False)
    _log.info("freeze_gate: %d routers keep their parameters", len(found))


def load_experts(model: nn.Module, checkpoint: Path) -> None:
    """Put a checkpoint's experts into a model that is trained whole.

    transformers 5 trains the experts of a layer as one tensor and saves them one by one, under the
    names of old. Its Trainer does not join them again when it resumes: it would go on from the
    experts of the start, with a warning.

    Args:
        model: the model in training, as it was loaded at the start.
        checkpoint: a folder of the Trainer's; without a whole model in it nothing is done.
    """
    saved = [checkpoint / name for name in ("model.safetensors", "model.safetensors.index.json")]
    if not any(path.is_file() for path in saved) or not expert_layers(model):
        return
    experts = {id(p) for layer in expert_layers(model) for p in layer.parameters()}
    own = {name: p for name, p in model.named_parameters() if id(p) in experts}
    # Its settings are those of the model: nothing is fetched, no code but its own is run.
    loaded: nn.Module = type(model).from_pretrained(  # type: ignore[attr-defined]
        checkpoint, config=model.config, dtype=next(iter(own.values())).dtype
    )
    joined = dict(loaded.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(joined[name])


@contextmanager
def counted_choices(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect which experts each token of the next forward goes to.

    Yields:
        A list that gets (tokens, k) int64 for each layer, in the order of their forward; empty it
        between batches.
    """
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs[name] for name in CHOICES if name in kwargs]
        seen.append((named[0] if named else args[1]).detach())

    handles = [experts.register_forward_pre_hook(note, with_kwargs=True)
               for experts in expert_layers(model)]  # fmt: skip
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def loads(choices: list[Tensor], mask: Tensor, experts: int) -> Tensor:
    """Count the choices of each expert of each layer, by tokens that are not padding.

    Args:
        choices: (b * t, k) int64 of each of the L layers.
        mask: (b, t), nonzero where there is a token.
        experts: E, the most that a layer has.

    Returns:
        (L, E) float64.
    """
    real = mask.flatten().bool()
    counts = [torch.bincount(chosen.reshape(len(real), -1)[real].flatten(), minlength=experts)
              for chosen in choices]  # fmt: skip
    return torch.stack(counts).double()


def _takes_choices(module: nn.Module) -> bool:
    if not any(True for _ in module.parameters()):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters)
    return len(parameters) > 2 and parameters[2] in CHOICES
