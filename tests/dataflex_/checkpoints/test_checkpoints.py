"""What is read of saved checkpoints: learning rates, and whether they are whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dataflex.checkpoints.folders import find_checkpoints, mean_learning_rate
from dataflex.checkpoints.weights import check_resumable
from dataflex.config.keys import DataFlexConfig, RunConfig
from gradstore.errors import BadInput, DamagedData


@pytest.mark.parametrize(
    ("previous", "step", "expected"),
    [(0, 4, 0.002), (4, 8, 0.001), (0, 2, 0.002), (4, 6, 0.002), (0, 8, 0.0015)],
)
def test_a_stretch_without_a_log_line_takes_the_nearest(
    previous: int, step: int, expected: float, tmp_path: Path
) -> None:
    history = [{"step": 4, "learning_rate": 0.002}, {"step": 8, "learning_rate": 0.001}]
    state = {"global_step": step, "log_history": [*history, {"step": 8, "eval_loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert mean_learning_rate(tmp_path, previous, step) == pytest.approx(expected)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole one of a LoRA run, as far as its files go."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4}')
    save_file({"a": np.ones(8, np.float32)}, tmp_path / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        with zipfile.ZipFile(tmp_path / name, "w") as file:
            file.writestr("data", "x")
    return tmp_path


def test_a_whole_checkpoint_can_be_resumed(checkpoint: Path) -> None:
    check_resumable(checkpoint)


def test_sharded_checkpoints_keep_states_and_weights_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "global_step4").mkdir()
    check_resumable(tmp_path)


@pytest.mark.parametrize("kind", ["optimizer.pt", "scheduler.pt", "rng_state*.pth",
                                  "adapter_model.safetensors"])  # fmt: skip
def test_a_checkpoint_that_lacks_a_part_or_its_end_is_refused(kind: str, checkpoint: Path) -> None:
    paths = sorted(checkpoint.glob(kind))
    whole = paths[-1].read_bytes()
    paths[-1].write_bytes(whole[:-5])
    with pytest.raises(DamagedData, match=f"{paths[-1].name} is damaged"):
        check_resumable(checkpoint)
    for path in paths:
        path.unlink()
    with pytest.raises(BadInput, match="has no "):
        check_resumable(checkpoint)


def test_features_are_made_of_whole_adapters_alone(checkpoint: Path) -> None:
    config = RunConfig(
        DataFlexConfig(gradstore_checkpoints=(str(checkpoint),)), {}, Path("build.yaml")
    )
    assert find_checkpoints(config) == [checkpoint]
    adapter = checkpoint / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-5])
    with pytest.raises(DamagedData, match="adapter_model"):
        find_checkpoints(config)
