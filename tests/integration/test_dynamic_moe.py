"""dynamic_moe in real runs on a tiny mixture of experts; refusals of models and parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dataflex.run.log import read_events

MOE = Path(__file__).resolve().parents[2] / "examples" / "tiny" / "moe"
DOMAINS = ("tiny_domain_date", "tiny_domain_sort", "tiny_domain_spell")

Write = Callable[..., Path]


@pytest.fixture
def moe_run(config: Write) -> Write:
    """A full run of 5 steps with frozen routers; updates at 0, 2 and 4."""

    def write(name: str = "run.yaml", **changes: object) -> Path:
        usual: dict[str, object] = {
            "model_name_or_path": str(MOE), "finetuning_type": "full", "dataset": ",".join(DOMAINS),
            "lora_rank": None, "lora_target": None, "lora_dropout": None, "target_dataset": None,
            "max_samples": 24, "num_train_epochs": None, "train_type": "dynamic_mix",
            "component_name": "dynamic_moe", "component_params": {"eval_batch_size": 4},
            "train_step": 5, "warmup_step": 0, "update_step": 2, "save_strategy": "no",
            "save_steps": None, "freeze_gate": True,
        }  # fmt: skip
        return config(name, **{**usual, **changes})

    return write


def mixes(run: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "dataflex") if e["event"] == "mix"]


def test_two_processes_mix_what_one_mixes_and_routers_stay_as_they_are(
    cli: Any, moe_run: Write, tmp_path: Path
) -> None:
    held_out = "tiny_domain_date_eval,tiny_domain_sort_eval"
    forecast = cli("train", moe_run(mixer_eval_dataset=held_out), "--dry-run")
    assert forecast.code == 0, forecast.err[-3000:]
    (line,) = [line for line in forecast.out.splitlines() if "loads of experts" in line]
    assert line.split("│")[2].strip() == "3"
    assert "not measured" not in line
    for ranks in (1, 2):
        path = moe_run(output_dir=str(tmp_path / str(ranks)), mixer_eval_dataset=held_out,
                       per_device_train_batch_size=2 // ranks)  # fmt: skip
        result = cli("train", path, ranks=ranks)
        assert result.code == 0, result.err[-3000:]
    one, two = (mixes(tmp_path / str(ranks)) for ranks in (1, 2))
    assert [e["step"] for e in one] == [e["step"] for e in two] == [0, 2, 4]
    assert one[0]["proportions"] == two[0]["proportions"], "the same model: the same counts"
    assert len(set(one[0]["proportions"].values())) == 3, "the domains differ"
    assert sum(one[2]["proportions"].values()) == pytest.approx(1)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(
            list(a["load_distance"].values()), list(b["load_distance"].values()), atol=1e-2
        )
    before, after = (load_file(p / "model.safetensors") for p in (MOE, tmp_path / "1"))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    gates = {name for name in before if name.endswith("mlp.gate.weight")}
    assert len(gates) == 2
    assert not gates & changed
    assert changed


@pytest.mark.parametrize("freeze", [True, False])
def test_a_dense_model_is_refused(freeze: bool, cli: Any, config: Write, tmp_path: Path) -> None:
    component = "static" if freeze else "dynamic_moe"
    path = config(dataset=",".join(DOMAINS), train_type="dynamic_mix", component_name=component,
                  component_params=None, target_dataset=None, freeze_gate=freeze)  # fmt: skip
    result = cli("train", path)
    assert result.code == 2
    assert ("freeze_gate is true" if freeze else "no layer of experts") in result.message
    if not freeze:
        assert cli("train", path, "--dry-run").message == result.message
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_freeze_gate_is_refused_where_nothing_of_ours_runs(cli: Any, config: Write) -> None:
    result = cli("train", config(train_type="static", freeze_gate=True))
    assert result.code == 2
    assert "train_type static is LlamaFactory itself" in result.message


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"eta": 0}, "eta is 0; it must be above 0"),
        ({"c": -0.1}, "c is -0.1; it must be from 0 to 1"),
        ({"collect_steps": 0}, "collect_steps is 0; it must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size is 0"),
    ],
)
def test_a_parameter_out_of_range_is_one_message_before_anything_is_written(
    params: dict[str, float], says: str, cli: Any, moe_run: Write, tmp_path: Path
) -> None:
    result = cli("train", moe_run(component_params=params))
    assert result.code == 2, result.err[-3000:]
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    assert f"component 'dynamic_moe': {says}" in result.message
    assert not (tmp_path / "run").exists()
