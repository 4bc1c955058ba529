"""Pipelines through the real trainer: killed and resumed, on two processes, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from dataflex.checkpoints.state import load_state
from dataflex.run.log import read_events

ADD, SORT, NOISE = (f"tiny_domain_{name}" for name in ("add", "sort", "noise"))

#: Boundaries at 1, 3, 5 and 7. The selector fires at 1 and 5, there from the losses of step 1; at 3
#: and 7 the mixer goes on with what it left.
STAGES: list[dict[str, Any]] = [
    {"family": "selector", "component": "loss", "every": 4, "score_max_age": 4, "keep_ratio": 0.6},
    {"family": "mixer", "component": "odm"},
    {"family": "weighter", "component": "loss", "warmup_step": 2},
]
PIPELINE: dict[str, Any] = {
    "train_type": "dynamic_lego",
    "component_name": "pipeline",
    "component_params": {"stages": STAGES, "save_plans": True},
    "dataset": ",".join((ADD, SORT, NOISE)),
    "target_dataset": None,
    "max_samples": 24,
    "gradient_accumulation_steps": 2,
    "warmup_step": 1,
    "update_step": 2,
    "update_times": 0,
    "train_step": 8,
}
Config = Callable[..., Path]


def plans(run: Path) -> dict[str, Any]:
    found = sorted((run / "dataflex" / "plans").glob("step_*.json"))
    return {path.stem: json.loads(path.read_text()) for path in found}


def test_a_kill_between_firings_changes_nothing(cli: Any, config: Config, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    path = config("whole.yaml", **PIPELINE, output_dir=str(whole))
    result = cli("train", path, faults={"trace": str(tmp_path / "a")})
    assert result.code == 0, result.err[-3000:]
    path = config("killed.yaml", **PIPELINE, output_dir=str(killed))
    faults = {"trace": str(tmp_path / "b")}
    assert cli("train", path, faults={"kill_step": 4, **faults}).code == -9
    kept = load_state(killed / "checkpoint-2")
    assert len(kept.component["handed"][0]) == 43
    assert len(kept.more["board"]["values"]) == 72
    result = cli("train", path, "resume_from_checkpoint=true", faults=faults)
    assert result.code == 0, result.err[-3000:]

    lines = [sorted(set((tmp_path / name).read_text().splitlines())) for name in "ab"]
    assert lines[0] == lines[1], "the same rows at every step"
    assert plans(whole) == plans(killed)
    assert list(plans(whole)) == ["step_1", "step_3", "step_5", "step_7"]
    adapters = [(run / "adapter_model.safetensors").read_bytes() for run in (whole, killed)]
    assert adapters[0] == adapters[1]
    told = [[{k: v for k, v in event.items() if not k.endswith("seconds")}
             for event in read_events(run / "dataflex")] for run in (whole, killed)]  # fmt: skip
    assert told[0] == told[1]

    events = [event for event in told[0] if event["event"] == "pipeline"]
    both, mixer = ["selector loss", "mixer odm"], ["mixer odm"]
    assert [event["fired"] for event in events] == [both, mixer, both, mixer]
    assert all(sum(event["counts"].values()) == 8 for event in events)
    assert [event["step"] for event in told[0] if event["event"] == "weight"] == [3, 4, 5, 6, 7, 8]
    for plan in plans(whole).values():
        pool, mixed = (stage["rows"] for stage in plan["stages"])
        assert (len(pool), len(plan["rows"])) == (43, 8)
        assert set(plan["rows"]) == set(mixed) <= set(pool)
    first, last = (plans(whole)[step]["stages"][0]["rows"] for step in ("step_1", "step_5"))
    assert first != last, "drawn anew, from the same losses"
    log = (whole / "trainer_log.jsonl").read_text()
    assert '"dataflex/kept/selector": 43' in log
    assert f'"dataflex/mix/{ADD}"' in log


def test_two_processes_plan_and_train_as_one_does(cli: Any, config: Config, tmp_path: Path) -> None:
    for name, rows, ranks in (("one", 2, 1), ("two", 1, 2)):
        path = config(f"{name}.yaml", **PIPELINE, output_dir=str(tmp_path / name), lora_dropout=0.0,
                      per_device_train_batch_size=rows)  # fmt: skip
        result = cli("train", path, ranks=ranks)
        assert result.code == 0, result.err[-3000:]
    assert plans(tmp_path / "one") == plans(tmp_path / "two")
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5


def test_a_pipeline_of_one_static_order_is_that_order(
    cli: Any, config: Config, tmp_path: Path
) -> None:
    """Its preset puts raw rows in order; as a stage it orders training rows, to the same end."""
    params: dict[str, Any] = {"score_params": {"score_field": "difficulty"}}
    stage = {"family": "reorder", "component": "zigzag", "params": params}
    own: dict[str, Any] = {"train_type": "dynamic_reorder", "component_name": "zigzag",
                           "component_params": {**params, "apply_at": "index"}}  # fmt: skip
    for name, changes in (("own", own), ("stage", {"component_params": {"stages": [stage]}})):
        changes |= {"output_dir": str(tmp_path / name), "dataset": "tiny_scored"}
        path = config(f"{name}.yaml", **{**PIPELINE, **changes})
        result = cli("train", path, faults={"trace": str(tmp_path / f"{name}.txt")})
        assert result.code == 0, result.err[-3000:]
    assert (tmp_path / "own.txt").read_text() == (tmp_path / "stage.txt").read_text()


def test_weights_of_two_stages_multiply(cli: Any, config: Config, tmp_path: Path) -> None:
    """A soft-max at temperature 1, squared, is one at 1/2."""
    once, half = ({"family": "weighter", "component": "loss", "params": {"r": r}} for r in (1, 0.5))
    for name, stages in (("twice", [once, once]), ("half", [half])):
        settings = {**PIPELINE, **staged(*stages), "train_step": 3, "save_strategy": "no"}
        result = cli("train", config(f"{name}.yaml", **settings, output_dir=str(tmp_path / name)))
        assert result.code == 0, result.err[-3000:]
    assert apart(tmp_path / "twice", tmp_path / "half") < 1e-6


def apart(first: Path, second: Path) -> float:
    """Largest difference of two adapters' entries."""
    one, other = (load_file(run / "adapter_model.safetensors") for run in (first, second))
    return max(float(abs(one[key] - other[key]).max()) for key in one)


def staged(*stages: dict[str, Any]) -> dict[str, Any]:
    return {"component_params": {"stages": list(stages)}}


STATIC = {"family": "mixer", "component": "static"}
LOSS = {"family": "selector", "component": "loss"}

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "misspelt stage key": (staged({**LOSS, "keep_ration": 0.9}),
                           ["stage 1", "'keep_ration' (did you mean 'keep_ratio'?)"]),
    "misspelt component": (staged(STATIC, {**LOSS, "component": "los"}),
                           ["stage 2 (selector los)", "did you mean 'loss'"]),
    "misspelt pipeline": ({"component_name": "mix_then_wait"}, ["did you mean 'mix_then_weight'"]),
    "draw before a mixer": (staged({**LOSS, "mode": "draw"}, STATIC),
                            ["selector loss has mode: draw", "mode: filter"]),
    "two mixers": (staged(STATIC, STATIC), ["two stages are of family mixer"]),
    "no target for a stage": (staged({**LOSS, "component": "less"}),
                              ["component 'less' needs target rows"]),
    "sgd and a stage that needs moments": (
        {**staged({**LOSS, "component": "less"}), "optim": "sgd", "target_dataset": "tiny_target"},
        ["component 'less' needs them", "optim is 'sgd'"]),
    "proportions of a stage": (staged({**STATIC, "params": {"proportions": [1, 2]}}),
                               ["mixer static", "expected 3 numbers"]),
    "val_size": ({"val_size": 0.1}, ["val_size is 0.1", "target_dataset"]),
    "streaming": ({"streaming": True, "max_steps": 8}, ["streaming is on"]),
    "a mixture without a mixer": (
        {**staged(LOSS), "init_mixture_proportions": [1, 1, 1]},
        ["init_mixture_proportions is set", "no mixer"]),
    "update_step too large": ({"update_step": 40}, ["update_step is 40", "72"]),
    "nothing": ({"component_params": {}}, ["needs component_params: stages"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_cannot_run_is_refused_before_anything_is_loaded(
    name: str, cli: Any, config: Config
) -> None:
    changes, fragments = REFUSED[name]
    result = cli("train", config(**{**PIPELINE, **changes}))
    assert result.code == 2, result.err[-3000:]
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    assert "trainable params: " not in result.out + result.err
    for fragment in fragments:
        assert fragment in result.message
