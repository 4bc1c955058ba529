"""Learning rates of saved checkpoints, whatever `logging_steps` was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dataflex.checkpoints import mean_learning_rate


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
