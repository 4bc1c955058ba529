"""The seven orders of a sorted list against the worked numbers E29 and E30."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.reorders.patterns import (
    PATTERNS,
    Pattern,
    PatternParams,
    sorting_order,
    window_shuffled,
)
from dataflex.reorders.static import StaticReorder


def made(name: str, **changes: Any) -> Pattern:
    options: dict[str, Any] = {"polarity": "higher_later", "ascending": True, "window_size": 0,
                               "seed": 42, "params": {}}  # fmt: skip
    options |= changes
    return StaticReorder(pattern=name, pattern_params=options.pop("params"), **options).pattern


@pytest.mark.parametrize(
    ("name", "n", "params", "expected"),
    [
        ("folding", 12, {"layers": 3}, "0 3 6 9 1 4 7 10 2 5 8 11"),
        ("zigzag", 12, {"layers": 3}, "0 3 6 9 10 7 4 1 2 5 8 11"),
        ("stair", 12, {"layers": 3, "num_sections": 2, "folding_ratio": 0.225},
         "0 1 2 3 6 4 7 5 8 9 10 11"),
        ("saw", 12, {"layers": 3, "num_sections": 2, "folding_ratio": 0.225},
         "0 1 2 3 6 7 4 5 8 9 10 11"),
        ("saw", 24, {"layers": 2, "num_sections": 3, "folding_ratio": 0.1},
         "0 1 2 3 4 5 6 8 9 7 10 11 12 13 14 16 17 15 18 19 20 21 22 23"),
        ("sorting", 5, {}, "0 1 2 3 4"),
    ],
)  # fmt: skip
def test_e29_ranks(name: str, n: int, params: dict[str, Any], expected: str) -> None:
    assert made(name, params=params).ranks(n).tolist() == [int(r) for r in expected.split()]


def test_the_ranks_in_the_docs_are_the_patterns() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reorders.md").read_text()
    shown = re.findall(r"^\| `(\w+)` \|.*\| ([\d ]{20,}) \|$", page, flags=re.M)
    params = {"layers": 3, "num_sections": 2, "folding_ratio": 0.225}
    assert {name for name, _ in shown} == set(PATTERNS) - {"shuffle", "segment"}
    for name, ranks in shown:
        assert made(name, params=params).ranks(12).tolist() == [int(r) for r in ranks.split()]


def test_e29_segment_keeps_the_lowest_first_and_the_highest_last() -> None:
    middles = set()
    for seed in range(20):
        ranks = made("segment", seed=seed).ranks(10)
        assert (ranks[0], ranks[9]) == (0, 9)
        assert sorted(ranks[1:9]) == list(range(1, 9))
        middles.add(tuple(ranks[1:9].tolist()))
    assert len(middles) == 20, "another seed, another middle"


def test_e30_windows_are_shuffled_by_one_generator() -> None:
    shuffled = window_shuffled(np.arange(8), 4, np.random.default_rng(42))
    assert shuffled.tolist() == [3, 2, 1, 0, 7, 6, 4, 5]
    assert made("sorting", window_size=4).ranks(8).tolist() == shuffled.tolist()


def test_where_rounding_makes_two_folded_parts_meet_the_second_begins_later() -> None:
    params = {"layers": 3, "num_sections": 4, "folding_ratio": 0.12}
    assert made("stair", params=params).ranks(13).tolist() == [
        0, *(1, 4, 2, 3), *(5, 6, 7), *(8, 11, 9, 10), 12,
    ]  # fmt: skip


def test_defaults_are_five_layers_for_folding_and_two_around_a_sections_end() -> None:
    assert made("folding").ranks(10).tolist() == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    stair = made("stair", params={"num_sections": 2, "folding_ratio": 0.2}).ranks(10)
    assert stair.tolist() == [0, 1, 2, 3, 5, 4, 6, 7, 8, 9]
    assert made("stair").ranks(10).tolist() == list(range(10)), "folding_ratio is 0"


@pytest.mark.parametrize(
    ("params", "head", "tail"),
    [
        ({"front_is_high": True, "back_is_high": False}, {8, 9}, {0}),
        ({"front_is_high": False, "back_is_high": True}, {0, 1}, {9}),
    ],
)
def test_segment_takes_head_and_tail_from_the_ends_it_is_told(
    params: dict[str, Any], head: set[int], tail: set[int]
) -> None:
    ranks = made("segment", params={"x_pct": 20, "y_pct": 10, **params}).ranks(10).tolist()
    assert set(ranks[:2]) == head
    assert set(ranks[9:]) == tail


@pytest.mark.parametrize(("high", "ends"), [(True, {7, 8, 9}), (False, {0, 1, 2})])
def test_segment_splits_one_end_at_random_when_both_ask_for_it(high: bool, ends: set[int]) -> None:
    params = {"x_pct": 20, "y_pct": 10, "front_is_high": high, "back_is_high": high}
    tails = set()
    for seed in range(30):
        ranks = made("segment", params=params, seed=seed).ranks(10).tolist()
        assert {*ranks[:2], ranks[9]} == ends
        tails.add(ranks[9])
    assert tails == ends


@given(
    name=st.sampled_from(PATTERNS),
    n=st.integers(0, 60),
    layers=st.integers(1, 70),
    sections=st.integers(1, 6),
    part=st.floats(0, 0.999),
    ends=st.tuples(st.floats(0, 50), st.floats(0, 50), st.booleans(), st.booleans()),
    window=st.integers(0, 70),
    seed=st.integers(0, 99),
)
def test_every_pattern_is_a_permutation(
    name: str,
    n: int,
    layers: int,
    sections: int,
    part: float,
    ends: tuple[float, float, bool, bool],
    window: int,
    seed: int,
) -> None:
    params = PatternParams(layers, sections, part / (2 * sections), *ends)
    pattern = Pattern(name, window_size=window, seed=seed, params=params)
    assert sorted(pattern.ranks(n)) == list(range(n))
    assert pattern.ranks(n).tolist() == pattern.ranks(n).tolist()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan")]), max_size=30), st.booleans())
def test_sorting_is_stable_both_ways(scores: list[float], descending: bool) -> None:
    order = sorting_order(np.array(scores), descending=descending).tolist()
    known = [s for s in scores if s == s]
    filled = [s if s == s else float(np.median(known)) if known else 0.0 for s in scores]
    sign = -1 if descending else 1
    assert order == sorted(range(len(scores)), key=lambda i: (sign * filled[i], i))


def test_descending_ties_keep_their_order() -> None:
    assert sorting_order(np.array([1.0, 1, 0, 1]), descending=True).tolist() == [0, 1, 3, 2]


def test_a_score_that_is_not_finite_counts_as_the_median() -> None:
    scores = np.array([5.0, np.nan, 1.0, np.inf, 2.0, -np.inf])
    assert sorting_order(scores).tolist() == [2, 1, 3, 4, 5, 0]


@pytest.mark.parametrize(
    ("polarity", "ascending", "first"),
    [
        ("higher_later", True, "low"), ("higher_is_better", True, "low"),
        ("higher_earlier", True, "high"), ("lower_is_better", True, "high"),
        ("higher_later", False, "high"), ("higher_earlier", False, "low"),
    ],
)  # fmt: skip
def test_polarity_and_ascending_decide_the_direction_together(
    polarity: str, ascending: bool, first: str
) -> None:
    pattern = made("sorting", polarity=polarity, ascending=ascending)
    positions = np.array([10, 11, 12])
    served = pattern.arrange(positions, np.array([0.5, 0.1, 0.9])).tolist()
    assert served == ([11, 10, 12] if first == "low" else [12, 10, 11])


def test_shuffle_needs_no_scores_and_goes_by_its_seed() -> None:
    positions = np.arange(50)
    one, other = (made("shuffle", seed=s).arrange(positions, None) for s in (1, 2))
    assert one.tolist() != other.tolist()
    assert made("shuffle", seed=1).arrange(positions, positions[::-1] * 1.0).tolist() == (
        one.tolist()
    ), "scores change nothing"


def test_the_published_names_of_layers_are_understood() -> None:
    for name in ("folding_layer", "zigzag_layer"):
        assert made("zigzag", params={name: 3}).params.layers == 3


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("saw", {"params": {"num_sections": 3, "folding_ratio": 0.17}}, "would overlap"),
        ("stair", {"params": {"num_sections": 2, "folding_ratio": 0.25}}, "less than 0.25"),
        ("sort", {}, "pattern is 'sort'; choose shuffle, sorting"),
        ("sorting", {"polarity": "up"}, "polarity is 'up'"),
        ("sorting", {"window_size": -1}, "window_size is -1"),
        ("folding", {"params": {"layers": 0}}, "layers is 0"),
        (
            "folding",
            {"params": {"layer": 3}},
            "unknown pattern_params: 'layer' ",
        ),
        ("segment", {"params": {"x_pct": 60, "y_pct": 60}}, "together at most 100"),
    ],
)
def test_what_is_out_of_range_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(name, **changes)
