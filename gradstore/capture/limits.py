"""The limits of a model that a pass over rows must keep: positions, embeddings, memory."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from gradstore.errors import BadInput

#: Padded tokens of a gradient batch where the user sets none.
CPU_TOKENS, GPU_TOKENS = 2048, 16384


#: How allocators of devices and of the host begin to say it where torch has no class for it.
_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory",
              "CUBLAS_STATUS_ALLOC_FAILED")  # fmt: skip


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out, of a device or of the host."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_MEMORY)


def release_memory() -> None:
    """Give back what nobody holds any more, after memory ran out.

    Not inside the `except`: the error holds the frames, and they what filled the memory.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_on(device: torch.device) -> int:
    """Return the bytes that are free on a CUDA device, with those that torch holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def token_budget(model: nn.Module) -> int:
    """Return the number of padded tokens of a gradient batch that suits the model's device."""
    return GPU_TOKENS if next(model.parameters()).device.type == "cuda" else CPU_TOKENS


def vocabulary_size(model: Any) -> int | None:  # noqa: ANN401 - a PreTrainedModel
    """Return the number of tokens that a model has embeddings for, if it tells."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return getattr(embeddings, "num_embeddings", None)


def max_positions(model: Any) -> int | None:  # noqa: ANN401 - a PreTrainedModel
    """Return the most tokens a model takes, if stated; the language part's, if it has several."""
    longest = getattr(_text_config(model), "max_position_embeddings", None)
    return None if longest is None else int(longest)


def longest_of(
    model: Any,  # noqa: ANN401 - a PreTrainedModel
    lengths: npt.NDArray[np.int64],
    name: str,
) -> int | None:
    """Return the tokens of the longest row that can be passed through the model; None for any.

    Args:
        model: the model.
        lengths: (n,) tokens of each row.
        name: of the rows, for the message.

    Raises:
        BadInput: rotary frequencies depend on the longest row of a batch (`longrope`), and the rows
            lie on both sides of the length at which they change.
    """
    settings = _text_config(model)
    rope = getattr(settings, "rope_parameters", None) or getattr(settings, "rope_scaling", None)
    for part in (rope, *(rope or {}).values()):
        if isinstance(part, dict) and part.get("rope_type", part.get("type")) == "longrope":
            changes = part.get("original_max_position_embeddings") or getattr(
                settings, "original_max_position_embeddings", None
            )
            longer = lengths > (changes or np.inf)
            if longer.any() and not longer.all():
                raise BadInput(
                    f"{int(longer.sum())} of the {len(lengths)} rows of {name!r} have more than "
                    f"{changes} tokens, at which the model's position encoding (longrope) changes "
                    "for every row of a batch: a row's features would depend on its neighbours. "
                    f"Set cutoff_len to at most {changes}."
                )
    return max_positions(model)


def _text_config(model: Any) -> Any:  # noqa: ANN401 - a PretrainedConfig
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config
