"""What is said of a configuration alone, beside refusals."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dataflex.bridge import arguments
from dataflex.config.keys import load
from dataflex.config.presets import resolve
from dataflex.launch.configuration import read
from dataflex.launch.losses import OPTIONS, LossOption
from dataflex.launch.preflight import (
    OF_LORA,
    check,
    check_gradients,
    check_replay,
)
from dataflex.run.strategy import FSDP, ZERO3
from gradstore.errors import BadInput

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "train_lora"


def told(example: str, overrides: list[str], caplog: pytest.LogCaptureFixture) -> str:
    """What `check` warns of."""
    config = load(EXAMPLES / f"{example}.yaml", overrides, arguments.accepted_keys())
    with caplog.at_level(logging.WARNING):
        check(config)
    return caplog.text


def test_keys_that_nothing_looks_at_are_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    idle = ["static_mix=true", "init_mixture_proportions=[1,2]", "mixture_sample_rule=uniform",
            "mixer_eval_dataset=tiny_target", "target_subtasks=[3]",
            "early_stopping_min_delta=0.5"]  # fmt: skip
    said = told("selectors/loss", idle, caplog)
    assert [key for key in idle if f"{key.partition('=')[0]} has no effect here" not in said] == []
    assert "update_step" not in said
    caplog.clear()
    said = told("weighters/loss", ["update_step=5", "update_times=3"], caplog)
    assert "update_step has no effect" in said
    assert "update_times has no effect" in said


def test_values_of_wrong_types_are_told_together_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    wrong = ["adapter_name_or_path=5", "optim=[sgd]", "max_steps=many", "cutoff_len=long"]
    path = EXAMPLES / "selectors" / "less.yaml"
    with pytest.raises(BadInput) as refused:
        read(path, wrong)
    lines = str(refused.value).splitlines()
    keys = [line.removeprefix(f"{path}: ").split(" is ")[0] for line in lines]
    assert sorted(keys) == sorted(key.partition("=")[0] for key in wrong)
    assert any("max_steps is 'many'" in line and "without quotes" in line for line in lines)


@pytest.mark.parametrize(
    "example",
    [
        "weighters/adapt",
        "weighters/loss",
        "mixers/odm",
        "../train_full/mixers/doremi_step2_dynamic",
    ],
)
def test_padding_that_counts_is_refused_by_what_reads_training_losses(
    example: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    with pytest.raises(BadInput, match="set ignore_pad_token_for_loss: true"):
        told(example, ["ignore_pad_token_for_loss=false"], caplog)
    told("selectors/less", ["ignore_pad_token_for_loss=false"], caplog)


@pytest.mark.parametrize("example", ["selectors/random", "mixers/odm", "reorders/saw"])
def test_a_batch_size_that_memory_finds_is_refused_where_rows_are_planned_by_step(
    example: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    with pytest.raises(BadInput, match="set auto_find_batch_size: false"):
        told(example, ["auto_find_batch_size=true"], caplog)
    told("weighters/loss", ["auto_find_batch_size=true"], caplog)


@pytest.mark.parametrize("example", ["selectors/less", "mixers/odm", "weighters/adapt"])
def test_an_example_has_no_idle_key(
    example: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    assert "has no effect" not in told(example, [], caplog)


@pytest.mark.parametrize(
    ("train_type", "name", "params", "refused"),
    [
        ("dynamic_select", "random", {}, set()),
        ("dynamic_select", "loss", {}, {FSDP}),
        ("dynamic_select", "delta_loss", {}, {FSDP}),
        ("dynamic_select", "less", {}, {FSDP, ZERO3}),
        ("dynamic_select", "mirror", {}, {FSDP, ZERO3}),
        ("dynamic_select", "near", {}, {FSDP, ZERO3}),
        ("dynamic_select", "rds_plus", {}, {FSDP, ZERO3}),
        ("dynamic_select", "bm25", {}, set()),
        ("dynamic_select", "online", {}, {FSDP, ZERO3}),
        ("dynamic_select", "near", {"embedding_model_name_or_path": "encoder"}, set()),
        ("dynamic_select", "coincide", {}, {FSDP, ZERO3}),
        ("dynamic_mix", "odm", {}, set()),
        ("dynamic_mix", "dynamic_moe", {}, {FSDP, ZERO3}),
        ("dynamic_weight", "adapt", {}, {FSDP}),
        ("dynamic_reorder", "sorting", {}, set()),
        ("dynamic_reorder", "sorting", {"score_source": "model_loss", "score_params": {}}, {FSDP}),
        ("dynamic_lego", "pipeline",
         {"stages": [{"family": "selector", "component": "loss"},
                     {"family": "mixer", "component": "dynamic_moe"}]}, {FSDP, ZERO3}),
    ],
)  # fmt: skip
def test_what_makes_passes_of_its_own_wants_a_whole_model(
    train_type: str, name: str, params: dict[str, object], refused: set[str]
) -> None:
    assert resolve(train_type, name, params).build().whole_model == refused


@pytest.mark.parametrize(
    ("override", "says"),
    [("finetuning_type=3", "finetuning_type is 3; choose lora, oft, freeze or full."),
     ("stage=sfft", "stage is 'sfft'; choose pt, sft, rm, ppo, dpo or kto."),
     ("optim=3", "optim is 3, which keeps no Adam moments"),
     ("finetuning_type=oft", "finetuning_type is 'oft', but component 'less'")],
)  # fmt: skip
def test_a_value_is_shown_as_it_was_written_with_its_choices(
    override: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    path = EXAMPLES / "selectors" / "less.yaml"
    with pytest.raises(BadInput) as refused:
        check(read(path, [override]))
    assert says in str(refused.value)


@pytest.mark.parametrize("kind", ["full", "freeze"])
@pytest.mark.parametrize("component", ["less", "icons", "nice", "cluster_less", "landmarks"])
def test_strategies_of_gradients_take_those_of_whole_weights(
    component: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    path, whole = EXAMPLES / "selectors" / f"{component}.yaml", [f"finetuning_type={kind}"]
    config = read(path, whole)
    check(config)
    check_gradients(config)
    with pytest.raises(BadInput, match=f"finetuning_type is '{kind}', but gradstore eval works on"):
        check_gradients(config, "gradstore eval", lora_alone=OF_LORA)


@pytest.mark.parametrize(
    ("example", "changes", "named"),
    [
        ("online", [], "component 'online' works on per-sample LoRA gradients"),
        ("less", ["component_params.scoring=direct"], "keeps with scoring: direct several"),
        ("less_rerank", [], "keeps with rerank several gradients as long as the model"),
        ("less_kfac", [], "fits with preconditioner: kfac factors of matrices"),
        ("less", ["quantization_bit=4"], "quantization_bit is 4, but the weights that"),
        ("less", ["quantization_bit=8"], "remove quantization_bit, or set finetuning_type: lora"),
        ("less", ["deepspeed=zero3.json"], "of ZeRO stage 3, but component 'less' makes passes"),
        ("less", ["deepspeed=zero0.json", "bf16=true"], "stage 0 with bf16 keeps Adam moments"),
        ("less", ["fsdp=full_shard"], "while its parameters are sharded: remove fsdp"),
        ("less", ["optim=adafactor"], "optim is 'adafactor', which keeps no Adam moments"),
    ],
)
def test_what_whole_weights_cannot_have_is_refused_by_name(
    example: str,
    changes: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(EXAMPLES.parents[1])
    (tmp_path / "zero3.json").write_text('{"zero_optimization": {"stage": 3}}')
    (tmp_path / "zero0.json").write_text('{"bf16": {"enabled": "auto"}}')
    placed = [each.replace("=zero", f"={tmp_path}/zero") for each in changes]
    config = load(EXAMPLES / "selectors" / f"{example}.yaml",
                  ["finetuning_type=full", *placed], arguments.accepted_keys())  # fmt: skip
    with pytest.raises(BadInput) as refused:
        check(config)
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("lora_dropout=0.1", "lora_dropout is 0.1"),
        ("neftune_noise_alpha=5", "neftune_noise_alpha is 5"),
        ("bf16=true", "bf16 is True"),
        ("fp16=true", "fp16 is True"),
        ("pure_bf16=true", "pure_bf16 is True"),
        ("quantization_bit=4", "quantization_bit is 4"),
        ("loraplus_lr_ratio=16", "loraplus_lr_ratio is 16"),
        ("use_galore=true", "use_galore is True"),
        ("optim=sgd", "set optim: adamw_torch"),
        ("deepspeed=zero2.json", "deepspeed is 'zero2.json'"),
        ("early_stopping_steps=3", "early_stopping_steps is 3"),
        ("finetuning_type=full", "finetuning_type is 'full', but gradstore replay"),
        ("stage=dpo", "stage is 'dpo', but gradstore replay"),
        ("streaming=true", "streaming is on, but gradstore replay"),
        ("packing=true", "packing is on, but gradstore replay"),
        ("neat_packing=true", "neat_packing is on, but gradstore replay"),
    ],
)
def test_a_run_that_no_replay_follows_is_refused_by_its_key(change: str, named: str) -> None:
    path = EXAMPLES / "selectors" / "less.yaml"
    check_replay(load(path, [], arguments.accepted_keys()))
    with pytest.raises(BadInput) as refused:
        check_replay(load(path, [change], arguments.accepted_keys()))
    assert named in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_a_replay_follows_no_other_loss_than_the_plain_one(option: LossOption) -> None:
    off, on = (
        option.off,
        "true" if option.off == "false" else "false" if option.acts_when is False else "0.1",
    )
    path = EXAMPLES / "selectors" / "less.yaml"
    check_replay(load(path, [f"{option.key}={off}"], arguments.accepted_keys()))
    with pytest.raises(BadInput, match=f"set {option.key}: {off}"):
        check_replay(load(path, [f"{option.key}={on}"], arguments.accepted_keys()))
