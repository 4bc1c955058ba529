"""Forecasts come from the strategies themselves, a user's own included."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.api import Forecast, Mixer, Selection, Selector, Strategy
from dataflex.config.registry import PACKAGES, strategies
from dataflex.data.rows import Domains
from dataflex.features import forecasts
from dataflex.launch import dry_run
from dataflex.mixers.dynamic_moe import DynamicMoeMixer
from dataflex.run import forecast
from dataflex.run.board import Scoreboard
from dataflex.run.forecast import (
    SLOW_ROW_SECONDS,
    measured_seconds,
    padded_tokens,
    print_forecasts,
)
from dataflex.run.strategy import adapt, ask_forecasts
from dataflex.selectors.coincide import CoincideSelector
from dataflex.selectors.less import LessSelector
from dataflex.selectors.nice import NiceSelector
from dataflex.weighters.adapt import AdaptWeighter
from dataflex.weighters.joint_update_aware import JointUpdateAwareWeighter
from gradstore.errors import BadInput


def run_of(lengths: Sequence[int], asked: list[int]) -> Any:
    """A run whose board notes how many rows it measures at once."""
    train = SimpleNamespace(name="train", lengths=np.array(lengths))
    rows: Any = type("Train", (), {**vars(train), "__len__": lambda _: len(lengths)})()

    def measure(positions: Any, *, max_rows: int) -> Any:
        asked.append(len(positions))
        return np.zeros(len(lengths))

    return SimpleNamespace(data=SimpleNamespace(train=rows), board=Scoreboard(rows, measure))


class Own:
    """A user's class that only looks like a selector."""

    def select(self, count: int, context: Any) -> Selection:
        return Selection(np.arange(count))


class ByLoss(Own):
    scores_by_loss = True


class ByGradient(Own):
    needs_lora = True


class Telling(Own):
    needs_lora = True

    def forecasts(self, run: Any, steps: Sequence[int]) -> Any:
        return [Forecast("my pass", len(steps), 7, 70, 1.5)]


def test_a_users_class_is_asked_for_its_passes() -> None:
    assert ask_forecasts(adapt(Telling(), Selector), None, [2, 4]) == [  # type: ignore[arg-type]
        Forecast("my pass", 2, 7, 70, 1.5)
    ]


def test_losses_that_a_class_declares_are_measured_by_every_row_that_is_asked_for() -> None:
    asked: list[int] = []
    (found,) = ask_forecasts(adapt(ByLoss(), Selector), run_of([4, 8, 8, 4], asked), [0, 3, 6])
    assert (found.what, found.times, found.rows, found.tokens) == ("losses of train", 3, 4, 24)
    assert found.seconds is not None
    assert asked == [1, 4]  # the first row again: the board kept no loss of it


def test_passes_that_a_class_only_declares_are_named_as_not_measured(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = ask_forecasts(adapt(ByGradient(), Selector), run_of([4], []), [0])
    print_forecasts([*found, Forecast("else", 1, 1, 1, 2.0, stored_bytes=15 << 20)], world=1)
    shown = capsys.readouterr().out
    assert "passes of ByGradient" in shown
    assert "not measured" in shown
    assert "15 MiB" in shown
    assert "in all about 2 s and 15 MiB in the store" in shown


def test_a_strategy_without_passes_and_one_never_asked_forecast_nothing() -> None:
    assert ask_forecasts(adapt(Own(), Selector), run_of([4], []), [0]) == []
    assert ask_forecasts(adapt(ByLoss(), Selector), run_of([4], []), []) == []


@pytest.mark.parametrize("answer", [None, Forecast("one", 1), ["text"]])
def test_another_answer_is_refused(answer: Any) -> None:
    class Odd(Mixer):
        def forecasts(self, run: Any, steps: Sequence[int]) -> Any:
            return answer

    if isinstance(answer, Forecast):
        assert ask_forecasts(Odd(), run_of([4], []), [0]) == [answer]
        return
    with pytest.raises(BadInput, match=r"Odd\.forecasts answered a (NoneType|str); expected"):
        ask_forecasts(Odd(), run_of([4], []), [0])


def test_every_strategy_of_ours_that_declares_passes_forecasts_them() -> None:
    declares = ("needs_lora", "needs_moments", "needs_targets")
    for kind in PACKAGES:
        for name, cls in strategies(kind).items():
            if not cls.__module__.startswith("dataflex."):
                continue
            strategy: Any = cls
            silent = strategy.forecasts is Strategy.forecasts
            passes = any(getattr(strategy, key) is True for key in declares)
            passes |= bool(strategy.whole_model) and not strategy.scores_by_loss
            assert not (silent and passes), f"{kind} {name} does not forecast its passes"


def test_the_launcher_knows_no_strategy() -> None:
    """A new strategy is forecast without a change of it."""
    rooms = ("selectors", "mixers", "weighters", "reorders", "pipelines", "rewards")
    imported = {
        node.module
        for node in ast.walk(ast.parse(inspect.getsource(dry_run)))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not {module for module in imported if set(module.split(".")) & set(rooms)}


@pytest.mark.parametrize(("policy", "times"), [(None, 2), ("fixed", 1)])
def test_a_fixed_policy_of_nice_answers_once(
    policy: str | None, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LessSelector, "forecasts", lambda *_: [])
    (responses,) = NiceSelector(policy_model_path=policy).forecasts(None, [0, 3])  # type: ignore[arg-type]
    assert (responses.what, responses.times, responses.seconds) == ("responses", times, None)


@pytest.mark.parametrize(
    ("params", "owns", "told"),
    [
        ({}, True, (2, 1)),
        ({}, False, (2, None)),
        ({"keep_generations": 3}, True, (2, 3)),
        ({"embedding_model_name_or_path": "fixed"}, False, (1, None)),
    ],
)
def test_coincide_forecasts_training_rows_alone_and_what_its_store_keeps(
    params: dict[str, Any], owns: bool, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(CoincideSelector, "source", lambda *_: "source")
    monkeypatch.setattr(forecasts, "embedding_forecasts", lambda *args: given.extend(args) or [])
    data = SimpleNamespace(train="train", targets=("target",))
    run: Any = SimpleNamespace(data=data, config=SimpleNamespace(own_store="own" if owns else None))
    CoincideSelector(**params).forecasts(run, [0, 3])
    assert given == [run, "source", told[0], ("train",), told[1]]


@pytest.mark.parametrize("unit_rows", [256, 40])
@pytest.mark.parametrize("slow", [False, True])
def test_a_forecast_is_exact_where_time_is_that_of_padded_tokens(
    slow: bool, unit_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from one row alone, where a row takes so long that no more are measured."""
    lengths, budget = np.random.default_rng(0).integers(5, 60, 1000), 256
    rate = SLOW_ROW_SECONDS if slow else 1e-4
    asked: list[np.ndarray[Any, Any]] = []

    def timed(work: Callable[[], object]) -> float:
        work()
        return rate * padded_tokens(lengths[asked[-1]], budget, unit_rows)

    monkeypatch.setattr(forecast, "timed", timed)
    found = measured_seconds(asked.append, lengths, budget, unit_rows)
    assert found == pytest.approx(rate * padded_tokens(lengths, budget, unit_rows), rel=1e-9)
    assert len(asked[-1]) <= unit_rows
    assert len(asked) == (1 if slow else 2)


@pytest.mark.parametrize("slow", [False, True])
def test_a_forecast_of_planned_batches_is_exact_where_time_is_that_of_padded_tokens(
    slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = np.random.default_rng(1)
    lengths = [draw.integers(5, 60, size) for size in (8, 8, 3, 8, 8, 1, 8)]
    padded = [len(each) * int(each.max()) for each in lengths]
    rate = SLOW_ROW_SECONDS if slow else 1e-4
    asked: list[Sequence[int]] = []

    def timed(work: Callable[[], object]) -> float:
        work()
        return rate * sum(padded[i] for i in asked[-1])

    monkeypatch.setattr(forecast, "timed", timed)
    found = forecast.batches_forecast("looks", 3, lengths, asked.append)
    assert found.seconds == pytest.approx(rate * sum(padded), rel=1e-9)
    assert (found.what, found.times) == ("looks", 3)
    assert (found.rows, found.tokens) == (44, sum(int(each.sum()) for each in lengths))
    assert asked == ([[0]] if slow else [[0], [0, 2, 4, 6]])


@pytest.mark.parametrize(
    ("strategy", "method", "times", "named"),
    [
        (DynamicMoeMixer(eval_batch_size=2), "_counts", 5, []),
        (JointUpdateAwareWeighter(target_batch_size=2, target_update_step=3), "_summed", 2, []),
        (AdaptWeighter(self_normalize=True), "_summed", 1, ["weights"]),
    ],
)
def test_passes_over_planned_batches_are_measured(
    strategy: Any, method: str, times: int, named: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As often as the run makes them, by the run's own method."""
    calls: list[int] = []
    monkeypatch.setattr(strategy, "_check", lambda _: None, raising=False)
    monkeypatch.setattr(strategy, "_embedder", lambda _: None, raising=False)
    monkeypatch.setattr(strategy, method, lambda *args: calls.append(len(args[-1])))
    rows = run_of([4, 8, 8, 4, 6], []).data.train
    domains = Domains(("a", "b"), np.array([0, 0, 1, 1, 1]), {})
    run: Any = SimpleNamespace(
        data=SimpleNamespace(train=rows, targets=(rows,), domains=domains), seed=1
    )
    measured, *rest = strategy.forecasts(run, [2, 3, 4, 5, 6])
    assert (measured.times, measured.rows, measured.tokens) == (times, 5, 30)
    assert measured.seconds > 0
    assert len(calls) == 2
    assert [each.what for each in rest] == named
