"""Fields that a space must agree on for this run's features to be comparable with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gradkernels import ProjectionSpec, canary

from dataflex.data.rows import ROW_FIELDS, RunData, tokenizer_hash
from gradstore.capture.slots import ParameterSlot, parameter_name
from gradstore.storage.hashing import tensor_hash

if TYPE_CHECKING:
    from torch import nn


def space_fields(
    model: nn.Module,
    data: RunData,
    slots: Sequence[ParameterSlot],
    projection: ProjectionSpec,
    dtype: str,
) -> dict[str, Any]:
    """Return the MUST-EQUAL fields of the gradient space.

    Args:
        model: the model in training.
        data: tokenizer, template and how rows were cut.
        slots: the trained parameters, in gradient order.
        projection: with the base seed.
        dtype: how features are stored.
    """
    parameters, trained = named_parameters(model), {slot.name for slot in slots}
    return {
        "dim": projection.d,
        "dtype": dtype,
        "loss": "sum over rows of each row's mean over its target tokens",
        "projection": {**projection.to_dict(), "canary": canary(projection).tolist()},
        "parameters": [
            f"{s.name} {list(s.shape)} {str(parameters[s.name].dtype).removeprefix('torch.')}"
            for s in slots
        ],
        "base_model": tensor_hash((n, p) for n, p in parameters.items() if n not in trained),
        "tokenizer": tokenizer_hash(data.tokenizer),
        "template": data.template,
        "stage": data.stage,
        "rows": row_fields(data),
    }


def row_fields(data: RunData) -> dict[str, Any]:
    """Return LlamaFactory's settings that decide which tokens a row has."""
    return {field: getattr(data.data_args, field, None) for field in ROW_FIELDS}


def attention_of(model: nn.Module) -> str:
    """Return the name of the attention implementation; it moves features by rounding."""
    return str(getattr(model.config, "_attn_implementation", None))


def adapter_hash(model: nn.Module, slots: Sequence[ParameterSlot]) -> str:
    """Compute the sha256 of the trained parameters' names and values."""
    trained = {slot.name for slot in slots}
    return tensor_hash((n, p) for n, p in named_parameters(model).items() if n in trained)


def named_parameters(model: nn.Module) -> dict[str, Any]:
    """Return parameters by the names the store uses (wrappers' prefixes stripped)."""
    return {parameter_name(name): p for name, p in model.named_parameters()}


def libraries() -> dict[str, str]:
    """Return library and GPU versions; a difference in them only causes a warning."""
    import importlib.metadata as metadata

    import torch

    found = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "zarr")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
