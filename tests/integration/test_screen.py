"""The screen of a run: few lines, the table of updates last; all of LlamaFactory's on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dataflex.checkpoints.state import load_state

ROOT = Path(__file__).resolve().parents[2]
LESS = ROOT / "examples" / "train_lora" / "selectors" / "less.yaml"

#: The README's first command, with its steps and lines of losses, on fewer rows.
FEWER = ("max_samples=40", "per_device_train_batch_size=1", "lora_target=q_proj", "lora_rank=2")

#: As on a user's machine: nothing chosen, and bars shown.
USUAL = {"LLAMAFACTORY_VERBOSITY": None, "HF_DATASETS_DISABLE_PROGRESS_BARS": None}

#: What LlamaFactory and transformers say by themselves.
THEIRS = ("training example:", "input_ids:", "Model config", "Loading dataset", "trainable params",
          "Running training")  # fmt: skip


def lines(text: str) -> int:
    """Lines of a file that shows it, where a bar is one line."""
    return text.count("\n")


def test_the_first_command_ends_in_a_table_within_60_lines(cli: Any, tmp_path: Path) -> None:
    result = cli("train", LESS, *FEWER, f"output_dir={tmp_path / 'run'}", env=USUAL)
    assert result.code == 0, result.err[-3000:]
    assert lines(result.out) + lines(result.err) <= 60
    assert not [said for said in THEIRS if said in result.out + result.err]
    assert "step 30: less chose 10 of 40 rows" in result.err
    assert result.out.count("'loss'") == 4
    assert "We recommend enable mixed precision training" in result.out, "warnings are shown"
    assert "Updates of this run" in result.out
    assert "40/40" in result.err, "the bar of the losses"
    assert result.out.splitlines()[-1].startswith("└")


@pytest.mark.parametrize(
    ("options", "env"),
    [(("--verbose",), USUAL), ((), {**USUAL, "LLAMAFACTORY_VERBOSITY": "INFO"})],
    ids=["--verbose", "LLAMAFACTORY_VERBOSITY=INFO"],
)
def test_all_that_llamafactory_says_is_shown_on_request(
    options: tuple[str, ...], env: Any, cli: Any, tmp_path: Path
) -> None:
    result = cli("train", LESS, *FEWER, "train_step=1", f"output_dir={tmp_path / 'run'}",
                 *options, env=env)  # fmt: skip
    assert result.code == 0, result.err[-3000:]
    assert not [said for said in THEIRS if said not in result.out + result.err]
    assert "no update was made" in result.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_two_workers_under_torchrun_agree_and_are_as_quiet(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Real processes of torch's launcher, in which LlamaFactory is imported after the choice."""
    env = {**USUAL, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": None}
    path, run = (
        config(max_samples=60, gradient_accumulation_steps=1, train_step=4),
        tmp_path / "run",
    )
    result = cli("train", path, env=env)
    assert result.code == 0, result.err[-3000:]
    assert lines(result.out) + lines(result.err) <= 60
    assert not [said for said in THEIRS if said in result.out + result.err]
    assert "*****\nSetting OMP_NUM_THREADS" not in result.err
    assert "2 processes with one CPU thread each" in result.err
    assert result.out.count("Updates of this run") == 1
    assert result.err.count("step 2: less chose") == 1
    assert result.out.splitlines()[-1].startswith("└")

    chosen = json.loads((run / "dataflex" / "selections" / "step_2.json").read_text())["indices"]
    assert len(set(chosen)) == 3 * 2 * 2, "U steps of 2 rows on 2 ranks"
    events = (run / "dataflex" / "events.jsonl").read_text().splitlines()
    assert len(events) == 1
    state = load_state(run / "checkpoint-4")
    owner = json.loads((run / "dataflex" / "run.json").read_text())
    assert state.run_id == owner["run_id"]
    assert state.more["rows"].tolist() == chosen


def test_static_is_llamafactory_without_its_chatter(cli: Any, config: Any) -> None:
    path = config(train_type="static", max_samples=12, component_name=None)
    result = cli("train", path, env=USUAL)
    assert result.code == 0, result.err[-3000:]
    assert not [said for said in THEIRS if said in result.out + result.err]
    assert "train_runtime" in result.out
