"""less with proj_method trak: a run, a build of its checkpoint, and a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gradstore import open_store

PARAMS = {"proj_dim": 128, "gradient_type": "sgd", "proj_method": "trak", "seed": 0,
          "dtype": "float32"}  # fmt: skip


def test_a_run_and_a_build_have_the_same_bits_and_answer_a_question(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(component_params=PARAMS, update_times=1, save_steps=2)
    assert (ran := cli("train", path)).code == 0, ran.err[-3000:]
    assert "proj_method trak takes about" in ran.err
    store = tmp_path / "run" / "gradstore"
    trained = open_store(store).generation("train/2")
    assert (trained.record.projection["method"], trained.record.effective_seed) == ("trak", 0)
    other = tmp_path / "other"
    at = f"gradstore_checkpoints={tmp_path / 'run' / 'checkpoint-2'}"
    assert (made := cli("gradstore", "build", path, at, f"gradstore={other}")).code == 0, made.err
    built = open_store(other).generation("train/2")
    rows = len(trained.norm)
    np.testing.assert_array_equal(built.read(0, rows), trained.read(0, rows))
    asked = cli("gradstore", "explain", store, "--prompt", "What is 3 + 4?", "--response", "7",
                "--json")  # fmt: skip
    assert asked.code == 0, asked.err[-3000:]
    assert json.loads(asked.out)["generations"] == ["train/2"]
