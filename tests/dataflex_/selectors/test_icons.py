"""The icons selector against the worked numbers E13."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dataflex.selectors.icons import IconsSelector, consensus
from gradstore.errors import BadInput
from gradstore.scoring.selection import select_top

E13 = np.array(
    [(0.9, 0.1, 0.2), (0.8, 0.9, 0.1), (0.1, 0.8, 0.9), (0.4, 0.3, 0.8), (0.2, 0.2, 0.3)]
)


@pytest.mark.parametrize(
    ("count", "thresholds", "votes", "chosen"),
    [
        (2, [0.56, 0.5, 0.5], [1, 2, 2, 1, 0], [1, 2]),
        (3, [0.32, 0.26, 0.26], [1, 2, 2, 3, 1], [3, 1, 2]),
    ],
)
def test_e13_thresholds_votes_and_choice(
    count: int, thresholds: list[float], votes: list[int], chosen: list[int]
) -> None:
    np.testing.assert_allclose(np.quantile(E13, 1 - count / 5, axis=0), thresholds, atol=1e-5)
    scores = consensus(E13, count)
    assert np.floor(scores).tolist() == votes
    assert select_top(scores, count).tolist() == chosen


def test_e13_equal_votes_are_ordered_by_mean_rank() -> None:
    fractions = consensus(E13, 2) % 1
    np.testing.assert_allclose(fractions[[3, 0]], [0.583333, 0.416667], atol=1e-5)


def test_equal_votes_and_ranks_go_to_the_lower_row() -> None:
    scores = consensus(np.array([[0.1, 0.9], [0.0, 0.0], [0.9, 0.1]]), 1)
    assert select_top(scores, 3).tolist() == [0, 2, 1]


def test_equal_influences_share_a_rank() -> None:
    np.testing.assert_allclose(consensus(np.array([[0.5], [0.5], [0.1]]), 1), [1.75, 1.75, 0.0])


@given(
    arrays(np.float64, st.tuples(st.integers(2, 30), st.just(1)), elements=st.floats(-1, 1)),
    st.data(),
)
def test_a_single_task_chooses_as_less_does(influence: Any, data: Any) -> None:
    count = data.draw(st.integers(1, len(influence)))
    chosen = select_top(consensus(influence, count), count)
    np.testing.assert_array_equal(chosen, select_top(influence[:, 0], count))


@given(arrays(np.float64, (9, 3), elements=st.floats(-1, 1)), st.integers(1, 9))
def test_whole_votes_always_come_before_ranks(influence: Any, count: int) -> None:
    scores = consensus(influence, count)
    votes = (influence >= np.quantile(influence, 1 - count / 9, axis=0)).sum(axis=1)
    order = select_top(scores, 9)
    assert (np.diff(votes[order]) <= 0).all()


def test_only_candidates_vote_and_are_voted_for() -> None:
    influence = np.vstack([E13, [[9.0, 9.0, 9.0]], [[np.nan] * 3]])
    candidates = np.array([True] * 5 + [False, False])
    scores = IconsSelector().fold(influence, candidates, 2)
    np.testing.assert_array_equal(scores[:5], consensus(E13, 2))
    assert np.isnan(scores[5:]).all()


def data_of(*sizes: int) -> Any:
    sets = tuple(type("Set", (list,), {"name": f"set{i}"})([0] * n) for i, n in enumerate(sizes))
    return SimpleNamespace(targets=sets)


def config_of(subtasks: tuple[int, ...] | None = None) -> Any:
    return SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=subtasks))


def test_tasks_that_do_not_fit_the_target_are_refused() -> None:
    icons = IconsSelector(task_boundaries=[3, 2])
    icons.check_data(data_of(5), config_of())
    with pytest.raises(BadInput, match="adds up to 5, but target set 'set0' has 6 rows"):
        icons.check_data(data_of(6), config_of())
    with pytest.raises(BadInput, match="2 are named: each is a task already"):
        icons.check_data(data_of(3, 2), config_of())
    assert icons.check(config_of()) == []
    assert "remove one of them" in icons.check(config_of((3, 2)))[0]
    for wrong in ([], [3, 0], [2.5], "3,2", 5):
        with pytest.raises(ValueError, match="task_boundaries is"):
            IconsSelector(task_boundaries=wrong)  # type: ignore[arg-type]


def test_one_task_is_told(caplog: pytest.LogCaptureFixture) -> None:
    IconsSelector().check_data(data_of(3, 2), config_of())
    IconsSelector().check_data(data_of(5), config_of((3, 2)))
    assert not caplog.text
    IconsSelector().check_data(data_of(5), config_of())
    assert "single task" in caplog.text


def test_tasks_are_the_boundaries_or_the_subtasks_of_the_run() -> None:
    run: Any = SimpleNamespace(config=config_of((4, 1)))
    assert IconsSelector().subtask_sizes(run) == (4, 1)
    assert IconsSelector(task_boundaries=[3, 2]).subtask_sizes(run) == (3, 2)
