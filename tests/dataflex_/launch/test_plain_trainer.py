"""The callback for transformers' Trainer and TRL's: it looks, refuses early and changes nothing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dataflex.bridge import arguments
from dataflex.config.keys import load
from dataflex.integrations import GradientStoreCallback
from dataflex.launch.build import build
from gradstore.errors import BadInput, ProvenanceMismatch, StoreBusy
from gradstore.scoring.frames import open_store
from gradstore.storage.hashing import tensor_hash
from gradstore.store.writer import StoreWriter

ROOT = Path(__file__).resolve().parents[3]
TINY = ROOT / "examples" / "tiny"

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")


def rows(first: int, last: int) -> list[dict[str, Any]]:
    found = json.loads((TINY / "data" / "train.json").read_text())[first:last]
    return [
        {"prompt": f"{r['instruction']} {r['input']}\n", "response": r["output"]} for r in found
    ]


def model(**lora: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], lora_dropout=0.1)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(TINY / "model"), config)


Make = Callable[..., Any]


@pytest.fixture
def trainer(tmp_path: Path) -> Make:
    """`trainer(train=..., target=..., **training_arguments)` -> a Trainer of 3 steps."""

    def make(
        *, train: Any = None, target: Any = None, net: Any = None, collate: Any = None, **args: Any
    ) -> Any:
        from datasets import Dataset
        from transformers import (
            AutoTokenizer,
            DataCollatorForSeq2Seq,
            Trainer,
            TrainingArguments,
            set_seed,
        )

        from gradstore.export.token_rows import read_rows

        set_seed(1)
        tokenizer = AutoTokenizer.from_pretrained(TINY / "model")

        def tokenised(name: str, texts: Any) -> Any:
            return Dataset.from_list(read_rows(name, texts, tokenizer).items)

        usual = {"output_dir": str(tmp_path / "run"), "max_steps": 3, "learning_rate": 1e-2,
                 "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no",
                 "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}  # fmt: skip
        return Trainer(
            net or model(),
            TrainingArguments(**{**usual, **args}),
            train_dataset=tokenised("train", rows(0, 12)) if train is None else train,
            eval_dataset=tokenised("target", rows(12, 16)) if target is None else target,
            data_collator=collate or DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )

    return make


def add(trainer: Any, store: Path, **options: Any) -> Any:
    trainer.add_callback(GradientStoreCallback(trainer, store, **{"proj_dim": 64, **options}))
    return trainer


def state_of(trainer: Any) -> Any:
    """Weights, optimizer and random states, and the flags of the model."""
    named = list(trainer.model.named_parameters())
    moments = trainer.optimizer.state_dict()["state"]
    return (
        tensor_hash((n, p) for n, p in named),
        [(n, p.requires_grad, p.grad is None) for n, p in named],
        tensor_hash((f"{i}.{k}", v) for i, s in moments.items() for k, v in s.items()),
        [(m.training, len(m._forward_hooks)) for m in trainer.model.modules()],
        (random.random(), float(np.random.rand()), torch.rand(3).tolist()),
    )


def test_a_training_with_it_is_bit_for_bit_one_without(trainer: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq

    plain = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(TINY / "model"))

    def drawing(rows: Any) -> Any:
        random.random(), np.random.rand(), torch.rand(1)  # as a collator that augments does
        return plain(rows)

    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1,
               "collate": drawing}  # fmt: skip
    alone = trainer(**options)
    alone.train()
    expected = state_of(alone)
    watched = add(trainer(**options), tmp_path / "store", every=1)
    watched.train()
    assert state_of(watched) == expected
    store = open_store(tmp_path / "store")
    assert [g.name for g in store.generations() if g.role == "train"] == [
        "train/1", "train/2", "train/3",
    ]  # fmt: skip
    rates = [store.generation(f"train/{g}").record.learning_rate for g in (1, 2, 3)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert store.rows_frame("train/3")["response"].tolist() == [
        row["response"] for row in rows(0, 12)
    ]


def test_its_features_are_those_of_gradstore_build_on_the_same_checkpoint(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dataflex-cli gradstore build`, whose rows, as LlamaFactory made them, the Trainer gets."""
    monkeypatch.chdir(ROOT)
    settings = [
        f"output_dir={tmp_path / 'run'}", "dataset=tiny_train", "target_dataset=tiny_target",
        "max_samples=12", "lora_target=q_proj", "lora_rank=2", "cutoff_len=64",
        "component_params={proj_dim: 64}", "eval_dataset=null", "do_eval=false",
        "bf16=false", "gradstore_checkpoints=[]",
    ]  # fmt: skip
    accepted = arguments.accepted_keys()
    less = ROOT / "examples" / "train_lora" / "selectors" / "less.yaml"
    taken: dict[str, Any] = {}

    import dataflex.launch.build as module

    check = module.check_vocabulary
    monkeypatch.setattr(module, "check_vocabulary",
                        lambda net, data: (taken.update(data=data), check(net, data)))  # fmt: skip
    sgd = "component_params={proj_dim: 64, gradient_type: sgd}"
    build(load(less, [*settings, sgd, f"gradstore={tmp_path / 'first'}"], accepted))
    data = taken["data"]
    made = trainer(
        train=data.train.dataset, target={"tiny_target": data.targets[0].dataset},
        save_strategy="steps", save_steps=3,
    )  # fmt: skip
    add(made, tmp_path / "seen", seed=123).train()  # the preset's
    built = [*settings, f"gradstore={tmp_path / 'built'}"]
    build(
        load(less, [*built, f"gradstore_checkpoints=[{tmp_path / 'run/checkpoint-3'}]"], accepted)
    )
    seen, other = open_store(tmp_path / "seen"), open_store(tmp_path / "built")
    for name in ("train/3", "target/tiny_target/3"):
        a, b = seen.generation(name), other.generation(name)
        assert a.record.adapter_hash == b.record.adapter_hash
        assert a.record.optimizer_hash == b.record.optimizer_hash
        np.testing.assert_array_equal(a.row_hash, b.row_hash)
        assert np.abs(a.read(0, a.rows) - b.read(0, b.rows)).max() <= 1e-6


def test_a_repeated_training_reuses_what_is_committed(trainer: Make, tmp_path: Path) -> None:
    add(trainer(), tmp_path / "store", steps=[2]).train()
    before = open_store(tmp_path / "store")
    again = add(trainer(), tmp_path / "store", steps=[2])
    again.train()
    assert open_store(tmp_path / "store").head == before.head
    assert len(before.generations()) == 4


def test_the_store_is_free_between_exports(trainer: Make, tmp_path: Path) -> None:
    """Of a training that failed in a notebook no lock is left."""
    from transformers import TrainerCallback

    class Failing(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            raise RuntimeError("interrupted")

    made = add(trainer(), tmp_path / "store", every=1)
    made.add_callback(Failing())
    with pytest.raises(RuntimeError, match="interrupted"):
        made.train()
    add(trainer(), tmp_path / "store", every=1).train()
    stored = open_store(tmp_path / "store")
    assert len([g for g in stored.generations() if g.role == "train"]) == 3
    with (
        StoreWriter(tmp_path / "store", provenance=stored.generations()[0].provenance),
        pytest.raises(StoreBusy),
    ):
        add(trainer(), tmp_path / "store", every=1).train()


def test_an_early_stop_is_exported_where_the_last_weights_are_still_there(
    trainer: Make, tmp_path: Path
) -> None:
    from transformers import TrainerCallback

    class Stopping(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    made = add(trainer(max_steps=9), tmp_path / "store", every=5)
    made.add_callback(Stopping())
    made.train()
    steps = [g.step for g in open_store(tmp_path / "store").generations() if g.role == "train"]
    assert steps == [2]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"proj_dim": 32}, "projection.d differs"),
        ({"train_rows": rows(0, 6)}, "train.rows differs: 12 rows are stored, this run has 6"),
        ({"target_rows": {"target": rows(20, 24)}}, "target.target.rows differs"),
        ({"output_dir": "other"}, "was made by run"),
    ],
)  # fmt: skip
def test_what_changed_is_refused_before_the_first_step(
    trainer: Make, tmp_path: Path, change: dict[str, Any], told: str
) -> None:
    add(trainer(max_steps=1), tmp_path / "store").train()
    other = {k: str(tmp_path / v) for k, v in change.items() if k == "output_dir"}
    made = add(trainer(max_steps=1, **other), tmp_path / "store",
               **{k: v for k, v in change.items() if k != "output_dir"})  # fmt: skip
    with pytest.raises(ProvenanceMismatch) as caught:
        made.train()
    assert told in str(caught.value)
    assert made.state.global_step == 0


def test_another_tokenizer_is_refused(trainer: Make, tmp_path: Path) -> None:
    add(trainer(max_steps=1), tmp_path / "store").train()
    made = trainer(max_steps=1)
    made.processing_class.add_special_tokens({"sep_token": "|"})
    with pytest.raises(ProvenanceMismatch, match="tokenizer differs"):
        add(made, tmp_path / "store").train()


@pytest.mark.parametrize(
    ("given", "options", "told"),
    [
        ({"optim": "sgd"}, {}, r"optimizer SGD keeps no exp_avg.*`sgd` or `sign`"),
        ({"optim": "adafactor"}, {}, r"keeps no exp_avg.*`sgd` or `sign`"),
        ({}, {"train_rows": []}, r"'train' has 0 rows"),
        ({}, {"target_rows": {"a": rows(0, 2), "b": []}}, r"'b' has 0 rows"),
        ({}, {"target_rows": [{"input_ids": [5] * 300}]}, r"longer than the model's context"),
        ({}, {"target_rows": [{"input_ids": [5, 600]}]}, r"embeddings for 512 tokens"),
        ({}, {"steps": [2, 9]}, r"steps names 9, the training ends at step 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(
    trainer: Make, tmp_path: Path, given: dict[str, Any], options: dict[str, Any], told: str
) -> None:
    made = add(trainer(**given), tmp_path / "store", **options)
    with pytest.raises(BadInput, match=f"(?s){told}"):
        made.train()
    assert made.state.global_step == (3 if "context" in told else 0)


def test_a_model_without_an_adapter_is_exported_and_trains_as_without(
    trainer: Make, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    def whole() -> Any:
        return AutoModelForCausalLM.from_pretrained(TINY / "model")

    options: dict[str, Any] = {"learning_rate": 1e-4, "max_steps": 2}
    alone = trainer(net=whole(), **options)
    alone.train()
    expected = state_of(alone)
    watched = add(trainer(net=whole(), **options), tmp_path / "store", every=1)
    watched.train()
    assert state_of(watched) == expected
    trains = [g for g in open_store(tmp_path / "store").generations() if g.role == "train"]
    assert [(g.name, int(g.usable.sum())) for g in trains] == [("train/1", 12), ("train/2", 12)]
    named = [line.split()[0] for line in trains[0].provenance["parameters"]]
    assert named
    assert all(name.endswith("_proj.weight") for name in named)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"steps": [0]}, "a step of `steps` is 0"),
        ({"every": 1.5}, "every is 1.5; give a whole number"),
        ({"proj_dims": 1}, r"'proj_dims' \(did you mean 'proj_dim'"),
        ({"gradient_type": "adma"}, "GradientStoreCallback.gradient_type is 'adma'"),
        ({"store": None}, "the store is None; give a path"),
        ({"trainer": 1}, "trainer is 1; give a transformers Trainer"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_told_where_it_is_given(options: dict[str, Any], told: str) -> None:
    class Stub:
        callback_handler = None

    given = {"trainer": Stub(), "store": "store", **options}
    with pytest.raises(BadInput, match=told):
        GradientStoreCallback(given.pop("trainer"), given.pop("store"), **given)


def test_sharded_models_and_packed_rows_are_refused(
    trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = add(trainer(), tmp_path / "store")
    callback = made.callback_handler.callbacks[-1]
    made.state.max_steps = 3
    with monkeypatch.context() as patch:
        patch.setattr(made, "is_fsdp_enabled", True)
        with pytest.raises(BadInput, match="under FSDP, which shards the model: use DDP"):
            callback.on_train_begin(made.args, made.state, made.control)
    monkeypatch.setattr(made.args, "packing", True, raising=False)
    with pytest.raises(BadInput, match="packing=False"):
        made.train()
    assert not (tmp_path / "store").exists()


def test_a_model_with_nothing_to_train_is_refused(trainer: Make, tmp_path: Path) -> None:
    net = model()
    made = add(trainer(net=net), tmp_path / "store", gradient_type="sgd")
    callback = made.callback_handler.callbacks[-1]
    for parameter in net.parameters():
        parameter.requires_grad = False
    made.state.max_steps = 3
    with pytest.raises(BadInput, match="no parameter of the model requires grad"):
        callback.on_train_begin(made.args, made.state, made.control)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_resumed_training_gives_an_export_the_rate_of_all_its_steps(
    schedule: str, trainer: Make, tmp_path: Path
) -> None:
    """`checkpoints="all"` weighs checkpoints by it."""

    def rates(store: str, resume: str | None, **changes: Any) -> dict[str, Any]:
        usual = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3,
                 "lr_scheduler_type": schedule}  # fmt: skip
        one = trainer(output_dir=str(tmp_path / store / "run"), **usual, **changes)
        one.add_callback(GradientStoreCallback(one, tmp_path / store / "s", every=2, proj_dim=64))
        one.train(resume_from_checkpoint=resume)
        found = open_store(tmp_path / store / "s").generations()
        return {g.name: g.record.learning_rate for g in found if g.name.startswith("train/")}

    whole = rates("whole", None)
    assert len(set(whole.values())) == 3, "it decays"
    resumed = rates("resumed", str(tmp_path / "whole" / "run" / "checkpoint-3"))
    assert resumed == {name: pytest.approx(whole[name]) for name in ("train/4", "train/6")}


@pytest.mark.parametrize("resumed", [2, 3])
def test_a_longer_training_counts_no_step_of_an_earlier_end_again(
    resumed: int, trainer: Make, tmp_path: Path
) -> None:
    """The first ends between two of `every`, where its last step is exported."""

    def train(steps: int, resume: str | None) -> None:
        one = trainer(output_dir=str(tmp_path / "run"), max_steps=steps, save_strategy="steps",
                      save_steps=1, lr_scheduler_type="constant_with_warmup",
                      warmup_steps=6)  # fmt: skip
        one.add_callback(GradientStoreCallback(one, tmp_path / "s", every=2, proj_dim=64))
        one.train(resume_from_checkpoint=resume)

    train(3, None)
    train(6, str(tmp_path / "run" / f"checkpoint-{resumed}"))

    found = {g.step: g.record.learning_rate for g in open_store(tmp_path / "s").generations()
             if g.name.startswith("train/")}  # fmt: skip
    assert sorted(found) == [2, 3, 4, 6]
    # The rate rises by a sixth a step: the fourth step alone since the export of step 3.
    assert found[4] == pytest.approx(1e-2 * 3 / 6)
