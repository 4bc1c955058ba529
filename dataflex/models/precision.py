"""The mixed precision of a run, for passes that do not go through the Trainer's own forward."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def autocast(model: nn.Module, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return the autocast context that training wraps a model's forward in.

    Args:
        model: says by its parameters on which device.
        precision: bf16, fp16 or off, as in `RunContext.autocast`.
    """
    import torch

    if precision == "off":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)
