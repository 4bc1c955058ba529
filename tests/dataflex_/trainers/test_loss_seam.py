"""Weighted losses through transformers' own Trainer, on a model whose losses are known."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.data.rows import Rows, RunData
from dataflex.run.ranks import Ranks
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.trainers.job import Job, Run
from dataflex.trainers.loss_seam import LossSeam
from dataflex.trainers.sealing import Sealer
from dataflex.trainers.seam import trainer_class
from dataflex.trainers.weight import WeightSeam
from dataflex.weighters.base import FloatArray, MeasuredBatch, WeightContext, Weighter
from dataflex.weighters.loss import LossWeighter
from gradstore.errors import BadInput

TOKENS = 5  # of a row; the first is not predicted


class Bigram(nn.Module):
    """Row i holds token i alone, which costs `losses[i]` to predict."""

    def __init__(self, losses: Sequence[float]) -> None:
        super().__init__()
        size = len(losses)
        logits = torch.zeros(size, size)
        for i, loss in enumerate(losses):
            logits[i, i] = -math.log(math.expm1(loss) / (size - 1)) if loss == loss else loss
        self.table = nn.Embedding.from_pretrained(logits, freeze=False)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        logits = self.table(input_ids)
        loss = None
        if labels is not None:
            items = kwargs.get("num_items_in_batch")
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(),
                reduction="mean" if items is None else "sum",
            )  # fmt: skip
            loss = loss if items is None else loss / items
        return CausalLMOutput(loss=loss, logits=logits)


class BigramOfOldTimes(Bigram):
    """Takes no count of items: the Trainer averages micro-batches."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None
    ) -> CausalLMOutput:
        return super().forward(input_ids, labels)


class Balanced(Bigram):
    """Adds a loss of its own, as mixtures of experts do."""

    config = SimpleNamespace(router_aux_loss_coef=0.5, use_cache=False)

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        outputs = super().forward(input_ids, labels, **kwargs)
        outputs["aux_loss"] = self.table.weight.pow(2).mean()
        if labels is not None:
            outputs["loss"] = outputs["loss"] + 0.5 * outputs["aux_loss"]
        return outputs


class Told(Weighter):
    """Weights by the token a row consists of, taken from `measure`."""

    measures: ClassVar[bool] = True

    def __init__(self, table: Sequence[float], scope: Any = "micro", relative: bool = True) -> None:
        self.table, self.scope, self.relative = np.asarray(table), scope, relative
        self.asked: list[FloatArray] = []
        self.refreshed: list[int] = []

    def refresh(self, run: Any, step: int) -> None:
        self.refreshed.append(step)

    def measure(self, batch: MeasuredBatch) -> FloatArray:
        return batch.inputs["input_ids"][:, :1].double().numpy()

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        self.asked.append(losses)
        assert context.measured is not None
        return self.table[context.measured[:, 0].astype(int)]


MakeTrainer = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> MakeTrainer:
    """Trainer of `losses` in order, 2 rows a micro-batch; SGD with a rate of 1, so steps show."""

    def trainer(
        losses: Sequence[float],
        weighter: Weighter | None,
        *,
        accumulation: int = 2,
        model: type[Bigram] = Bigram,
        ours: dict[str, Any] | None = None,
        **more: Any,
    ) -> Any:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        rows = [{"input_ids": [i] * TOKENS, "labels": [-100] + [i] * (TOKENS - 1)}
                for i in range(len(losses))]  # fmt: skip
        settings = {
            "output_dir": str(folder), "per_device_train_batch_size": 2, "learning_rate": 1.0,
            "gradient_accumulation_steps": accumulation, "num_train_epochs": 1, "report_to": "none",
            "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "use_cpu": True,
            "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, **more,
        }  # fmt: skip
        dataset = Dataset.from_list(rows)
        keywords: dict[str, Any] = {
            "model": model(losses),
            "args": TrainingArguments(**cast("Any", settings)),
            "train_dataset": dataset,
            "eval_dataset": dataset,
            "data_collator": lambda batch: {k: torch.tensor([r[k] for r in batch])
                                            for k in ("input_ids", "labels")},
        }  # fmt: skip
        sampled = type("InOrder", (Trainer,), {"_get_train_sampler": lambda self, *_: None})
        if weighter is None:
            return sampled(**keywords)
        config = RunConfig(DataFlexConfig(train_type="dynamic_weight", **(ours or {})),
                           {"output_dir": str(folder)}, folder / "run.yaml")  # fmt: skip
        data = RunData(Rows("train", dataset), (), None, "default", None, "sft")
        args = keywords["args"]
        job = Job(config, Component("weighter", "told", type(weighter), {}), weighter, data, args,
                  BatchShape.of(args), Ranks())  # fmt: skip
        run = Run(**vars(job), schedule=WeightSeam.plan(job), run_id="id")
        return trainer_class(WeightSeam, sampled, run)(**keywords)

    return trainer


def trained(trainer: Any) -> tuple[float, torch.Tensor]:
    """The loss it logs, and the model's table afterwards."""
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return logged[0], trainer.model.table.weight.detach().clone()


def test_e4_through_the_trainer(make: MakeTrainer) -> None:
    for weighter in (LossWeighter("uniform"), Told([1, 1, 1]), Told([2, 2, 2], "window")):
        assert trained(make([1, 3, 5], weighter))[0] == pytest.approx(3.0, abs=1e-5)
    assert trained(make([1, 3, 5], LossWeighter("uniform"), model=BigramOfOldTimes))[0] == (
        pytest.approx(3.0, abs=1e-5)
    )


@pytest.mark.parametrize("model", [Bigram, Balanced])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_equal_weights_take_the_plain_trainers_step(
    model: type[Bigram], accumulation: int, make: MakeTrainer
) -> None:
    losses = [1.0, 3.0, 5.0, 0.5, 2.0]
    plain = trained(make(losses, None, model=model, accumulation=accumulation))
    equal = trained(make(losses, LossWeighter("uniform"), model=model, accumulation=accumulation))
    assert equal[0] == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(equal[1], plain[1], rtol=1e-6, atol=1e-6)


def test_weights_of_a_window_have_one_denominator(make: MakeTrainer) -> None:
    weighter = Told([1, 2, 5], "window")
    loss, _ = trained(make([1, 3, 5], weighter))
    assert loss == pytest.approx((1 * 1 + 2 * 3 + 5 * 5) / 8, abs=1e-5)
    assert len(weighter.asked) == 1, "asked once, for all micro-batches of the step"
    np.testing.assert_allclose(weighter.asked[0], [1, 3, 5], atol=1e-5)


def test_weights_of_a_micro_batch_keep_its_share(make: MakeTrainer) -> None:
    loss, _ = trained(make([1, 3, 5], Told([1, 3, 7])))
    assert loss == pytest.approx((2 * (1 * 1 + 3 * 3) / 4 + 5) / 3, abs=1e-5)


def test_absolute_weights_change_the_size_of_the_step(make: MakeTrainer) -> None:
    loss, _ = trained(make([1, 3, 5], Told([0.5, 0.25, 1], relative=False)))
    assert loss == pytest.approx((0.5 * 1 + 0.25 * 3 + 5) / 3, abs=1e-5)


def test_several_contributors_multiply(make: MakeTrainer) -> None:
    trainer = make([1, 3, 5], Told([1, 2, 5], "window"))
    trainer.contributors = lambda step: (trainer.run.strategy, Told([3, 1, 0.4]))
    assert trained(trainer)[0] == pytest.approx((3 * 1 + 2 * 3 + 2 * 5) / 7, abs=1e-5)


def test_one_relative_contributor_makes_the_product_relative(make: MakeTrainer) -> None:
    trainer = make([1, 3, 5], Told([1, 2, 5], "window"))
    absolute = Told([0.3, 0.1, 0.04], relative=False)
    trainer.contributors = lambda step: (absolute, trainer.run.strategy)
    assert trained(trainer)[0] == pytest.approx((3 * 1 + 2 * 3 + 2 * 5) / 7, abs=1e-5)


def test_a_weighter_may_answer_nan_where_the_loss_is(make: MakeTrainer) -> None:
    class Own(Told):
        def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
            return losses

    loss, _ = trained(make([1, float("nan"), 5, 3], Own([1] * 4, "window")))
    assert loss == pytest.approx((1 * 1 + 5 * 5 + 3 * 3) / 9, abs=1e-5)


@pytest.mark.parametrize("scope", ["micro", "window"])
def test_a_sample_without_a_finite_loss_spoils_nothing(
    scope: str, make: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own row of the table aside, the step is that of the other samples."""
    nan = float("nan")
    with caplog.at_level(logging.WARNING):
        loss, table = trained(make([1, nan, nan, 5], Told([1, 1, 1, 2], scope)))
    assert "a non-finite loss get weight 0" in caplog.text
    assert caplog.text.count("logged once") == 1
    clean = make([1, 3, 4, 5], Told([1, 0, 0, 2], scope, relative=scope == "window"))
    expected_loss, expected = trained(clean)
    assert torch.isfinite(table[[0, 3]]).all()
    if scope == "window":
        assert loss == pytest.approx(expected_loss, abs=1e-5)
        torch.testing.assert_close(table[[0, 3]], expected[[0, 3]], atol=1e-5, rtol=1e-5)


def test_a_micro_batch_of_spoilt_samples_alone_teaches_nothing(make: MakeTrainer) -> None:
    nan = float("nan")
    loss, table = trained(make([nan, nan, 5, 4], Told([1, 1, 1, 1])))
    assert math.isfinite(loss)
    assert torch.isfinite(table[2:]).all()


def test_weights_of_zero_give_no_gradient_and_one_warning(
    make: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make([1, 3, 5, 2, 4], Told([0] * 5), accumulation=1)
    before = trainer.model.table.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        loss, table = trained(trainer)
    assert loss == 0
    torch.testing.assert_close(table, before, rtol=0, atol=0)
    assert caplog.text.count("all weights are 0") == 1


def test_smoothed_labels_have_one_denominator_too(make: MakeTrainer) -> None:
    """The Trainer adds up the means of micro-batches here; ours is one mean, however cut."""

    class Configured(Bigram):
        config = SimpleNamespace(use_cache=False)

    steps = [
        trained(
            make([1, 3, 5, 2], Told([1, 2, 1, 1], "window"), model=Configured,
                 accumulation=accumulation, per_device_train_batch_size=4 // accumulation,
                 label_smoothing_factor=0.1)
        )
        for accumulation in (1, 2)
    ]  # fmt: skip
    assert steps[0][0] == pytest.approx(steps[1][0], abs=1e-5)
    torch.testing.assert_close(steps[0][1], steps[1][1], atol=1e-5, rtol=1e-5)


def test_what_was_measured_with_the_window_is_not_measured_again(make: MakeTrainer) -> None:
    class Counting(Told):
        calls = 0

        def measure(self, batch: MeasuredBatch) -> FloatArray:
            self.calls += 1
            return super().measure(batch)

    for scope in ("window", "micro"):
        weighter = Counting([1, 2, 1, 1, 1, 1], scope)
        trained(make([1, 3, 5, 2, 4, 6], weighter, accumulation=3))
        assert weighter.calls == 3, scope


def test_losses_that_are_not_finite_are_told_where_nobody_weights(
    make: MakeTrainer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WeightSeam, "contributors", lambda *_: ())
    monkeypatch.setattr(WeightSeam, "observes", lambda *_: True)
    with caplog.at_level(logging.WARNING):
        make([1, float("nan"), 5, 2], Told([1] * 4), accumulation=1).train()
    assert caplog.text.count("samples have a loss that is not finite") == 1


@pytest.mark.parametrize("spread", [FSDP, ZERO3])
def test_passes_over_a_model_in_pieces_are_refused(
    spread: str, make: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make([1, 3, 5], Told([1, 1, 1]))
    trainer.is_fsdp_enabled = spread == FSDP
    plugin = SimpleNamespace(zero_stage=3) if spread == ZERO3 else None
    state = SimpleNamespace(deepspeed_plugin=plugin)
    monkeypatch.setattr(trainer, "accelerator", SimpleNamespace(state=state))
    trainer.run.strategy.whole_model = frozenset({spread})
    with pytest.raises(BadInput, match=f"cannot be made under {spread}: use DDP"):
        trainer.train()


def test_evaluation_keeps_the_plain_loss(make: MakeTrainer) -> None:
    trainer = make([1, 3, 5], Told([1, 0, 0]))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(3.0, abs=1e-5)
    assert trainer.run.strategy.asked == []


def test_the_plain_loss_runs_until_step_w(make: MakeTrainer) -> None:
    weighter = Told([1, 0, 1, 1, 1, 0])
    losses = [1, 3, 5, 2, 4, 6]
    trainer = make(losses, weighter, accumulation=1, ours={"warmup_step": 1})
    trainer.train()
    logged = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert logged[0] == pytest.approx(2.0, abs=1e-5)
    assert logged[2] == pytest.approx(4.0, abs=1e-5)
    assert weighter.refreshed == [1, 2]
    assert trainer.run.schedule.budget == 3


def test_train_step_ends_the_run(make: MakeTrainer) -> None:
    trainer = make([1, 3, 5, 2], Told([1] * 4), accumulation=1, ours={"train_step": 7})
    trainer.train()
    assert trainer.state.global_step == trainer.run.schedule.budget == 7


def test_what_samples_counted_is_told_at_log_lines_and_at_the_end(make: MakeTrainer) -> None:
    trainer = make([1, 3, 5, 2, 4, 6], Told([1, 3, 1, 1, 0, 1]), accumulation=1, logging_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert lines[0]["dataflex/weight_max"] == pytest.approx(1.5)
    assert lines[0]["dataflex/weight_min"] == pytest.approx(0.5)
    assert lines[0]["dataflex/weight_mean"] == pytest.approx(1.0)
    assert lines[0]["dataflex/effective_share"] == pytest.approx(16 / (4 * 4.5))
    folder = Path(trainer.args.output_dir) / "dataflex"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [2, 3], "step 3 has no line but the last"
    assert events[0]["event"] == "weight"
    assert events[0]["component"] == "told"
    assert events[0]["weight_max"] == pytest.approx(1.5)
    assert set(events[0]) >= {"weight_min", "weight_mean", "effective_share"}


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0], r"answered shape \(1,\)"),
        ([1.0, -2.0], "answered -2"),
        ([1, np.inf], "answered inf"),
    ],
)
def test_a_wrong_answer_of_a_weighter_is_refused(
    answer: list[float], says: str, make: MakeTrainer
) -> None:
    class Wrong(Told):
        def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
            return np.array(answer)

    with pytest.raises(BadInput, match=says):
        make([1, 3], Wrong([1, 1])).train()


def test_a_step_that_is_only_watched_is_bit_for_bit_the_plain_one(make: MakeTrainer) -> None:
    seen: list[np.ndarray] = []
    trainer = make([1, 3, 5], Told([1] * 3), ours={"warmup_step": 5})
    trainer.observes = lambda step: True
    trainer.after_step = lambda stats, rows: seen.append(stats.losses)
    watched, plain = trained(trainer), trained(make([1, 3, 5], None))
    assert watched[0] == plain[0]
    assert torch.equal(watched[1], plain[1])
    np.testing.assert_allclose(seen, [[1, 3, 5]], atol=1e-5)


def test_a_trainer_that_trains_twice_seals_once_and_last(make: MakeTrainer) -> None:
    trainer = make([1, 3], Told([1, 1]))
    trainer.train()
    trainer.add_callback(TrainerCallback())  # such as one that LlamaFactory adds later
    trainer.train()
    sealers = [isinstance(each, Sealer) for each in trainer.callback_handler.callbacks]
    assert sealers.index(True) == len(sealers) - 1


def test_one_sample_at_a_time_is_told(make: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make([1, 3], LossWeighter(), per_device_train_batch_size=1, accumulation=1)
        assert "one sample is weighted at a time" in caplog.text
        caplog.clear()
        make([1, 3], LossWeighter(), per_device_train_batch_size=1, accumulation=2)
        assert "one sample" not in caplog.text
        make([1, 3], Told([1, 1]), per_device_train_batch_size=1, accumulation=2)
        assert "raise per_device_train_batch_size" in caplog.text


def test_steps_that_no_line_of_training_came_after_are_in_the_last_line(logging_seam: Any) -> None:
    """A run shorter than `logging_steps` has no other line."""
    made, lines = logging_seam(LossSeam)
    updates: list[str] = []
    made._pending = [np.array([0.5, 1.5])]
    made.state = SimpleNamespace(global_step=3)
    made.run = SimpleNamespace(ranks=Ranks(), name="loss")
    made.log_files = SimpleNamespace(update=lambda kind, *_, **__: updates.append(kind))
    made.log({"eval_loss": 1.0})
    made.log({"train_runtime": 2.0})
    assert updates == ["weight"]
    assert lines[0] == {"eval_loss": 1.0}
    assert lines[1]["dataflex/weight_max"] == 1.5
