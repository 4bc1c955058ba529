"""What LlamaFactory's key `deepspeed` says of where a run's state will be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dataflex.launch.deepspeed import keeps_copies, zero_stage

BF16, FP16 = {"bf16": True, "fp16": False}, {"bf16": False, "fp16": True}
ON, AUTO, OFF = {"enabled": True}, {"enabled": "auto"}, {"enabled": False}


def zero(stage: int, **others: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage}, **others}


def test_the_stage_of_zero_is_read_from_a_file_or_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "two.json").write_text('{"zero_optimization": {"stage": 2}}')
    (tmp_path / "none.json").write_text("[1]")
    assert zero_stage(str(tmp_path / "two.json")) == 2
    assert zero_stage({"zero_optimization": {"stage": 3}}) == 3
    unknown = [None, str(tmp_path / "none.json"), str(tmp_path / "missing.json"), {}, 3]
    assert [zero_stage(each) for each in unknown] == [None] * 5
    assert [keeps_copies(each, BF16) for each in unknown] == [""] * 5


@pytest.mark.parametrize(
    ("content", "precision", "found"),
    [
        (zero(0, bf16=AUTO), BF16, "stage 0 with bf16"),
        (zero(0, bf16=AUTO, fp16=AUTO), FP16, "stage 0 with fp16"),
        ({"bf16": ON}, FP16, "stage 0 with bf16"),
        (zero(1, bf16=AUTO, data_types={"grad_accum_dtype": "fp32"}), BF16,
         "stage 1 with bf16 and grad_accum_dtype fp32"),
        (zero(0, bf16=AUTO), FP16, ""),
        (zero(0, bf16=OFF, fp16=AUTO), BF16, ""),
        (zero(1, bf16=AUTO), BF16, ""),
        (zero(1, bf16=AUTO, data_types={"grad_accum_dtype": "bf16"}), BF16, ""),
        (zero(1, fp16=AUTO, data_types={"grad_accum_dtype": "fp32"}), FP16, ""),
        (zero(2, bf16=ON, data_types={"grad_accum_dtype": "fp32"}), BF16, ""),
    ],
)  # fmt: skip
def test_optimizers_that_train_copies_are_told_from_those_that_train_parameters(
    content: dict[str, Any], precision: dict[str, bool], found: str
) -> None:
    """As DeepSpeed 0.18.4 chooses them: FP16_UnfusedOptimizer or FP16_Optimizer, else ZeRO's."""
    assert keeps_copies(content, precision) == found
