"""Training with weighted samples, through the real trainer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dataflex.bridge.arguments import accepted_keys
from dataflex.checkpoints.state import load_state
from dataflex.config.keys import load
from dataflex.launch.preflight import check
from dataflex.run.log import read_events
from gradstore.errors import BadInput

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


def test_equal_weights_are_the_plain_trainer_on_two_processes(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """41 rows: 2 processes x 2 rows x 3 micro-batches, a last step of one, padded by one row."""
    for name, settings in (("plain", PLAIN), ("equal", UNIFORM)):
        own = {"max_samples": 41, "output_dir": str(tmp_path / name)}
        path = config(f"{name}.yaml", **settings | own)
        result = cli("train", path, ranks=2)
        assert result.code == 0, result.err[-3000:]
    assert len(losses(tmp_path / "equal")) == 4
    np.testing.assert_allclose(losses(tmp_path / "equal"), losses(tmp_path / "plain"), atol=1e-6)
    assert apart(tmp_path / "equal", tmp_path / "plain") < 1e-6


TARGETS: dict[str, Any] = {
    **PLAIN,
    "train_type": "dynamic_weight",
    "target_dataset": "tiny_target,tiny_target_heldout",
    "component_params": {"refresh_interval": 4, "self_normalize": True},
    "component_name": "adapt",
    "lora_dropout": 0.1,
}


def weights_told(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run / "dataflex") if event["event"] == "weight"]


def test_a_killed_run_resumes_with_the_same_weights(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Killed between two looks at the target; windows of three micro-batches, scored before."""
    for name in ("whole", "killed"):
        path = config(**TARGETS | {"save_strategy": "steps", "warmup_step": 1,
                                   "output_dir": str(tmp_path / name)})  # fmt: skip
        if name == "killed":
            assert cli("train", path, faults={"kill_step": 7}).code == -9
        result = cli("train", path)
        assert result.code == 0, result.err[-3000:]
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes()
                for name in ("whole", "killed")]  # fmt: skip
    assert adapters[0] == adapters[1]
    assert weights_told(tmp_path / "whole") == weights_told(tmp_path / "killed")
    assert [event["step"] for event in weights_told(tmp_path / "whole")] == [2, 3, 4, 5, 6, 7, 8]
    state = load_state(tmp_path / "killed" / "checkpoint-6").component
    assert state["looked"] == 5, "at steps 1 and 5; the resume, from step 6, looks at 9"
    assert 0 < np.linalg.norm(state["mean"]) < 1


def test_ranks_share_the_target_rows_and_weight_alike(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """96 target rows in batches of 7: the ranks have as many passes, one of them counts nothing."""
    shared = {"max_samples": 40, "lora_dropout": 0.0, "save_strategy": "steps",
              "component_params": {"anchor_batch_size": 7}}  # fmt: skip
    for name, ranks in (("one", 1), ("two", 2)):
        path = config(**TARGETS | shared | {"per_device_train_batch_size": 4 // ranks,
                                            "output_dir": str(tmp_path / name)})  # fmt: skip
        result = cli("train", path, ranks=ranks)
        assert result.code == 0, result.err[-3000:]
    means = [load_state(tmp_path / name / "checkpoint-4").component["mean"]
             for name in ("one", "two")]  # fmt: skip
    np.testing.assert_allclose(means[0], means[1], atol=1e-6)
    told = [weights_told(tmp_path / name) for name in ("one", "two")]
    assert len(told[0]) == 4
    for one, two in zip(*told, strict=True):
        for key in ("weight_min", "weight_mean", "weight_max", "effective_share"):
            assert one[key] == pytest.approx(two[key], abs=1e-5)
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-4  # Adam enlarges what rounding leaves


def test_packed_rows_are_samples_too(cli: Any, config: Callable[..., Path], tmp_path: Path) -> None:
    params = {"component_params": {"strategy": "linupper"}}
    result = cli("train", config(**UNIFORM | params | {"packing": True, "max_steps": 2}))
    assert result.code == 0, result.err[-3000:]
    assert len(weights_told(tmp_path / "run")) == 2


PLANTED = '''
import torch

from dataflex.weighters.loss import LossWeighter


class Planted(LossWeighter):
    """Every third row, by its tokens, comes out of the model as NaN."""

    scope = "micro"

    def start(self, run):
        def spoil(module, args, output):
            bad = args[0].sum(1) % 3 == 0
            return torch.where(bad[:, None, None], float("nan"), output)

        run.model.get_input_embeddings().register_forward_hook(spoil)
'''


@pytest.mark.parametrize("ranks", [1, 2])
def test_rows_that_a_model_answers_with_nan_leave_no_trace(
    ranks: int, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """Some micro-batches lose a row, some both, and the processes not at the same time."""
    (tmp_path / "planted.py").write_text(PLANTED)
    path = config(**UNIFORM | {"component_name": "custom", "lora_target": "all",
                               "component_params": {"target": "planted:Planted"}})  # fmt: skip
    result = cli("train", path, ranks=ranks, cwd=tmp_path)
    assert result.code == 0, result.err[-3000:]
    assert result.err.count("a non-finite loss get weight 0") == 1
    found = adapter(tmp_path / "run")
    assert all(np.isfinite(value).all() for value in found.values())
    assert any(np.abs(v).max() > 1e-3 for name, v in found.items() if "lora_B" in name)
    assert all(np.isfinite(losses(tmp_path / "run")))


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown strategy": (
        {"component_params": {"strategy": "linuper"}},
        ("component 'loss'", "strategy is 'linuper'", "linupper"),
    ),
    "unknown parameter": ({"component_params": {"tau": 1}}, ("'tau'", "Accepted: delta, r")),
    "tau 0": ({"component_name": "adapt", "component_params": {"tau": 0}}, ("tau is 0",)),
    "no targets": ({"component_name": "adapt"}, ("'adapt' needs target rows",)),
    "damping": (
        {"component_name": "joint_update_aware", "component_params": {"damping": 2},
         "target_dataset": "tiny_target"},
        ("damping is 2; it must be above 0 and at most 1",),
    ),
    "packing and embeddings": (
        {"component_name": "adapt", "target_dataset": "tiny_target", "packing": True},
        ("packing is on", "set packing: false"),
    ),
    "fsdp": (
        {"component_name": "adapt", "target_dataset": "tiny_target", "fsdp": "full_shard"},
        ("fsdp is 'full_shard'",),
    ),
    "another loss": ({"use_dft_loss": True}, ("use_dft_loss is on", "set use_dft_loss: false")),
    "asft loss": ({"use_asft_loss": True}, ("use_asft_loss is on", "set use_asft_loss: false")),
    "eaft loss": ({"use_eaft_loss": True},
                       ("use_eaft_loss is on", "set use_eaft_loss: false")),
    "warm-up": ({"warmup_step": -1}, ("warmup_step is -1",)),
    "custom without a class": ({"component_name": "custom"}, ("target: package.module:Class",)),
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"train_type": "dynamic_mix", "component_name": "odm", "enable_liger_kernel": True,
             "dataset": "tiny_domain_date,tiny_domain_sort", "update_step": 2},
            "enable_liger_kernel is on, which hides the logits that component 'odm'",
        ),
        ({"use_unsloth": True}, "use_unsloth is on, which hides the logits"),
    ],
)  # fmt: skip
def test_what_hides_the_logits_is_refused_where_its_package_is_installed(
    changes: dict[str, Any], says: str, config: Callable[..., Path]
) -> None:
    """Where it is not, the command line asks for the package first."""
    path = config(**UNIFORM | {"component_params": {}} | changes)
    with pytest.raises(BadInput, match=says):
        check(load(path, [], accepted_keys()))


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_weighter_is_refused_before_the_model(
    case: str, cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    changes, fragments = REFUSED[case]
    result = cli("train", config(**UNIFORM | {"component_params": {}} | changes))
    assert result.code == 2, result.err[-3000:]
    assert result.err.count("error: ") == 1
    assert all(fragment in result.message for fragment in fragments), result.message
    assert not list(tmp_path.glob("run/*adapter*"))


def test_a_layer_that_the_model_lacks_is_refused_before_training(
    cli: Any, config: Callable[..., Path]
) -> None:
    params = {"embed_layer": 9, "objective_mode": "align_only"}
    path = config(**TARGETS | {"component_name": "joint_update_aware", "component_params": params})
    result = cli("train", path)
    assert result.code == 2, result.err[-3000:]
    assert "embed_layer is 9" in result.message
    dry = cli("train", path, "--dry-run")
    assert (dry.code, dry.message) == (result.code, result.message)


def test_a_dry_run_measures_the_looks_at_the_target_rows(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    result = cli("train", config(**TARGETS | {"max_samples": 24}), "--dry-run")
    assert result.code == 0, result.err[-3000:]
    (line,) = [line for line in result.out.splitlines() if "target embeddings" in line]
    assert "not measured" not in line
    assert not (tmp_path / "run").exists()


def test_target_sets_evaluated_one_by_one_work(
    cli: Any, config: Callable[..., Path], tmp_path: Path
) -> None:
    """The targets are the evaluation sets, which LlamaFactory then hands on as a dict."""
    changes = {
        "target_dataset": None, "eval_dataset": "tiny_target,tiny_target_heldout",
        "eval_on_each_dataset": True, "do_eval": True, "eval_strategy": "steps", "eval_steps": 4,
        "component_name": "joint_update_aware", "component_params": {"target_num_batches": 2},
        "max_samples": 24,
    }  # fmt: skip
    result = cli("train", config(**TARGETS | changes))
    assert result.code == 0, result.err[-3000:]
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_tiny_target_heldout_loss" in line for line in history)
    assert len(weights_told(tmp_path / "run")) == 4
