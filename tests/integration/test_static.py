"""`train_type: static` is LlamaFactory's own training; its other commands are its own, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Keys of the fixture's YAML that LlamaFactory does not know.
OURS = ("train_type", "component_name", "target_dataset", "warmup_step", "update_step",
        "update_times", "component_params")  # fmt: skip


def losses(run: Path) -> list[tuple[int, float, float]]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(e["step"], e["loss"], e["learning_rate"]) for e in history if "loss" in e]


def test_static_training_is_llamafactorys_bit_for_bit(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """With `train_type: static`, and with no train_type at all."""
    plain: dict[str, Any] = {**dict.fromkeys(OURS), "max_samples": 30}
    theirs = config("theirs.yaml", **plain, output_dir=str(tmp_path / "theirs"))
    expected = cli("train", theirs, program="llamafactory-cli")
    assert expected.code == 0, expected.err[-2000:]
    assert len(losses(tmp_path / "theirs")) == 5
    for static in ("static", None):
        run = tmp_path / f"ours {static}"
        result = cli("train", config(**{**plain, "train_type": static}, output_dir=str(run)))
        assert result.code == 0, result.err[-2000:]
        assert losses(run) == losses(tmp_path / "theirs")
        adapters = [(folder / "adapter_model.safetensors").read_bytes()
                    for folder in (run, tmp_path / "theirs")]  # fmt: skip
        assert adapters[0] == adapters[1]
        assert not (run / "dataflex").exists()


def test_static_takes_what_a_selector_refuses(cli: Any, config: Any) -> None:
    """Packing, and our keys for a later `gradstore build`, a set that is not there yet too."""
    path = config(train_type="static", packing=True, max_samples=30, update_step=0,
                  target_dataset="to_be_written")  # fmt: skip
    assert cli("train", path).code == 0


def test_train_step_is_honoured_by_static_training_too(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(train_type="static", max_samples=30, train_step=2, max_steps=4,
                  early_stopping_min_delta=0.1)  # fmt: skip
    result = cli("train", path)
    assert result.code == 0, result.err[-2000:]
    assert "early_stopping_min_delta has no effect" in result.err
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_other_commands_pass_through(cli: Any) -> None:
    ours, theirs = cli("env"), cli("env", program="llamafactory-cli")
    assert ours.code == theirs.code == 0
    assert "`llamafactory` version" in ours.out
    assert ours.out == theirs.out
    assert "chat" in cli("--help").out
