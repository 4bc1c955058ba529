"""Subset rules as parameters of selectors: what is refused, and what an update takes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pytest

from dataflex.data.rows import Rows
from dataflex.selectors.cluster_less import ClusterLessSelector
from dataflex.selectors.icons import IconsSelector
from dataflex.selectors.less import LessSelector
from dataflex.selectors.near import NearSelector
from dataflex.selectors.nice import NiceSelector
from dataflex.selectors.rds_plus import RdsPlusSelector
from dataflex.selectors.row_scores import RowScores
from dataflex.selectors.subset_rule import SubsetRule
from gradstore.errors import BadInput
from gradstore.scoring.best_rows import HeldTable
from gradstore.scoring.choose import select_subset
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.rules import PER_TARGET, SUBSETS


def rows(n: int, masked: int = 0) -> Rows:
    """N rows of two data sets in turn; the last `masked` have no target token."""
    labels = [[-100, i] if i < n - masked else [-100, -100] for i in range(n)]
    table = {"input_ids": [[7, i] for i in range(n)], "labels": labels}
    sources = tuple((("poems", "sums")[i % 2], i) for i in range(n))
    return Rows("train", datasets.Dataset.from_dict(table), sources)


def data(train: int = 40, targets: int = 4, masked: int = 0) -> Any:
    return SimpleNamespace(train=rows(train), targets=(rows(targets, masked),))


@pytest.mark.parametrize("selector", [LessSelector, NiceSelector, NearSelector, RdsPlusSelector])
@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"subset": "best"}, "subset is 'best'; choose top, round_robin, knn_uniform"),
        ({"subset": "round_robin", "neighbours": 3}, "neighbours is 3, but only subset: knn_unif"),
        ({"subset": "knn_uniform", "neighbours": 0}, "neighbours is 0"),
        ({"subset": "transport", "subset_params": {"discount": 1}}, "it has blur and train"),
        ({"subset": "facility_location", "subset_params": {"discount": 2}}, "discount is 2"),
        ({"subset": "top", "subset_params": 3}, "subset_params is 3; expected a mapping"),
        ({"subset": "top", "quotas": {"a": 1.5}}, "quotas: quota of 'a' is 1.5"),
        ({"subset": "top", "quotas": {"a": 0}}, "quotas: quota of 'a' is 0"),
        ({"subset": "top", "quotas": 3}, "quotas is 3; expected a mapping"),
    ],
)
def test_a_wrong_parameter_is_told_by_key_and_value(
    selector: Any, params: dict[str, Any], told: str
) -> None:
    with pytest.raises((ValueError, BadInput), match=told):
        selector(**params)


def test_rules_of_their_own_and_sides_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"subset is 'round_robin'.* cluster_less takes whole clus"
    ):
        ClusterLessSelector(subset="round_robin")
    with pytest.raises(TypeError, match="subset"):
        IconsSelector(subset="round_robin")
    with pytest.raises(ValueError, match=r"quotas is .*column by column; choose a subset"):
        NearSelector(quotas={"a": 1})
    with pytest.raises(ValueError, match=r"quotas is .* target rows take turns; choose a subset"):
        RdsPlusSelector(quotas={"a": 1})
    with pytest.raises(ValueError, match=r"subset_params is .* column by column"):
        NearSelector(subset_params={"blur": 1})
    with pytest.raises(ValueError, match="subset is 'top', but indices_path"):
        NearSelector(subset="top", indices_path="x.npy")
    for selector in (NearSelector, RdsPlusSelector):
        with pytest.raises(ValueError, match="subset is 'drop_harmful'"):
            selector(subset="drop_harmful")


@pytest.mark.parametrize("selector", [LessSelector, NearSelector, RdsPlusSelector])
@pytest.mark.parametrize(
    ("params", "count", "told"),
    [
        ({"subset": "round_robin"}, 3, r"subset: round_robin, 3 rows .* serve 4 target rows"),
        ({"subset": "top", "quotas": {"poem": 3}}, 8, "quota of 'poem', but .* of: poems, sums"),
        ({"subset": "top", "quotas": {"poems": 3}}, 24, "the quotas leave 23"),
        ({"subset": "top", "quotas": {"poems": 2, "sums": 0.25}}, 8, "the quotas leave 4"),
        ({"subset": "knn_uniform"}, 41, "asked 41"),
    ],
)
def test_what_cannot_be_chosen_is_told_before_the_model(
    selector: Any, params: dict[str, Any], count: int, told: str
) -> None:
    with pytest.raises(BadInput, match=told):
        selector(**params).check_count(count, data())


def test_what_can_be_chosen_passes_and_target_rows_without_an_answer_need_no_row() -> None:
    LessSelector(subset="round_robin").check_count(4, data())
    LessSelector(subset="round_robin").check_count(3, data(masked=1))
    LessSelector(quotas={"poems": 3}).check_count(23, data())
    LessSelector(subset="knn_uniform", neighbours=2).check_count(3, data())


def test_the_rows_that_are_no_copies_are_those_that_quotas_are_counted_on() -> None:
    run = data(6)
    table = {"input_ids": [[7, 1]] * 3 + [[7, i] for i in range(3)], "labels": [[-100, 5]] * 6}
    run.train = Rows("train", datasets.Dataset.from_dict(table), (("a", 0),) * 3 + (("b", 0),) * 3)
    rule = SubsetRule(quotas={"b": 2})
    rule.check_count(5, run, unique=False)
    with pytest.raises(BadInput, match="the quotas leave 3"):
        rule.check_count(5, run, unique=True)


class Plain:
    """Features as rows of an array, of two data sets in turn."""

    def __init__(self, features: npt.NDArray[Any]) -> None:
        self.features = features.astype(np.float32)
        self.rows, self.dim = features.shape
        self.usable = np.ones(self.rows, dtype=bool)
        self.sources = tuple((("poems", "sums")[row % 2], row) for row in range(self.rows))

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self.features[start:stop]


def pair(n: int = 40, t: int = 4) -> CheckpointFeatures:
    generator = np.random.default_rng(5)
    train, target = generator.standard_normal((n, 6)), generator.standard_normal((t, 6))
    return CheckpointFeatures(Plain(train), (Plain(target),))


def row_scores(made: CheckpointFeatures, aggregation: Any = "max") -> RowScores:
    found = influence_scores([made], aggregation=aggregation)
    return RowScores(found.values, found.usable, found.skipped)


def boundary(run: Any, pool: npt.NDArray[np.int64] | None = None) -> Any:
    n = len(run.train)

    def among(usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        inside = np.ones(n, dtype=bool) if pool is None else np.isin(np.arange(n), pool)
        return usable & inside

    whole = SimpleNamespace(data=run, shows_progress=False)
    return SimpleNamespace(run=whole, step=2, among_candidates=among)


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("quotas", [{}, {"poems": 2}])
def test_an_update_takes_what_select_takes_stored_or_direct(
    subset: str, quotas: dict[str, int]
) -> None:
    made, run = pair(), data()
    scores = row_scores(made)
    expected = select_subset([made], 8, subset, quotas=quotas).tolist()  # type: ignore[arg-type]
    rule = SubsetRule(subset, quotas=quotas)
    usable = scores.usable
    stored = rule.stored_rows(8, scores, usable, [made], boundary(run))
    assert stored.tolist() == expected
    train, target = (np.asarray(each.read(0, each.rows)) for each in (made.train, made.targets[0]))
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (train, target)]
    held = HeldTable(unit[0] @ unit[1].T) if subset in PER_TARGET else None
    assert rule.rows(8, scores.values, usable, held, run).tolist() == expected
    assert rule.told() == ({} if rule.plain else {"subset": subset} | (
        {"quotas": quotas} if quotas else {}))  # fmt: skip


def test_everything_that_decides_is_told_and_repeats_the_choice() -> None:
    made, run = pair(200, 5), data(200)
    scores, every = row_scores(made, "mean"), np.ones(200, dtype=bool)
    values: dict[str, Any] = {
        "subset": "knn_uniform", "neighbours": 3, "quotas": {"poems": 5},
        "params": {"alpha": 0.5},
    }  # fmt: skip
    assert set(values) == {field.name for field in dataclasses.fields(SubsetRule)}, "or one is new"
    rules = [
        SubsetRule("knn_uniform", 3, {"poems": 5}),
        SubsetRule("knn_uniform", None, {}, {"alpha": 0.7, "scale": 0.5}),
        SubsetRule("facility_location", params={"discount": 0}),
    ]
    for rule in rules:
        chosen = rule.stored_rows(12, scores, every, [made], boundary(run)).tolist()
        again = LessSelector(aggregation="mean", **rule.told()).rule
        assert again == rule, "a selection's manifest has the parameters by their names"
        assert again.stored_rows(12, scores, every, [made], boundary(run)).tolist() == chosen
        plain = SubsetRule(rule.subset).stored_rows(12, scores, every, [made], boundary(run))
        assert plain.tolist() != chosen, "or what is told decides nothing"


@pytest.mark.parametrize("subset", SUBSETS)
def test_only_candidates_are_taken(subset: str) -> None:
    made, run = pair(), data()
    scores = row_scores(made)
    candidates = np.flatnonzero(scores.values > 0)[1::2]
    allowed = np.isin(np.arange(40), candidates)
    chosen = SubsetRule(subset).stored_rows(6, scores, allowed, [made], boundary(run))
    assert len(set(chosen.tolist())) == 6
    assert np.isin(chosen, candidates).all()


def test_rows_that_hurt_are_not_taken_where_fewer_help() -> None:
    scores = np.array([0.5, -0.1, 0.2, 0.0])
    found = SubsetRule("drop_harmful").rows(3, scores, np.ones(4, dtype=bool), None, data(4))
    assert found.tolist() == [0, 2], "training repeats them, and says so"


@pytest.mark.parametrize("subset", ["top", "round_robin", "knn_uniform", "transport"])
def test_near_goes_on_among_rows_not_served_and_starts_again_when_few_are_left(
    subset: str,
) -> None:
    made, run = pair(20), data(20)
    table: Any = SimpleNamespace(pair=made, usable=np.ones(20, dtype=bool))
    near = NearSelector(subset=subset)
    updates = [near.choose(8, boundary(run), table).indices.tolist() for _ in range(3)]
    expected = select_subset([made], 8, subset, aggregation="mean").tolist()  # type: ignore[arg-type]
    assert updates[0] == expected
    assert not set(updates[0]) & set(updates[1])
    assert updates[2] == updates[0], "four rows are left, eight are asked"
    resumed = NearSelector(subset=subset)
    first = NearSelector(subset=subset)
    first.choose(8, boundary(run), table)
    resumed.restore(first.state())
    assert resumed.choose(8, boundary(run), table).indices.tolist() == updates[1]
    standing = NearSelector(subset=subset, advance=False)
    for _ in range(2):
        chosen = standing.choose(8, boundary(run), table)
        assert chosen.indices.tolist() == expected
    assert chosen.manifest["all_scores"]
    assert chosen.scores is not None
    np.testing.assert_allclose(
        chosen.scores, influence_scores([made], aggregation="mean").values[expected], atol=1e-6
    )


@pytest.mark.parametrize("subset", ["top", "round_robin", "knn_uniform", "transport"])
def test_rds_plus_takes_a_rule_in_the_place_of_turns_and_the_same_rows_at_every_update(
    subset: Any,
) -> None:
    made, run = pair(20), data(20)
    table: Any = SimpleNamespace(pair=made, usable=np.ones(20, dtype=bool))
    selector = RdsPlusSelector(subset=subset, quotas={"poems": 3})
    expected = select_subset([made], 8, subset, aggregation="mean", quotas={"poems": 3}).tolist()
    for _ in range(2):
        chosen = selector.choose(8, boundary(run), table)
        assert chosen.indices.tolist() == expected
    assert chosen.manifest["subset"] == subset
    assert chosen.manifest["quotas"] == {"poems": 3}
    assert selector.state() == {"next": 0}, "no turn was taken"
