"""One door for every rule: exactly k distinct rows, whatever the chunks and the rows' numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.scoring.best_rows import HeldTable, StoredTable, best_of_each
from gradstore.scoring.choose import Choice, select_subset
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.coverage import facility_location
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.quotas import Limits
from gradstore.scoring.rules import PER_TARGET, SUBSETS, Rule
from gradstore.scoring.subset import NeighbourRule, neighbours_by_rule
from gradstore.scoring.transport import Marginals, transport


class Marked:
    """Rows in memory, with their marks; no mark is corrected."""

    def __init__(self, rows: npt.NDArray[Any], usable: list[bool] | None = None) -> None:
        self._rows = rows.astype(np.float32)
        self.rows, self.dim = rows.shape
        self.usable = np.array([True] * len(rows) if usable is None else usable)
        self.tokens = np.full(self.rows, 3)
        self.sources = tuple((("poems", "sums")[row % 2], row) for row in range(self.rows))

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        return self._rows[start:stop]


def random_pair(seed: int, n: int, t: int) -> CheckpointFeatures:
    generator = np.random.default_rng(seed)
    train, target = (generator.standard_normal((count, 8)) for count in (n, t))
    return CheckpointFeatures(Marked(train), (Marked(target),))


def helping(scores: npt.NDArray[np.floating[Any]], k: int) -> int:
    """At most the rows that help, so that every rule can take k."""
    return min(k, int((scores > 0).sum()))


@given(st.sampled_from(SUBSETS), st.integers(0, 99), st.integers(4, 40), st.booleans())
def test_a_rule_takes_exactly_k_distinct_rows_whatever_their_numbers_are(
    subset: str, seed: int, k: int, limited: bool
) -> None:
    n, t = 60, 4
    table = np.random.default_rng(seed).standard_normal((n, t)).astype(np.float32)
    scores, usable = table.mean(axis=1), np.arange(n) % 7 > 0
    names = np.array(["a", "b", "c"])[np.arange(n) % 3]

    def choose(order: npt.NDArray[np.int64], k: int) -> npt.NDArray[np.int64]:
        limits = Limits.of(names[order].tolist(), {"a": 4}) if limited else None
        shown = HeldTable(table[order])
        return Rule(subset).choose(k, scores[order], shown, usable=usable[order], limits=limits)

    allowed = np.flatnonzero(usable & ((scores > 0) | (subset != "drop_harmful")))
    room = Limits.of(names.tolist(), {"a": 4} if limited else {}).room(
        np.isin(np.arange(n), allowed)
    )
    k = min(k, room)
    chosen = choose(np.arange(n), k)
    assert len(set(chosen.tolist())) == len(chosen) == k
    assert np.isin(chosen, allowed).all()
    assert not limited or (names[chosen] == "a").sum() <= 4
    order = np.random.default_rng(seed + 1).permutation(n)
    assert order[choose(order, k)].tolist() == chosen.tolist()


@pytest.mark.parametrize("subset", sorted(PER_TARGET))
def test_a_choice_does_not_depend_on_chunks(subset: str) -> None:
    pair = random_pair(0, 700, 5)
    usable = np.ones(700, dtype=bool)
    one, other = (
        Rule(subset).choose(
            40, np.empty(0), StoredTable([pair], chunk_rows=chunk), usable=usable
        ).tolist()
        for chunk in (256, 4096)
    )  # fmt: skip
    assert one == other


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_zero_row_marked_usable_is_passed_over_as_scores_pass_over_it(subset: str) -> None:
    train = np.array([[1, 0.5], [0, 0], [1, 0], [0.5, 0.1], [0.2, 1]])
    pair = CheckpointFeatures(Marked(train), (Marked(np.array([[1.0, 0]])),))
    assert influence_scores([pair]).skipped == {"zero_norm": 1}
    assert sorted(select_subset([pair], 4, subset).tolist()) == [0, 2, 3, 4]  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="asked 5, 4 usable"):
        select_subset([pair], 5, subset)  # type: ignore[arg-type]


def test_similarities_of_a_row_without_a_feature_are_nan_in_every_chunk() -> None:
    train = np.random.default_rng(0).standard_normal((600, 3))
    train[[7, 300, 599]] = 0
    pair = CheckpointFeatures(Marked(train), (Marked(np.eye(3)),))
    found = np.zeros((600, 3), dtype=np.float32)

    def keep(start: int, sums: npt.NDArray[np.float32]) -> None:
        found[start : start + len(sums)] = sums

    StoredTable([pair], chunk_rows=256).stream(keep)
    assert np.flatnonzero(np.isnan(found).all(axis=1)).tolist() == [7, 300, 599]
    assert np.isnan(found).sum() == 9
    unit = train / np.maximum(np.linalg.norm(train, axis=1, keepdims=True), 1e-9)
    assert np.allclose(np.nan_to_num(found), unit, atol=1e-6)


def test_a_row_that_is_not_usable_is_not_chosen_before_one_that_hurts() -> None:
    train = Marked(np.array([[-1, 0.5], [1, 0], [-1, 0]]), [True, False, True])
    pair = CheckpointFeatures(train, (Marked(np.array([[1.0, 0]])),))
    assert select_subset([pair], 2, "round_robin").tolist() == [0, 2]


def test_fewer_rows_than_target_rows_are_told_before_the_features_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = random_pair(0, 30, 5)
    monkeypatch.setattr("gradstore.scoring.choose.influence_scores", None)
    with pytest.raises(BadInput, match="4 rows cannot serve 5 target rows"):
        select_subset([pair], 4, "round_robin")
    with pytest.raises(BadInput, match="at most 20,000"):
        Rule("facility_location").check(20_001, 5)


@pytest.mark.parametrize("subset", SUBSETS)
def test_quotas_hold_under_every_rule(subset: str) -> None:
    pair = random_pair(1, 200, 4)
    free = select_subset([pair], 40, subset)  # type: ignore[arg-type]
    assert (free % 2 == 0).sum() > 8, "or the quota changes nothing"
    for quota in (8, 0.2):
        rows = select_subset([pair], 40, subset, quotas={"poems": quota})  # type: ignore[arg-type]
        assert (rows % 2 == 0).sum() == 8
        assert len(set(rows.tolist())) == 40


@pytest.mark.parametrize("subset", SUBSETS)
def test_a_token_budget_ends_the_order_of_every_rule(subset: str) -> None:
    pair = random_pair(2, 100, 3)
    scores = influence_scores([pair])
    train: Any = pair.train
    choice = Choice(Rule(subset), tokens=30, quotas={"sums": 4})
    rows = choice.rows(scores.values, StoredTable([pair]), train, usable=scores.usable)
    assert len(rows) == 10, "3 tokens each"
    assert (rows % 2).sum() <= 4


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"count": 3, "fraction": 0.1}, "2 budgets are given"),
        ({}, "0 budgets are given"),
        ({"tokens": 0}, "tokens is 0"),
        ({"fraction": 2.0}, "fraction is 2.0"),
        ({"tokens": 9, "quotas": {"a": 0.5}}, "quota of 'a' is 0.5, a share"),
        ({"rule": Rule("drop_harmful"), "quotas": {"a": 0.5}}, "number is not given"),
        ({"count": 3, "quotas": {"a": 0}}, "quota of 'a' is 0"),
        ({"count": 3, "quotas": {"a": 1.5}}, "quota of 'a' is 1.5"),
        ({"count": 3, "quotas": {"a": True}}, "quota of 'a' is True"),
        ({"count": 3, "length": "log"}, "length correction is 'log'"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(BadInput, match=told):
        Choice(**{"rule": Rule("top"), **asked})


def test_a_token_budget_that_facility_location_cannot_spend_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for room in ("rules", "coverage"):
        monkeypatch.setattr(f"gradstore.scoring.{room}.MOST_ROWS", 12)
    pair = random_pair(2, 100, 3)
    scores, train = influence_scores([pair]), pair.train

    def within(tokens: int) -> int:
        choice = Choice(Rule("facility_location"), tokens=tokens)
        table: Any = StoredTable([pair])
        return len(choice.rows(scores.values, table, train, usable=scores.usable))  # type: ignore[arg-type]

    assert [within(tokens) for tokens in (35, 36)] == [11, 12]
    with pytest.raises(BadInput, match="'facility_location' takes at most 12"):
        within(300)


def test_neighbours_go_with_knn_uniform_alone() -> None:
    with pytest.raises(BadInput, match="only the subset 'knn_uniform' has neighbours"):
        Rule("top", 3)
    with pytest.raises(BadInput, match="neighbours is 0"):
        Rule("knn_uniform", 0)
    with pytest.raises(BadInput, match="did you mean 'round_robin'"):
        Rule("round_robbin")


@pytest.mark.parametrize(
    ("subset", "params", "by_hand"),
    [
        ("facility_location", {"discount": 0.9},
         lambda best: facility_location(best, 12, discount=0.9)),
        ("transport", {"blur": 0.3},
         lambda best: transport(best, 12, 200, marginals=Marginals(0.3))),
        ("transport", {"train": 0.5, "blur": 0.05},
         lambda best: transport(best, 12, 200, marginals=Marginals(0.05, train=0.5))),
    ],
)  # fmt: skip
def test_a_constant_of_a_rule_is_the_one_that_it_is_given(
    subset: str, params: dict[str, float], by_hand: Any
) -> None:
    pair, usable = random_pair(3, 200, 6), np.ones(200, dtype=bool)
    table = StoredTable([pair])
    rows = Rule(subset, params=params).choose(12, np.empty(0), table, usable=usable)
    assert rows.tolist() == by_hand(best_of_each(table, 12, usable=usable)).tolist()
    assert rows.tolist() != Rule(subset).choose(12, np.empty(0), table, usable=usable).tolist()
    asked: Any = {"subset": subset, "subset_params": params}
    assert select_subset([pair], 12, **asked).tolist() == rows.tolist()


def test_the_constants_of_knn_uniform_find_its_neighbours() -> None:
    pair, usable = random_pair(3, 200, 6), np.ones(200, dtype=bool)
    table = StoredTable([pair])
    distances = 1.0 - best_of_each(table, 20, usable=usable).scores
    found = neighbours_by_rule(distances, 20, NeighbourRule(alpha=0.7, scale=0.5))
    assert 1 < found < 20, "or the constants change nothing"
    asked = (
        Rule("knn_uniform", params={"alpha": 0.7, "scale": 0.5}),
        Rule("knn_uniform", found),
        Rule("knn_uniform"),
    )
    given, said, default = (
        rule.choose(5, np.empty(0), table, usable=usable).tolist() for rule in asked
    )
    assert given == said != default


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        (lambda: Rule("top", params={"blur": 1}), "blur is no constant of the subset 'top'"),
        (lambda: Rule("transport", params={"discount": 1}), "it has blur and train"),
        (lambda: Rule("transport", params={"blur": -1}), "blur must be above"),
        (lambda: Rule("facility_location", params={"discount": 2}), "discount is 2"),
        (lambda: Rule("facility_location", params={"discount": True}), "give a number"),
        (lambda: Rule("facility_location", params={"discount": "much"}), "give a number"),
        (lambda: Rule("facility_location", params=0.5), "constants by name"),
        (lambda: Rule("knn_uniform", params={"alpha": 1}), "alpha must be between 0 and 1"),
        (lambda: Rule("knn_uniform", 3, {"alpha": 0.5}), "leave one of them out"),
    ],
)
def test_a_constant_that_means_nothing_is_refused(rule: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        rule()


def test_a_product_ranks_scores_and_target_rows_alike() -> None:
    pair = random_pair(4, 120, 5)
    product = InnerProduct("cosine", "fisher", 0.2)
    scores = influence_scores([pair], product=product).values
    best = np.argsort(-scores, kind="stable")[:9].tolist()
    assert select_subset([pair], 9, product=product).tolist() == best
    assert best != select_subset([pair], 9).tolist()
    table = StoredTable([pair], product=product)
    usable = np.ones(120, dtype=bool)
    expected = Rule("round_robin").choose(9, np.empty(0), table, usable=usable).tolist()
    assert select_subset([pair], 9, "round_robin", product=product).tolist() == expected


def test_tokens_of_rows_that_have_none_are_asked_for() -> None:
    pair = CheckpointFeatures(np.eye(3), np.eye(3)[:1])
    for asked in ({"token_budget": 3}, {"k": 1, "length_correction": "bins"}):
        with pytest.raises(BadInput, match="need the target tokens of each row"):
            select_subset([pair], **asked)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="0 budgets are given"):
        select_subset([pair])
    with pytest.raises(TypeError, match="fractoin"):
        select_subset([pair], fractoin=0.5)  # type: ignore[call-arg]


def test_quotas_without_data_sets_are_refused() -> None:
    train: Any = SimpleNamespace(sources=None)
    with pytest.raises(BadInput, match="these rows have none"):
        Choice(Rule(), count=3, quotas={"a": 1}).limits(train, 3)


def test_a_length_correction_goes_with_top_alone_and_ranks_by_what_is_left() -> None:
    train: Any = SimpleNamespace(tokens=np.array([2, 4, 8, 16]), rows=4)
    scores, usable = np.array([0.9, 0.8, 0.3, 0.2]), np.ones(4, dtype=bool)
    plain, corrected = (
        Choice(Rule(), count=2, length=how).rows(scores, None, train, usable=usable).tolist()
        for how in ("none", "regression")
    )
    assert plain == [0, 1]
    assert corrected == [1, 3], "0.9, 0.8, 0.3, 0.2 less a line that falls by 0.26 a doubling"
    with pytest.raises(BadInput, match="but the subset is 'round_robin': only 'top'"):
        Choice(Rule("round_robin"), count=2, length="bins")
