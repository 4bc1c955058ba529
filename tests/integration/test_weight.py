"""Training with weighted samples, through the real trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

#: A run of the plain trainer: fixture keys that only a selector needs are left out.
PLAIN: dict[str, Any] = {
    **dict.fromkeys(("component_name", "target_dataset", "warmup_step", "update_step",
                     "update_times", "component_params")),
    "train_type": "static",
    "lora_dropout": 0.0,
    "max_samples": 43,
    "save_strategy": "no",
}  # fmt: skip
UNIFORM: dict[str, Any] = {
    **PLAIN,
    "train_type": "dynamic_weight",
    "component_name": "loss",
    "component_params": {"strategy": "uniform"},
}


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def adapter(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    return load_file(run / "adapter_model.safetensors")


def apart(first: Path, second: Path) -> float:
    """Largest difference of two adapters' entries."""
    one, other = adapter(first), adapter(second)
    assert one.keys() == other.keys()
    return max(float(np.abs(one[key] - other[key]).max()) for key in one)


@pytest.mark.parametrize("stage", ["sft", "pt"])
def test_equal_weights_are_the_plain_trainer(
    stage: str, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Accumulation 3 and 43 rows: the last step has one micro-batch of one row."""
    more = {"stage": stage, "packing": False}
    for name, settings in (("plain", PLAIN), ("equal", UNIFORM)):
        path = config(f"{name}.yaml", **{**settings, **more, "output_dir": str(tmp_path / name)})
        result = cli("train", path)
        assert result.code == 0, result.err[-3000:]
    assert len(losses(tmp_path / "equal")) == 8
    np.testing.assert_allclose(losses(tmp_path / "equal"), losses(tmp_path / "plain"), atol=1e-6)
    assert apart(tmp_path / "equal", tmp_path / "plain") < 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_equal_weights_are_the_plain_trainer_on_two_processes(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    two = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DISABLE_VERSION_CHECK": "1"}
    for name, settings in (("plain", PLAIN), ("equal", UNIFORM)):
        path = config(f"{name}.yaml", **{**settings, "output_dir": str(tmp_path / name)})
        result = cli("train", path, env=two)
        assert result.code == 0, result.err[-3000:]
    np.testing.assert_allclose(losses(tmp_path / "equal"), losses(tmp_path / "plain"), atol=1e-6)
    assert apart(tmp_path / "equal", tmp_path / "plain") < 1e-6
