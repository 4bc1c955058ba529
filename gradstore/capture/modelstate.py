"""Borrow a model in the middle of training and give it back as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

#: Config switches that cost memory or add an auxiliary loss, and what a scoring pass wants instead.
_SCORING_CONFIG = {"use_cache": False, "output_router_logits": False}


@contextmanager
def borrowed(model: nn.Module, *, freeze: bool) -> Iterator[None]:
    """Put a model into evaluation mode, optionally frozen, and restore every flag, even on error.

    Args:
        model: any module.
        freeze: whether no parameter shall require grad meanwhile.
    """
    training = [(module, module.training) for module in model.modules()]
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    switches = [
        (config, key, getattr(config, key), wanted)
        for config in _configs(model)
        for key, wanted in _SCORING_CONFIG.items()
        if hasattr(config, key)
    ]
    try:
        for config, key, _, wanted in switches:
            setattr(config, key, wanted)
        for module, _ in training:
            module.training = False
        if freeze:
            for parameter, _ in required:
                parameter.requires_grad = False
        yield
    finally:
        for parameter, flag in required:
            parameter.requires_grad = flag
        for module, flag in training:
            module.training = flag
        for config, key, value, _ in switches:
            setattr(config, key, value)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Keep Python's, NumPy's, torch's CPU and CUDA random states as they are."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _configs(model: nn.Module) -> list[Any]:
    """Find the distinct configs of a model and its parts (a text model has its own in a VLM)."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            found.setdefault(id(config), config)
    return list(found.values())


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Disable autocast for a backward pass, where it would round the hooks' products."""
    return torch.autocast(device.type, enabled=False)
