"""`gradstore eval` with trainings that a formula stands for: what is retrained, and the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.launch.evaluated import NO_STORE, Evaluation, _measured
from dataflex.launch.judged_scores import Scored
from gradstore.errors import BadInput
from gradstore.evaluation.bank import Bank
from gradstore.scoring.products import InnerProduct

ROWS, QUERIES = 40, 5
EFFECTS = np.random.default_rng(3).normal(size=(QUERIES, ROWS))


class Additive:
    """A training in which each row lowers each query's loss by a fixed amount."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, rows: np.ndarray, seed: int) -> np.ndarray:
        self.calls.append(tuple(rows))
        return 9 - EFFECTS[:, rows].sum(axis=1)

    def seconds(self, rows: np.ndarray, seed: int) -> float:
        return 60.0


def judged(
    folder: Path, training: Any, scores: np.ndarray, scored: Any = None, **asked: Any
) -> Any:
    evaluation = Evaluation(store=folder, bank=folder / "bank", **{"budget": 99} | asked)
    bank = Bank(folder / "bank", {"model": "additive"}, ROWS, QUERIES)
    queries = np.arange(QUERIES) if scored is None else np.array(scored)
    return _measured(evaluation, bank, training, 42, Scored(scores, queries))


def measured(*args: Any, **asked: Any) -> Any:
    found = judged(*args, **asked)
    return found.figures[asked.get("metric", "lds")]


def test_true_effects_order_all_models_and_reversed_ones_none(tmp_path: Path) -> None:
    training = Additive()
    assert measured(tmp_path, training, EFFECTS, subsets=8).mean == pytest.approx(1)
    assert measured(tmp_path, training, -EFFECTS, subsets=8).mean == pytest.approx(-1)
    assert len(training.calls) == 8


@pytest.mark.parametrize("metric", ["lds", "qld"])
def test_an_interval_over_models_too_is_of_the_same_figure_and_wider(
    tmp_path: Path, metric: str
) -> None:
    noise = np.random.default_rng(8).normal(size=EFFECTS.shape)
    asked = {"metric": metric, "subsets": 30, "controls": 3, "share": 0.1}
    alone, both = (
        measured(tmp_path, Additive(), EFFECTS + 2 * noise, interval=interval, **asked)
        for interval in ("queries", "both")
    )
    assert both.values == alone.values
    assert both.high - both.low > alone.high - alone.low


def test_scores_of_some_queries_are_judged_by_these_queries(tmp_path: Path) -> None:
    some = [3, 1]
    found = measured(tmp_path, Additive(), EFFECTS[some], some, subsets=8)
    assert found.mean == pytest.approx(1)
    assert len(found.values) == 2


def test_qld_is_what_the_top_rows_gave_above_random_ones(tmp_path: Path) -> None:
    training, some = Additive(), [4, 0, 2]
    found = measured(
        tmp_path, training, EFFECTS[some], some, metric="qld", share=0.1, controls=3, seed=5
    )
    controls = [sorted(set(range(ROWS)) - set(rows)) for rows in training.calls[len(some) :]]
    assert [len(removed) for removed in controls] == [4, 4, 4]
    for value, query in zip(found.values, some, strict=True):
        top = np.sort(EFFECTS[query])[-4:].sum()
        random = np.mean([EFFECTS[query, removed].sum() for removed in controls])
        assert value == pytest.approx(top - random)


class Noisy(Additive):
    """The same with noise of each training that hides all effects, and that three seeds share."""

    def __call__(self, rows: np.ndarray, seed: int) -> np.ndarray:
        noise = {42: 1, 43: -3, 44: 2}[seed]
        return super().__call__(rows, seed) + 1000 * noise * np.sin(rows.sum())


def test_of_several_seeds_the_losses_are_means(tmp_path: Path) -> None:
    training = Noisy()
    assert measured(tmp_path, training, EFFECTS, subsets=8).mean < 0.9
    assert measured(tmp_path, training, EFFECTS, subsets=8, seeds=3).mean == pytest.approx(1)
    assert len(training.calls) == 24


def test_models_are_counted_once_and_those_made_now_apart(tmp_path: Path) -> None:
    same = np.stack([EFFECTS[0]] * 3)  # three queries with one top
    found = judged(tmp_path, Additive(), same, [0, 1, 2], metric="qld", share=0.25, controls=4,
                   seeds=2)  # fmt: skip
    assert (found.retrainings, found.made) == (10, 10)
    again = judged(tmp_path, Additive(), same, [0, 1, 2], metric="qld", share=0.25, controls=5,
                   seeds=2)  # fmt: skip
    assert (again.retrainings, again.made) == (12, 2)


def test_without_a_budget_nothing_is_trained_and_the_time_is_said(tmp_path: Path) -> None:
    training = Additive()
    with pytest.raises(BadInput, match=r"8 retrainings are missing .*about 8 min"):
        measured(tmp_path, training, EFFECTS, subsets=8, budget=0)
    assert not training.calls


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"metric": "lsd"}, "--metric is 'lsd'; give lds or qld"),
        ({"subsets": 2}, "--subsets"),
        ({"fraction": 0.0}, "fraction"),
        ({"share": 1.5}, "fraction"),
        ({"budget": -1}, "--budget"),
        ({"controls": 0}, "--controls"),
        ({"seeds": 0}, "--seeds"),
        ({"order": "file"}, "--order is 'file'; give run or redrawn"),
        ({"k": 0}, "--k"),
        ({"store": NO_STORE}, "STORE is -"),
        ({"scores": Path("scores.txt")}, "scores.txt"),
        ({"normalize": "both"}, "normalize is 'both'"),
        ({"preconditioner": "kfac"}, "preconditioner is 'kfac'"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"scores": Path("scores.npy"), "normalize": "none"}, "--scores are judged as they are"),
        ({"interval": "models"}, "--interval is 'models'"),
        ({"interval": "both", "metric": "tail_patch"}, "tail_patch retrains no model"),
    ],
)
def test_bad_options_are_named_before_anything_is_loaded(
    changed: dict[str, Any], named: str
) -> None:
    with pytest.raises(BadInput, match=named):
        Evaluation(**{"store": Path("store"), "bank": Path("bank")} | changed)


def test_a_product_asked_for_overrules_that_of_the_component_part_by_part() -> None:
    own = InnerProduct("target", "fisher", 4.0)
    asked = Evaluation(store=Path("store"), bank=Path("bank"), normalize="none", damping=0.5)
    assert asked.product(own) == InnerProduct("none", "fisher", 0.5)
    assert Evaluation(store=Path("store"), bank=Path("bank")).product(own) == own


@pytest.mark.parametrize(("metric", "share"), [("qld", 0.01), ("overlap", 0.05)])
def test_each_metric_takes_its_own_share_of_the_rows(metric: str, share: float) -> None:
    needs: dict[str, Any] = {"bank": Path("bank"), "truth": Path("replay.parquet")}
    assert Evaluation(store=Path("store"), metric=metric, **needs).taken == share
    assert Evaluation(store=Path("store"), metric=metric, share=0.2, **needs).taken == 0.2


@pytest.mark.parametrize(("metric", "k"), [("recall", 50), ("ndcg", 20), ("tail_patch", 20)])
def test_each_metric_looks_at_its_own_number_of_rows(metric: str, k: int) -> None:
    needs: dict[str, Any] = {"planted": "fact", "truth": Path("replay.parquet")}
    assert Evaluation(store=Path("store"), metric=metric, **needs).at_top == k
    assert Evaluation(store=Path("store"), metric=metric, k=3, **needs).at_top == 3


def test_qld_takes_ten_controls() -> None:
    assert Evaluation(store=Path("store"), metric="qld", bank=Path("bank")).controls == 10


def test_scores_of_a_file_need_no_store() -> None:
    assert Evaluation(store=NO_STORE, bank=Path("bank"), scores=Path("scores.npy")).seeds == 1
