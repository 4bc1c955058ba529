"""The mirror selector: scores by an explicit loop, the target's rule, what it refuses and costs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dataflex.config.presets import resolve
from dataflex.data.rows import Rows, RunData
from dataflex.models.passes import row_losses
from dataflex.models.trained import ShortTraining, trained_on
from dataflex.run.board import Scoreboard
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.forecast import Forecast, print_forecasts
from dataflex.selectors.mirror import MirrorSelector, falls_of
from gradstore.errors import BadInput

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model"

#: Answers go round a ring of 7 tokens, twice, by steps of 1, 2, 3 or 4: the rule. Questions are
#: alike under all rules, and every answer holds each token twice.
RULES, RING = 4, 7


def row_by(rule: int, rng: np.random.Generator) -> dict[str, Any]:
    question = rng.integers(40, 60, 3).tolist()
    start = int(rng.integers(RING))
    answer = [20 + (start + j * (rule + 1)) % RING for j in range(2 * RING)]
    return {"input_ids": question + answer, "labels": [-100] * 3 + answer}


def rows_by(name: str, rules: Any, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(name, Dataset.from_list([row_by(int(rule), rng) for rule in rules]))


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32)
    return get_peft_model(found, LoraConfig(r=8, target_modules="all-linear", lora_dropout=0.2))


def run_of(model: Any, train: Rows, *targets: Rows, sizes: list[int] | None = None) -> RunContext:
    anything: Any = None
    data = RunData(train, targets, anything, "default", anything, "sft", anything)
    config: Any = SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=sizes))
    run = RunContext(config, data, collate, model, TINY, "id", 0, shows_progress=False)

    def measure(positions: Any, *, max_rows: int) -> Any:
        return row_losses(run, positions, max_rows=max_rows)

    return replace(run, board=Scoreboard(train, measure))


def boundary(run: RunContext, step: int = 3, pool: Any = None, rate: float = 5e-3) -> UpdateContext:
    optimizer = SimpleNamespace(param_groups=[{"initial_lr": 4e-3, "lr": 0.0}])
    return UpdateContext(run, step, 1, 2, rate, optimizer, pool)


@pytest.fixture
def small(model: Any) -> RunContext:
    train = rows_by("train", np.arange(8) % RULES, 1)
    return run_of(model, train, rows_by("a", [0] * 4, 2), rows_by("b", [1] * 5, 3))


def explicit(run: RunContext, index: int, step: int) -> Any:
    """(n,) falls by plain loops: the selector's promise, word by word, with seed 42."""
    model, target = copy.deepcopy(run.model).eval(), run.data.targets[index]

    def loss(rows: Rows, i: int) -> Any:
        return model(**collate([rows.dataset[i]])).loss

    def losses() -> Any:
        with torch.no_grad():
            return np.array([loss(run.data.train, i).item() for i in range(len(run.data.train))])

    before = losses()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 5e-3, weight_decay=0.0)
    for epoch in range(2):
        order = np.random.default_rng([42, step, index, epoch]).permutation(len(target))
        for start in range(0, len(order), 3):
            chosen = order[start : start + 3].tolist()
            optimizer.zero_grad()
            (sum(loss(target, i) for i in chosen) / len(chosen)).backward()
            optimizer.step()
    return before, before - losses()


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("relative", [False, True])
def test_scores_are_those_of_an_explicit_loop(
    small: RunContext, aggregation: Any, relative: bool
) -> None:
    selector = MirrorSelector(
        target_epochs=2, batch_size=3, relative=relative, aggregation=aggregation
    )
    answer = selector.select(8, boundary(small))
    falls = []
    for index in range(2):
        before, fall = explicit(small, index, 3)
        falls.append(fall / before if relative else fall)
    folded = np.max(falls, axis=0) if aggregation == "max" else np.mean(falls, axis=0)
    assert sorted(answer.indices.tolist()) == list(range(8))
    np.testing.assert_allclose(answer.scores, folded[answer.indices], rtol=2e-3, atol=1e-4)
    assert (np.diff(answer.scores) <= 0).all(), "best first"
    winners = np.argmax(falls, axis=0)
    won = {"a": int((winners == 0).sum()), "b": int((winners == 1).sum())}
    assert answer.manifest["won"] == (won if aggregation == "max" else {})
    assert (answer.target_rows, answer.tokens) == (9, 17 * (8 + 2 * 8 + 2 * 9))
    assert answer.numbers["target_loss_last"] < answer.numbers["target_loss_first"]


def test_it_finds_the_rows_of_the_targets_rule_where_questions_and_bags_are_alike(
    model: Any,
) -> None:
    """Chance is .25; the model has seen every rule a little, as after some steps of a run."""
    rules = np.arange(64) % RULES
    train = rows_by("train", rules, 4)
    with trained_on(run_of(model, train), train, np.arange(64), ShortTraining(8, 5e-3, 8), [9]):
        for rule in (1, 3):
            run = run_of(model, train, rows_by("target", [rule] * 24, 5 + rule))
            answer = MirrorSelector().select(16, boundary(run))
            assert (rules[answer.indices] == rule).mean() >= 0.8


def test_the_same_seed_gives_the_same_bits_and_the_step_another_order(small: RunContext) -> None:
    selector = MirrorSelector(target_epochs=1, batch_size=2)
    first = selector.select(8, boundary(small))
    again = MirrorSelector(target_epochs=1, batch_size=2).select(8, boundary(small))
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(first.scores, again.scores)
    assert selector.state() == {}, "a resume needs nothing but the step"
    later = selector.select(8, boundary(small, step=4))
    other = MirrorSelector(target_epochs=1, batch_size=2, seed=1).select(8, boundary(small))
    assert set(first.scores) != set(later.scores)
    assert set(first.scores) != set(other.scores)


def test_only_rows_of_the_pool_are_scored_and_chosen(small: RunContext) -> None:
    answer = MirrorSelector(target_epochs=1).select(2, boundary(small, pool=np.array([1, 4, 6])))
    assert set(answer.indices.tolist()) <= {1, 4, 6}
    assert sum(answer.manifest["all_scores"]["counts"]) == 3
    with pytest.raises(BadInput, match="4"):
        MirrorSelector(target_epochs=1).select(4, boundary(small, pool=np.array([1, 4, 6])))


def test_losses_of_an_older_model_are_not_compared_with(small: RunContext) -> None:
    """A pipeline may let its stages take losses some steps old; here they would be scores."""
    board = small.board
    assert board is not None
    fresh = MirrorSelector(target_epochs=1).select(8, boundary(small, step=11))
    stale = Scoreboard(small.data.train, lambda *_, **__: np.full(8, 1e6))
    stale.losses(10)
    stale._measure = board._measure
    run = replace(small, board=stale.view(max_age=5, max_rows=2))
    answer = MirrorSelector(target_epochs=1).select(8, boundary(run, step=11))
    np.testing.assert_allclose(answer.scores, fresh.scores, rtol=1e-4, atol=1e-6)


def test_the_learning_rate_is_the_runs_unless_it_is_given(small: RunContext) -> None:
    def used(selector: MirrorSelector, rate: float) -> float:
        return float(selector.select(1, boundary(small, rate=rate)).manifest["learning_rate"])

    assert used(MirrorSelector(target_epochs=1), 3e-4) == 3e-4
    assert used(MirrorSelector(target_epochs=1), 0.0) == 4e-3, "before a warm-up: its highest"
    assert used(MirrorSelector(target_epochs=1, learning_rate=1e-4), 3e-4) == 1e-4


def test_subtasks_of_one_set_are_trained_on_one_by_one(model: Any, small: RunContext) -> None:
    joined = rows_by("both", [0, 0, 0, 1, 1], 8)
    run = run_of(model, small.data.train, joined, sizes=[3, 2])
    answer = MirrorSelector(target_epochs=1).select(8, boundary(run))
    assert set(answer.manifest["won"]) == {"both[0]", "both[1]"}
    assert sum(answer.manifest["won"].values()) == 8


def test_a_target_or_a_model_without_anything_to_train_is_refused_at_the_start(
    model: Any, small: RunContext
) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    masked = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    target = Rows("half", Dataset.from_list([row, masked]))
    run = run_of(model, small.data.train, target, sizes=[1, 1])
    with pytest.raises(BadInput, match=r"none of the 1 rows of target 'half\[1\]' has a target"):
        MirrorSelector().start(run)
    MirrorSelector().start(run_of(model, small.data.train, target))
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(BadInput, match="no parameter of the model is trained"):
        MirrorSelector().start(replace(small, model=frozen))


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"target_epochs": 0}, "target_epochs is 0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"relative": 1}, "relative is 1"),
        ({"aggregation": "sum"}, "aggregation is 'sum'"),
        ({"tokens_per_batch": 0}, "tokens_per_batch is 0"),
        ({"score_batch_size": 0}, "score_batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"epochs": 3}, "epochs"),
    ],
)
def test_parameters_out_of_range_are_refused_with_the_configuration(
    params: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        resolve("dynamic_select", "mirror", params).build()


def test_a_row_with_no_loss_left_counts_little_where_falls_are_relative() -> None:
    before, after = np.array([0.0, 2.0, np.nan]), np.array([[0.0], [1.0], [1.0]])
    np.testing.assert_array_equal(falls_of(before, after, relative=True), [[0], [0.5], [np.nan]])
    np.testing.assert_array_equal(falls_of(before, after, relative=False), [[0], [1], [np.nan]])


def test_the_forecast_names_every_pass_and_leaves_the_model(
    small: RunContext, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [p.detach().clone() for p in small.model.parameters()]
    found = MirrorSelector(target_epochs=3).forecasts(small, [2, 5])
    told = [(f.what, f.times, f.rows, f.tokens, f.shared) for f in found]
    assert told == [
        ("losses of train", 2, 8, 8 * 17, True),
        ("losses of train, after the target", 4, 8, 8 * 17, True),
        ("training on a", 2, 12, 12 * 17, False),
        ("training on b", 2, 15, 15 * 17, False),
    ]
    assert all(f.seconds and f.seconds > 0 for f in found)
    assert all((p == q).all() for p, q in zip(small.model.parameters(), before, strict=True))

    passes = [Forecast("losses", 1, seconds=8.0), Forecast("short", 1, seconds=8.0, shared=False)]
    print_forecasts(passes, world=4)
    assert "in all about 10 s" in capsys.readouterr().out, "every process trains on the target"
