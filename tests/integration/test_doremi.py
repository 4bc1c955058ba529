"""DoReMi in real runs: three in a row; killed and resumed; on two processes; a LoRA reference."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.checkpoints.state import load_state

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "train_full" / "mixers" / "doremi.py"
TINY = SCRIPT.parents[2] / "tiny"
DOMAINS = "tiny_domain_date,tiny_domain_sort"

Write = Callable[..., Path]


@pytest.fixture
def proxy(config: Write) -> Write:
    """A LoRA run of 8 steps with accumulation 3 and dropout; weights from step 2 on."""

    def write(name: str = "run.yaml", **changes: object) -> Path:
        usual: dict[str, object] = {
            "dataset": DOMAINS, "max_samples": 24, "train_type": "dynamic_mix",
            "component_name": "doremi", "target_dataset": None, "num_train_epochs": None,
            "component_params": {"reference_model_path": str(TINY / "model")}, "save_steps": 4,
        }  # fmt: skip
        return config(name, **{**usual, **changes})

    return write


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "doremi_weights.jsonl").read_text().splitlines()]


def test_the_script_chains_the_three_runs(cli: Any, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("doremi_chain", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(path: Path, overrides: Sequence[str]) -> None:
        result = cli("train", path, *overrides, draws=True)
        assert result.code == 0, result.err[-3000:]

    short = ("max_samples=24", "per_device_train_batch_size=4", "update_step=2", "update_times=2",
             "do_eval=false", f"dataset={DOMAINS}", "disable_tqdm=true",
             "overwrite_cache=true")  # fmt: skip
    only_static = ("train_step=4", "init_mixture_proportions=[1,3]")
    average = script.chain(script.CONFIGS, tmp_path, [*short, *only_static], run=run)
    lines = steps(tmp_path / "2_proxy")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert max(lines[-1]["perdomain_scores"]) > 0, "the reference is another model"
    np.testing.assert_allclose(average, np.mean([s["domain_weights"] for s in lines], axis=0))
    state = load_state(tmp_path / "3_final" / "checkpoint-4")
    assert state.settings["init_mixture_proportions"] == average
    assert (tmp_path / "2_proxy" / "dataflex" / "picture.png").is_file()


def test_killed_and_resumed_it_has_the_same_weights_and_no_step_twice(
    cli: Any, proxy: Write, tmp_path: Path
) -> None:
    """The reference is a LoRA adapter on the run's own model."""
    whole, killed, reference = (tmp_path / name for name in ("whole", "killed", "reference"))
    made = cli("train", proxy("one.yaml", component_name="static", component_params=None,
                              output_dir=str(reference), lora_rank=2))  # fmt: skip
    assert made.code == 0, made.err[-3000:]
    params = {"reference_model_path": str(reference)}
    result = cli("train", proxy(output_dir=str(whole), component_params=params))
    assert result.code == 0, result.err[-3000:]
    path = proxy(output_dir=str(killed), component_params=params)
    assert cli("train", path, faults={"kill_step": 6}).code == -9
    assert [line["step"] for line in steps(killed)] == [2, 3, 4, 5]
    result = cli("train", path)
    assert result.code == 0, result.err[-3000:]
    assert [line["step"] for line in steps(whole)] == [2, 3, 4, 5, 6, 7]
    for name in ("doremi_weights.jsonl", "doremi_average_weights.json",
                 "doremi_step3_proportions.txt", "adapter_model.safetensors"):  # fmt: skip
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name
    assert not list(whole.rglob("*reference*")), "the reference is not saved"
    logged = (whole / "trainer_log.jsonl").read_text()
    assert '"dataflex/weights/tiny_domain_sort"' in logged


def test_two_processes_have_the_weights_of_one(cli: Any, proxy: Write, tmp_path: Path) -> None:
    for ranks in (1, 2):
        path = proxy(output_dir=str(tmp_path / str(ranks)), lora_dropout=0,
                     per_device_train_batch_size=2 // ranks, save_strategy="no")  # fmt: skip
        result = cli("train", path, ranks=ranks)
        assert result.code == 0, result.err[-3000:]
    one, two = (steps(tmp_path / str(ranks)) for ranks in (1, 2))
    assert [line["step"] for line in two] == [2, 3, 4, 5, 6, 7]
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a["domain_weights"], b["domain_weights"], atol=1e-6)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "reference_model_path is None"),
        ({"reference_model_path": "/no/such/model"}, "'/no/such/model' is not a folder"),
        ({"reference_model_path": "no-one/no-model"}, "'no-one/no-model' cannot be loaded"),
    ],
)
def test_without_its_reference_it_is_refused(
    params: dict[str, str], says: str, cli: Any, proxy: Write, tmp_path: Path
) -> None:
    result = cli("train", proxy(component_params=params))
    assert result.code == 2
    assert says in result.message
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"reweight_eta": 0}, "reweight_eta is 0; it must be above 0"),
        ({"reweight_eta": -1}, "reweight_eta is -1"),
        ({"reweight_eps": 1.5}, "reweight_eps is 1.5; it must be from 0 to 1"),
    ],
)
def test_a_parameter_out_of_range_is_one_message_before_anything_is_written(
    params: dict[str, float], says: str, cli: Any, proxy: Write, tmp_path: Path
) -> None:
    named = {"reference_model_path": str(TINY / "model"), **params}
    result = cli("train", proxy(component_params=named))
    assert result.code == 2, result.err[-3000:]
    assert "Traceback" not in result.err
    assert result.err.count("error: ") == 1
    assert f"component 'doremi': {says}" in result.message
    assert not (tmp_path / "run").exists()
