"""The mirror selector in real runs: its training on the target leaves no trace in the run's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MEASURING = """
from dataclasses import replace

from dataflex.selectors.mirror import MirrorSelector
from dataflex.selectors.random import RandomSelector


class Measuring(MirrorSelector):
    def select(self, count, context):
        measured = super().select(count, context)
        drawn = RandomSelector().select(count, context)
        return replace(drawn, numbers=measured.numbers, target_rows=measured.target_rows)
"""


def steps_of(run: Path) -> list[tuple[float, ...]]:
    """Loss and gradient norm of every step."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(line["loss"], line["grad_norm"]) for line in history if "grad_norm" in line]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_takes_the_same_steps_whether_or_not_its_selector_measures(
    kind: str, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Rows are those of `random` in both; dropout, moments and schedule go on as they were."""
    (tmp_path / "mine.py").write_text(MEASURING)
    common: dict[str, Any] = {"lr_scheduler_type": "cosine", "max_samples": 48, "cutoff_len": 48,
                              "gradient_accumulation_steps": 2}  # fmt: skip
    if kind == "full":
        lora = dict.fromkeys(("lora_rank", "lora_target", "lora_dropout"))
        common |= {"finetuning_type": "full", "learning_rate": 1e-4, **lora}
    runs: dict[str, dict[str, Any]] = {
        "random": {"component_name": "random", "component_params": {}},
        "measuring": {"component_name": "custom",
                      "component_params": {"target": "mine:Measuring", "target_epochs": 2}},
    }  # fmt: skip
    for name, own in runs.items():
        path = config(output_dir=str(tmp_path / name), **common | own)
        result = cli("train", path, cwd=tmp_path)
        assert result.code == 0, result.err[-3000:]
    plain, measured = tmp_path / "random", tmp_path / "measuring"
    assert len(steps_of(plain)) == 8
    assert steps_of(plain) == steps_of(measured)
    weights = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    assert (plain / weights).read_bytes() == (measured / weights).read_bytes()
    lines = map(json.loads, (measured / "dataflex" / "events.jsonl").read_text().splitlines())
    told = [(line["target_rows"], line["numbers"]) for line in lines]
    assert len(told) == 2
    for rows, numbers in told:
        assert rows == 32
        assert numbers["target_loss_last"] < numbers["target_loss_first"], "it was trained on"
