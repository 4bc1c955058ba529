"""DoReMi: E20 to E22, what the trainer makes of its weights, and its files (ALGORITHMS 2.3)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import resolve
from dataflex.data.mixture import exponentiated
from dataflex.data.rows import IGNORED, Domains, Rows, RunData
from dataflex.mixers.doremi import (
    DoremiMixer,
    clipped_sums,
    domain_scores,
    forget_after,
    loss_factors,
    tell_step,
)
from dataflex.trainers.weights import multipliers
from gradstore.errors import BadInput

VOCABULARY = 31
#: (prompt, answer) tokens of each row; the first five rows are of domain "a", the rest of "b".
LENGTHS = ((2, 5), (1, 1), (3, 4), (2, 2), (4, 9), (1, 7), (2, 1), (5, 3), (1, 12), (2, 6))


# -- worked numbers -------------------------------------------------------------------------------


def test_e20_excess_is_clipped_token_by_token_before_it_is_averaged() -> None:
    excess = np.array([0.5, -0.3, 0.2, 1.0, 0.0, -2.0])
    sums = clipped_sums(excess, np.array([0, 0, 0, 1, 1, 1]), 2)
    scores = domain_scores(sums, np.array([3, 3]), np.array([0, 1]), np.zeros(2))
    np.testing.assert_allclose(scores, [0.233333, 0.333333], atol=1e-5)


def test_e20_a_domain_is_averaged_over_its_tokens_not_its_samples() -> None:
    scores = domain_scores(np.array([1.0, 1.0]), np.array([1, 9]), np.zeros(2, int), np.zeros(1))
    np.testing.assert_allclose(scores, [0.2])


def test_e21_two_updates_and_their_average() -> None:
    first = exponentiated(np.full(3, 1 / 3), np.array([0.5, 0.2, 0.0]), 1.0, 1e-3)
    np.testing.assert_allclose(first, [0.425920, 0.315616, 0.258465], atol=1e-5)
    second = exponentiated(first, np.array([0.0, 0.2, 0.5]), 1.0, 1e-3)
    np.testing.assert_allclose(second, [0.344153, 0.311519, 0.344328], atol=1e-5)
    np.testing.assert_allclose((first + second) / 2, [0.385036, 0.313567, 0.301396], atol=1e-5)


def test_e21_the_strategy_itself_keeps_the_average_and_an_absent_domains_score() -> None:
    mixer = mixer_at_start(3, reweight_eta=1.0, reweight_eps=1e-3)
    weigh(mixer, step=0, excess=[0.5, 0.2, 0.0], domains=[0, 1, 2])
    np.testing.assert_allclose(mixer.domain_weights, [0.425920, 0.315616, 0.258465], atol=1e-5)
    weigh(mixer, step=1, excess=[0.0, 0.5], domains=[0, 2])
    np.testing.assert_allclose(mixer.domain_weights, [0.344153, 0.311519, 0.344328], atol=1e-5)
    np.testing.assert_allclose(mixer.average, [0.385036, 0.313567, 0.301396], atol=1e-5)


def test_e22_the_loss_is_weighted_by_tokens() -> None:
    tokens = np.array([3, 1])
    each = multipliers(np.array([0.6, 0.4]), tokens, relative=True)
    loss = (each * np.array([6.0, 4.0])).sum() / tokens.sum()
    assert loss == pytest.approx(2.363636, abs=1e-5)


def test_a_domains_part_of_the_loss_is_its_weight_however_often_it_is_drawn() -> None:
    """Drawn .9 / .1 with weights .5 / .5: without the division the parts would be .9 / .1."""
    factors = loss_factors(np.array([0.5, 0.5]), np.array([0.9, 0.1]))
    tokens = np.array([9.0, 1.0])
    part = factors * tokens / (factors * tokens).sum()
    np.testing.assert_allclose(part, [0.5, 0.5], atol=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12))
def test_uniform_sampling_leaves_the_weights_as_they_are(weights: list[float]) -> None:
    alpha, k = np.array(weights), len(weights)
    np.testing.assert_array_equal(loss_factors(alpha, np.full(k, 1 / k)), alpha)


# -- invariants -----------------------------------------------------------------------------------


@given(
    scores=st.lists(st.floats(0, 1e4), min_size=1, max_size=8),
    eta=st.floats(1e-3, 100),
    eps=st.floats(0, 1),
    steps=st.integers(1, 5),
)
def test_weights_stay_on_the_simplex_and_above_the_smoothing_share(
    scores: list[float], eta: float, eps: float, steps: int
) -> None:
    weights = np.full(len(scores), 1 / len(scores))
    for _ in range(steps):
        weights = exponentiated(weights, np.array(scores), eta, eps)
        assert weights.sum() == pytest.approx(1.0)
        assert (weights >= eps / len(scores) * (1 - 1e-12)).all()
    assert weights[np.argmax(scores)] >= weights.max() * (1 - 1e-12)


def test_a_sample_without_a_finite_excess_moves_nothing() -> None:
    domains, previous = np.array([0, 0, 1]), np.array([9.0, 8.0])
    scores = domain_scores(np.array([1.0, np.nan, np.inf]), np.array([2, 2, 2]), domains, previous)
    np.testing.assert_array_equal(scores, [0.5, 8.0])


def test_a_step_moves_the_weights_once_however_often_it_is_asked() -> None:
    mixer = mixer_at_start(2)
    first = weigh(mixer, step=4, excess=[1.0, 0.0], domains=[0, 1])
    again = weigh(mixer, step=4, excess=[0.0, 5.0], domains=[0, 1])
    np.testing.assert_array_equal(first, again)
    assert mixer.updates == 1


def test_state_and_restore_go_on_where_they_were() -> None:
    whole, half = mixer_at_start(2), mixer_at_start(2)
    for step, excess in enumerate(([0.3, 0.1], [0.2, 0.9], [0.0, 0.4])):
        weigh(whole, step, excess, [0, 1])
        if step < 2:
            weigh(half, step, excess, [0, 1])
    resumed = DoremiMixer("somewhere")
    resumed.restore(half.state())
    weigh(resumed, 2, [0.0, 0.4], [0, 1])
    np.testing.assert_array_equal(resumed.average, whole.average)


# -- the gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "accumulation"), [(6, 1), (3, 2), (1, 6)])
def test_the_gradient_is_that_of_the_written_formula(
    batch: int, accumulation: int, tmp_path: Path
) -> None:
    """The real trainer, rows of 1 to 12 target tokens, and weights that are far from equal."""
    found = {}
    for weights in ([0.99, 0.01], [0.01, 0.99]):
        trainer = trained(tmp_path, weights, batch, accumulation)
        rows = np.concatenate(trainer.served_rows(0))
        alpha = torch.tensor(weights, dtype=torch.float64)
        loss, gradient = written_formula(rows, alpha)
        error = (trainer.gradient - gradient).norm() / gradient.norm()
        assert error <= 1e-5
        assert trainer.logged_loss == pytest.approx(loss, rel=1e-4)
        found[weights[0]] = (loss, trainer.gradient, set(domains_of(rows).tolist()))
    one, other = found[0.99], found[0.01]
    assert one[2] == {0, 1}, "both domains are in the step"
    assert abs(one[0] - other[0]) > 1e-3
    assert (one[1] - other[1]).norm() > 0.1 * one[1].norm()


def test_the_gradient_divides_by_the_share_a_domain_is_drawn_in(tmp_path: Path) -> None:
    shares, weights = (0.75, 0.25), [0.4, 0.6]
    trainer = trained(tmp_path, weights, 6, 1, shares=shares)
    rows = np.concatenate(trainer.served_rows(0))
    alpha = torch.tensor([w / s for w, s in zip(weights, shares, strict=True)], dtype=torch.float64)
    loss, gradient = written_formula(rows, alpha)
    assert (trainer.gradient - gradient).norm() / gradient.norm() <= 1e-5
    assert trainer.logged_loss == pytest.approx(loss, rel=1e-4)
    undivided = written_formula(rows, torch.tensor(weights, dtype=torch.float64))[1]
    assert (trainer.gradient - undivided).norm() / gradient.norm() > 1e-2


@pytest.mark.parametrize(("accumulation", "smoothing"), [(1, 0.0), (3, 0.0), (1, 0.1), (3, 0.1)])
def test_the_weights_follow_the_excess_over_the_reference(
    accumulation: int, smoothing: float, tmp_path: Path
) -> None:
    """The formula by hand, over the whole accumulation window, against another model.

    Labels that are smoothed for training leave the excess what it is.
    """
    trainer = trained(tmp_path, None, 6 // accumulation, accumulation, reference_seed=5,
                      label_smoothing_factor=smoothing)  # fmt: skip
    rows = np.concatenate(trainer.served_rows(0))
    with torch.no_grad():
        excess = [
            (a - b).clamp(min=0)
            for a, b in zip(token_losses(tiny(0), rows), token_losses(tiny(5), rows), strict=True)
        ]
    scores = [float(torch.cat([e for e, d in zip(excess, domains_of(rows), strict=True)
                               if d == domain]).mean()) for domain in (0, 1)]  # fmt: skip
    strategy = trainer.run.strategy
    np.testing.assert_allclose(strategy.scores, scores, rtol=1e-5)
    expected = exponentiated(np.full(2, 0.5), np.array(scores), 1.0, 1e-3)
    np.testing.assert_allclose(strategy.domain_weights, expected, rtol=1e-6)
    gradient = written_formula(rows, torch.tensor(expected), smoothing)[1]
    assert (trainer.gradient - gradient).norm() / gradient.norm() <= 1e-5
    assert strategy.updates == 1


def test_checkpoints_keep_the_model_and_not_its_reference(tmp_path: Path) -> None:
    trainer = trained(tmp_path, None, 6, 1, reference_seed=5)
    names = set(trainer.model.state_dict())
    assert names == set(tiny(0).state_dict())


# -- files ----------------------------------------------------------------------------------------


def test_a_resume_forgets_the_steps_after_its_checkpoint(tmp_path: Path) -> None:
    for step in range(4):
        tell_step(tmp_path, step, ("a", "b"), np.array([0.5, 0.5]), np.zeros(2))
    path = tmp_path / "doremi_weights.jsonl"
    damaged = ["[" * 50_000, "[]", "{}", '{"step": null}', "\x00\x00"]
    path.write_text("\n".join([*damaged, path.read_text() + '{"step": 4, "dom']))
    (tmp_path / "doremi_average_weights.json").write_text("{}")
    forget_after(tmp_path, 1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
    assert not (tmp_path / "doremi_average_weights.json").exists()
    forget_after(tmp_path, -1)
    assert path.read_text() == ""


def test_the_results_are_written(tmp_path: Path) -> None:
    trained(tmp_path, None, 6, 1, reference_seed=5)
    lines = (tmp_path / "run" / "doremi_weights.jsonl").read_text().splitlines()
    (step,) = map(json.loads, lines)
    average = json.loads((tmp_path / "run" / "doremi_average_weights.json").read_text())
    assert step["domain_names"] == average["domain_names"] == ["a", "b"]
    assert step["domain_weights"] == average["average_weights"]
    assert average["update_times"] == 1
    text = (tmp_path / "run" / "doremi_step3_proportions.txt").read_text().splitlines()
    assert json.loads(text[0].split(":")[1]) == average["average_weights"]
    assert text[1] == f"a: {average['average_weights'][0]:.6f}"


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"reweight_eta": 0}, "reweight_eta is 0"),
        ({"reweight_eta": float("nan")}, "reweight_eta is nan"),
        ({"reweight_eps": 1.5}, "reweight_eps is 1.5"),
        ({"reweight_epsilon": 0.1}, "did you mean 'reweight_eps'"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, float], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        resolve("dynamic_mix", "doremi", params).build()


def test_a_reference_must_be_there(tmp_path: Path) -> None:
    nowhere = RunConfig(DataFlexConfig(), {}, Path("run.yaml"))
    for path, says in (
        (None, "reference_model_path is None"),
        (str(tmp_path / "absent"), "is not a folder"),
        (str(tmp_path), "neither config.json nor adapter_config.json"),
    ):
        (fault,) = DoremiMixer(path).check(nowhere)
        assert says in fault
    assert DoremiMixer("someone/a-hub-id").check(nowhere) == []


def test_a_reference_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"vocabulary of 40 tokens.* one of 31"):
        trained(tmp_path, None, 6, 1, reference_seed=1, vocabulary=40)


def test_a_hub_id_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'someone/no-such-model' cannot be loaded"):
        trained(tmp_path, None, 6, 1, reference="someone/no-such-model")


# -- helpers --------------------------------------------------------------------------------------


def mixer_at_start(k: int, **params: float) -> DoremiMixer:
    mixer = DoremiMixer("somewhere", **params)
    mixer.restore({"domain_weights": np.full(k, 1 / k), "scores": np.zeros(k),
                   "summed_weights": np.zeros(k), "updates": 0, "last_step": -1})  # fmt: skip
    return mixer


def weigh(mixer: DoremiMixer, step: int, excess: Sequence[float], domains: Sequence[int]) -> Any:
    context: Any = SimpleNamespace(
        step=step,
        measured=np.array(excess, dtype=np.float64)[:, None],
        tokens=np.ones(len(domains), dtype=np.int64),
        domains=np.array(domains, dtype=np.int64),
    )
    return mixer.weights(np.zeros(len(domains)), context)


def tiny(seed: int, vocabulary: int = VOCABULARY) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3,
    ))  # fmt: skip


def rows_of_the_domains() -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(3)
    rows = []
    for prompt, answer in LENGTHS:
        ids = draw.integers(3, VOCABULARY, prompt + answer).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def domains_of(rows: Any) -> Any:
    return np.repeat([0, 1], 5)[rows]


def padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])

    ids = filled("input_ids", 0)
    return {"input_ids": ids, "labels": filled("labels", IGNORED),
            "attention_mask": (ids > 0).long()}  # fmt: skip


def token_losses(model: nn.Module, rows: Any, smoothing: float = 0.0) -> list[torch.Tensor]:
    """Of each row by itself, in double precision: no padding, no batch, no trainer."""
    model = model.double().eval()
    found = []
    for i in rows.tolist():
        row = rows_of_the_domains()[i]
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids).logits[0, :-1]
        chosen = labels[1:] != IGNORED
        found.append(
            functional.cross_entropy(
                logits[chosen], labels[1:][chosen], reduction="none", label_smoothing=smoothing
            )
        )
    return found


def written_formula(
    rows: Any, alpha: torch.Tensor, smoothing: float = 0.0
) -> tuple[float, torch.Tensor]:
    """Sum over tokens of alpha * loss, by the sum over tokens of alpha; and its gradient."""
    model = tiny(0).double()
    each = token_losses(model, rows, smoothing)
    factors = [alpha[d].expand(len(e)) for e, d in zip(each, domains_of(rows), strict=True)]
    loss = (torch.cat(factors) * torch.cat(each)).sum() / torch.cat(factors).sum()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def trained(
    folder: Path,
    weights: list[float] | None,
    batch: int,
    accumulation: int,
    *,
    reference_seed: int = 0,
    vocabulary: int = VOCABULARY,
    reference: str | None = None,
    label_smoothing_factor: float = 0.0,
    shares: tuple[float, float] | None = None,
) -> Any:
    """One optimizer step of the real trainer.

    With `weights` the domain weights are those: the reference is the model itself, so nothing is
    in excess, and nothing is smoothed.
    """
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from dataflex.config.presets import Component
    from dataflex.data.order import BatchShape
    from dataflex.run.ranks import Ranks
    from dataflex.trainers.job import Job, Run
    from dataflex.trainers.mix import MixSeam
    from dataflex.trainers.seam import trainer_class

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients = [p.grad.flatten() for p in kwargs["model"].parameters()]
            trainer.gradient = torch.cat(gradients).double()

    if reference is None:
        reference = str(folder / "reference")
        tiny(reference_seed, vocabulary).save_pretrained(reference)
    strategy = DoremiMixer(reference, 1.0, 0.0 if weights else 1e-3)
    if weights:
        strategy.restore({"domain_weights": weights, "scores": [0, 0], "summed_weights": weights,
                          "updates": 1, "last_step": -1})  # fmt: skip
    ours = DataFlexConfig(train_type="dynamic_mix", component_name="doremi", update_step=1,
                          init_mixture_proportions=shares)  # fmt: skip
    config = RunConfig(ours, {"output_dir": str(folder / "run"), "dataset": "a,b"}, Path("x.yaml"))
    nothing: Any = None
    rows = Rows("train", Dataset.from_list(rows_of_the_domains()))
    domains = Domains(("a", "b"), np.repeat(np.arange(2), 5))
    data = RunData(rows, (), nothing, "default", nothing, "sft", domains)
    args = TrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation, max_grad_norm=0.0, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
        label_smoothing_factor=label_smoothing_factor,
    )  # fmt: skip
    component = Component("mixer", "doremi", DoremiMixer, {})
    job = Job(config, component, strategy, data, args, BatchShape.of(args), Ranks())
    run = Run(**vars(job), schedule=MixSeam.plan(job), run_id="id")
    trainer = trainer_class(MixSeam, Trainer, run)(
        model=tiny(0), args=args, train_dataset=rows.dataset, data_collator=padded,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    trainer.logged_loss = trainer.state.log_history[0]["loss"]
    return trainer
