"""What makes this run's features comparable with others: the fields a space must agree on."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradkernels import ProjectionSpec, canary

from dataflex.data import RunData
from gradstore.capture.slots import ParameterSlot, parameter_name
from gradstore.storage.hashing import tensor_hash

if TYPE_CHECKING:
    from torch import nn

#: DataArguments fields that change which tokens a row has or which of them are targets.
ROW_FIELDS = ("cutoff_len", "train_on_prompt", "mask_history")


def space_fields(
    model: nn.Module,
    data: RunData,
    slots: Sequence[ParameterSlot],
    projection: ProjectionSpec,
    dtype: str,
) -> dict[str, Any]:
    """The MUST-EQUAL fields of the gradient space.

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
        "rows": {field: getattr(data.data_args, field, None) for field in ROW_FIELDS},
    }


def adapter_hash(model: nn.Module, slots: Sequence[ParameterSlot]) -> str:
    """sha256 of the trained parameters' names and values."""
    trained = {slot.name for slot in slots}
    return tensor_hash((n, p) for n, p in named_parameters(model).items() if n in trained)


def named_parameters(model: nn.Module) -> dict[str, Any]:
    """Parameters by the names the store uses (wrappers' prefixes stripped)."""
    return {parameter_name(name): p for name, p in model.named_parameters()}


def tokenizer_hash(tokenizer: Any) -> str:  # noqa: ANN401 - a transformers tokenizer
    """sha256 of the files the tokenizer saves, chat template included, path-free."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        digest = hashlib.sha256()
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                content = path.read_bytes()
                if path.name == "tokenizer_config.json":
                    content = _without_paths(content)
                digest.update(f"{path.name}:{len(content)}:".encode() + content)
    return digest.hexdigest()


def _without_paths(content: bytes) -> bytes:
    settings: Mapping[str, Any] = json.loads(content)
    volatile = {"name_or_path", "_name_or_path", "special_tokens_map_file", "tokenizer_file"}
    return json.dumps(
        {k: v for k, v in settings.items() if k not in volatile}, sort_keys=True
    ).encode()


def libraries() -> dict[str, str]:
    """Versions that only warn when they differ."""
    import importlib.metadata as metadata

    import torch

    found = {name: metadata.version(name) for name in ("torch", "transformers", "peft", "zarr")}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
