"""The delta_loss selector against the worked numbers E7 and E8."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.selectors.delta_loss import (
    DeltaLossSelector,
    progress_of,
    window_chances,
    window_of,
)
from gradstore.errors import BadInput

E8 = np.array([0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, -0.1, -0.3, -0.5])


def boundary(update: int, updates: int, *, bounded: bool = True) -> Any:
    ours = SimpleNamespace(update_times=updates if bounded else 0)
    run = SimpleNamespace(config=SimpleNamespace(dataflex=ours))
    return SimpleNamespace(update=update, updates=updates, run=run)


def test_e7_the_window_slides_from_the_fastest_rows_to_the_slowest() -> None:
    deltas = np.linspace(1.0, 0.01, 100)
    windows = [window_of(deltas, progress_of(boundary(c, 4)), 0.2) for c in (2, 3, 4)]
    assert windows == [(12, 32), (67, 87), (79, 99)]


def test_e8_the_window_stops_before_the_first_row_whose_loss_rose() -> None:
    third, fourth = (window_of(E8, progress_of(boundary(c, 4)), 0.2) for c in (3, 4))
    assert third == (6, 7)
    p = window_chances(E8, third)
    np.testing.assert_allclose(p, [0.020408] * 6 + [0.816327] + [0.020408] * 3, atol=1e-5)
    assert fourth[0] == fourth[1]
    np.testing.assert_allclose(window_chances(E8, fourth), np.full(10, 0.1), atol=1e-12)


def test_progress_of_a_single_update_is_1_and_of_an_unbounded_run_its_share() -> None:
    assert progress_of(boundary(1, 1)) == 1.0
    assert [progress_of(boundary(c, 4, bounded=False)) for c in (1, 2, 4, 5)] == [0.25, 0.5, 1, 1]


def test_equal_deltas_are_sorted_by_row_and_rows_without_a_loss_have_no_chance() -> None:
    deltas = np.array([0.1, np.nan, 0.5, 0.1, 0.1, np.nan])
    p = window_chances(deltas, (1, 2))
    np.testing.assert_allclose(p * 1.075, [1.0, 0.0, 0.025, 0.025, 0.025, 0.0], atol=1e-12)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=60),
    st.floats(0, 1),
    st.floats(0.01, 1),
)
def test_a_window_lies_within_the_rows_and_chances_add_up(
    values: list[float], x: float, size: float
) -> None:
    deltas = np.array([*values, np.nan])
    start, stop = window_of(deltas, x, size)
    assert 0 <= start <= stop <= len(values)
    assert stop == start or (np.sort(deltas[:-1])[::-1][start:stop] >= 0).all()
    p = window_chances(deltas, (start, stop))
    assert p[-1] == 0
    assert abs(p.sum() - 1) < 1e-12


class Board:
    """Losses as the test says them; notes who asked for what."""

    def __init__(self, losses: list[float]) -> None:
        self.values = np.array(losses)
        self.tokens = 7
        self.asked: list[list[int]] = []

    def losses(self, step: int, positions: Any, *, max_rows: int) -> Any:
        self.asked.append(positions.tolist())
        found = np.full(len(self.values), np.nan)
        found[positions] = self.values[positions]
        return found


def context(board: Board, update: int, pool: list[int]) -> Any:
    train = SimpleNamespace(target_tokens=np.array([1, 1, 1, 1, 1, 0]))
    ours = SimpleNamespace(update_times=2)
    run = SimpleNamespace(
        config=SimpleNamespace(dataflex=ours), data=SimpleNamespace(train=train), board=board
    )
    return SimpleNamespace(
        run=run, step=10 * update, update=update, updates=2, candidates=np.array(pool)
    )


def test_the_baseline_is_of_every_row_and_the_draw_of_the_pool_alone() -> None:
    selector, board = DeltaLossSelector(window_size=0.5), Board([3, 3, 3, 3, 3, 3])
    first = selector.select(2, context(board, 1, [0, 1, 2]))
    assert board.asked == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert set(first.indices.tolist()) <= {0, 1, 2}
    np.testing.assert_array_equal(first.scores, [0, 0])

    board.values = np.array([1.0, 2.0, 1.5, 2.9, np.nan, 3.0])
    second = selector.select(2, context(board, 2, [1, 3, 4]))
    assert set(second.indices.tolist()) == {1, 3}, "row 4 has no loss now"
    np.testing.assert_allclose(sorted(second.scores), [0.1, 1.0])
    assert second.skipped == {"no_loss": 1}


def test_a_resumed_selector_goes_on_from_its_baseline() -> None:
    kept, board = DeltaLossSelector(), Board([3, 4, 5, 6, 7, 8])
    assert kept.state() == {}
    kept.select(2, context(board, 1, [0, 1, 2, 3, 4]))
    resumed = DeltaLossSelector()
    resumed.restore(kept.state())
    board.values = board.values - np.array([0.1, 0.5, 0.2, 0.9, 0.3, 0.0])
    answers = [s.select(3, context(board, 2, [0, 1, 2, 3, 4])) for s in (kept, resumed)]
    np.testing.assert_array_equal(answers[0].indices, answers[1].indices)
    np.testing.assert_allclose(np.sort(resumed.state()["baseline"][:5]), [3, 4, 5, 6, 7])


def test_no_finite_loss_and_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(BadInput, match="no candidate has a finite loss"):
        DeltaLossSelector().select(1, context(Board([np.nan] * 6), 1, [0, 1]))
    for params, says in (
        ({"window_size": 0}, "window_size is 0"),
        ({"window_size": 1.5}, "window_size is 1.5"),
        ({"score_batch_size": 0}, "score_batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=says):
            DeltaLossSelector(**params)  # type: ignore[arg-type]
