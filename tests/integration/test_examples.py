"""Every strategy has an example; the README's runs as often as one likes, here for a few steps."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.config.presets import presets_of, resolve
from dataflex.config.registry import KINDS, strategies

ROOT = Path(__file__).resolve().parents[2]
FEWER = ("max_samples=48", "per_device_train_batch_size=2", "warmup_step=2", "update_step=2",
         "update_times=1", "logging_steps=1", "save_steps=3", "disable_tqdm=true",
         "do_eval=false", "overwrite_cache=true")  # fmt: skip


@pytest.mark.parametrize("train_type", KINDS)
def test_there_is_an_example_of_every_strategy(train_type: str) -> None:
    """A preset may stand for its strategy: `sorting` for `static`."""
    bucket, kind = KINDS[train_type]
    presets, shown = presets_of(bucket), set()
    for folder in ("train_lora", "train_full"):
        for path in (ROOT / "examples" / folder).rglob("*.yaml"):
            content = yaml.safe_load(path.read_text())
            if content["train_type"] == train_type:
                name = content["component_name"]
                shown.add(presets.get(name, {}).get("name", name))
    assert not set(strategies(kind)) - shown


def test_the_example_of_dynamic_sorting_is_one_of_every_order_by_loss() -> None:
    path = ROOT / "examples" / "train_lora" / "reorders" / "dynamic_sorting.yaml"
    params = yaml.safe_load(path.read_text())["component_params"]
    patterns = [name for name in presets_of("reorders") if name.startswith("dynamic_")]
    assert len(patterns) == 7
    for name in patterns:
        assert resolve("dynamic_reorder", name, params).build() is not None
    for name in ("select_only", "select_then_reorder"):
        assert resolve("dynamic_lego", name, {}).build() is not None


def test_the_readmes_example_runs_as_often_as_one_likes(cli: Any, tmp_path: Path) -> None:
    """overwrite_output_dir starts anew; test_every_strategy.py runs all the others."""
    run, path = tmp_path / "run", ROOT / "examples" / "train_lora" / "selectors" / "less.yaml"
    for rows in ("max_samples=48", "max_samples=44"):
        result = cli("train", path, *FEWER, rows, f"output_dir={run}")
        assert result.code == 0, result.err[-3000:]
        assert "Updates of this run" in result.out
        chosen = json.loads((run / "dataflex" / "selections" / "step_2.json").read_text())
        assert len(chosen["indices"]) == 4
        assert len((run / "dataflex" / "events.jsonl").read_text().splitlines()) == 1
        logged = map(json.loads, (run / "trainer_log.jsonl").read_text().splitlines())
        assert any(line.get("dataflex/kept_share", 0) > 0 for line in logged)
        assert (run / "adapter_model.safetensors").exists()


def test_the_custom_selector_takes_long_answers_and_checks_its_parameters(
    cli: Any, tmp_path: Path
) -> None:
    path = ROOT / "examples" / "train_lora" / "selectors" / "custom.yaml"
    run = tmp_path / "run"
    assert cli("train", path, *FEWER, f"output_dir={run}").code == 0
    chosen = json.loads((run / "dataflex" / "selections" / "step_2.json").read_text())
    data = json.loads((ROOT / "examples" / "tiny" / "data" / "train.json").read_text())[:48]
    longest = sorted((len(row["output"]) for row in data), reverse=True)
    assert min(len(data[i]["output"]) for i in chosen["indices"]) >= longest[-1]
    assert min(chosen["metric"]["score"]) > 0
    wrong = cli("train", path, "component_params.shar=0.5", f"output_dir={run}")
    assert wrong.code == 2
    assert "'shar' (did you mean 'share'?)" in wrong.message
    out_of_range = cli("train", path, "component_params.share=0", f"output_dir={run}")
    assert out_of_range.code == 2
    assert "share is 0" in out_of_range.message
    missing = cli("train", path, "component_params.target=no.such:Thing", f"output_dir={run}")
    assert missing.code == 2
    assert "'no.such:Thing' cannot be imported" in missing.message


@pytest.mark.parametrize(
    ("tasks", "workers"),
    [((1, 2, 3, 4), ["1/4", "2/4", "3/4", "4/4"]), ((3, 5, 9), ["1/3", "3/3", "3/3"]),
     ((0, 1), ["1/2", "2/2"]), ((7,), ["1/1"])],
    ids=["as it is", "with gaps", "from 0", "of one"],
)  # fmt: skip
def test_every_task_of_a_slurm_array_is_a_worker_whatever_its_numbers(
    tasks: tuple[int, ...], workers: list[str], tmp_path: Path
) -> None:
    """Of numbers that leave some out several tasks may be one worker, which does no harm."""
    program = tmp_path / "dataflex-cli"
    program.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    program.chmod(0o755)
    given = ["CONFIG.yaml", "gradstore=runs/a store"]
    array = {"SLURM_ARRAY_TASK_COUNT": len(tasks), "SLURM_ARRAY_TASK_MIN": min(tasks)}
    for task, worker in zip(tasks, workers, strict=True):
        slurm = {name: str(value) for name, value in {**array, "SLURM_ARRAY_TASK_ID": task}.items()}
        told = subprocess.run(
            ["bash", ROOT / "examples" / "slurm" / "build_store.sh", *given],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert told.stdout.splitlines() == ["gradstore", "build", *given, "--worker", worker]
