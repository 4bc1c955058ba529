"""Answers from LlamaFactory's key `deepspeed`, a file or a mapping: where a run's state will be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

_FLOAT32 = {"fp32", "float32", "torch.float32"}


def zero_stage(deepspeed: object) -> int | None:
    """Return the ZeRO stage; None if unknown."""
    stage = _section(_content(deepspeed), "zero_optimization").get("stage")
    return stage if isinstance(stage, int) else None


def keeps_copies(deepspeed: object, precision: Mapping[str, bool]) -> str:
    """Name what makes DeepSpeed's optimizer train float32 copies of the parameters; "" if nothing.

    Its moments are then of the copies, and with bf16 of gradients in another scale than the
    model's: DeepSpeed 0.18.4 divides them by a loss scale that no loss was multiplied by.

    Args:
        deepspeed: the key's value.
        precision: whether the run itself has bf16 and fp16 on, which "auto" follows.
    """
    content, stage = _content(deepspeed), zero_stage(deepspeed) or 0
    on = []
    for name, of_run in precision.items():
        enabled = _section(content, name).get("enabled", False)
        if of_run if enabled == "auto" else enabled is True:
            on.append(name)
    if stage == 0 and on:
        return f"stage 0 with {on[0]}"
    sums = _section(content, "data_types").get("grad_accum_dtype")
    if stage == 1 and "bf16" in on and sums in _FLOAT32:
        return f"stage 1 with bf16 and grad_accum_dtype {sums}"
    return ""


def _content(deepspeed: object) -> Mapping[str, object]:
    """Read the configuration; {} where LlamaFactory will refuse it."""
    content = deepspeed
    if isinstance(deepspeed, str):
        try:
            content = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
    return content if isinstance(content, dict) else {}


def _section(content: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = content.get(name)
    return section if isinstance(section, dict) else {}
