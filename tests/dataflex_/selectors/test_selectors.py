"""The loss selector against the worked numbers E5 and E6; the random one; bad parameters."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from torch import nn

from dataflex.config.presets import resolve
from dataflex.data.rows import Rows
from dataflex.models.passes import row_losses
from dataflex.selectors.loss import band_weights, draw, tempered
from dataflex.selectors.random import RandomSelector
from gradstore.errors import BadInput

LOSSES = np.array([0.1, 0.5, 0.9, 1.3, 1.7, 2.1])
QUANTILES = (0.33, 0.66)


def test_e5_medium_band_at_temperature_1() -> None:
    p = tempered(band_weights(LOSSES, "medium", 5.0, QUANTILES), 1.0)
    expected = [0.071429, 0.071429, 0.357143, 0.357143, 0.071429, 0.071429]
    np.testing.assert_allclose(p, expected, atol=1e-5)


def test_e5_high_band_at_temperature_2() -> None:
    p = tempered(band_weights(LOSSES, "high", 5.0, QUANTILES), 2.0)
    np.testing.assert_allclose(p, [0.118034] * 4 + [0.263932] * 2, atol=1e-5)


def test_e6_an_unscored_row_is_never_drawn_however_hot() -> None:
    weights = band_weights(np.array([0.1, 0.2, 3.0, np.nan]), "high", 5.0, QUANTILES)
    p = tempered(weights, 10.0)
    assert p[3] == 0.0
    rows = [draw(p, 3, np.random.default_rng(s), replacement=False) for s in range(200)]
    assert 3 not in np.concatenate(rows)


@pytest.mark.parametrize("temperature", [1e-3, 1e-300])
def test_a_cold_draw_takes_the_band_first_and_then_the_others(temperature: float) -> None:
    p = tempered(band_weights(LOSSES, "high", 5.0, QUANTILES), temperature)
    np.testing.assert_allclose(p, [0, 0, 0, 0, 0.5, 0.5], atol=1e-5)
    rows = draw(p, 4, np.random.default_rng(0), replacement=False)
    assert set(rows[:2].tolist()) == {4, 5}
    assert len(set(rows.tolist())) == 4


def test_draws_without_replacement_are_distinct_and_follow_the_weights() -> None:
    p = np.array([0.05, 0.05, 0.9])
    first = [int(draw(p, 2, np.random.default_rng(s), replacement=False)[0]) for s in range(2000)]
    assert abs(np.mean(np.array(first) == 2) - 0.9) < 0.03
    for s in range(20):
        assert len(set(draw(p, 3, np.random.default_rng(s), replacement=False).tolist())) == 3


def test_too_few_candidates_switch_to_replacement() -> None:
    rows = draw(np.array([0.5, 0.5, 0.0]), 5, np.random.default_rng(0), replacement=False)
    assert len(rows) == 5
    assert set(rows.tolist()) <= {0, 1}


def test_of_a_batch_that_several_ranks_took_the_first_finite_loss_counts() -> None:
    parts = [(np.array([0, 1]), np.array([np.nan, 1.0])), (np.array([1, 0]), np.array([7.0, 3.0])),
             (np.array([2]), np.array([np.nan]))]  # fmt: skip
    rows = Rows("train", Dataset.from_dict({"input_ids": [[1, 2]] * 4}))
    data: Any = SimpleNamespace(train=rows)
    run: Any = SimpleNamespace(
        data=data, model=nn.Linear(1, 1), ranks=SimpleNamespace(gather=lambda work: parts)
    )
    np.testing.assert_array_equal(row_losses(run), [3.0, 1.0, np.nan, np.nan])


def test_no_finite_loss_is_refused() -> None:
    with pytest.raises(BadInput, match="no training row has a finite loss"):
        band_weights(np.array([np.nan, np.inf]), "low", 5.0, QUANTILES)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"temperature": 0}, "temperature is 0; it must be above 0"),
        ({"temperature": -1.5}, "temperature is -1.5; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"quantiles": [-0.1, 0.5]}, r"quantiles are \[-0.1, 0.5\]; give two rising numbers"),
        ({"quantiles": [0.5, 1.1]}, r"quantiles are \[0.5, 1.1\]"),
        ({"quantiles": [0.66, 0.33]}, r"quantiles are \[0.66, 0.33\]"),
        ({"quantiles": [0.5]}, r"quantiles are \[0.5\]"),
        ({"quantiles": [0.2, 0.5, 0.8]}, r"quantiles are \[0.2, 0.5, 0.8\]"),
        ({"quantiles": [0.2, float("nan")]}, r"quantiles are \[0.2, nan\]"),
        ({"focus": "hard"}, "focus is 'hard'; choose low, medium or high"),
        ({"focus_weight": 0}, "focus_weight is 0; it must be above 0"),
        ({"focus_weight": -5}, "focus_weight is -5; it must be above 0"),
        ({"score_batch_size": 0}, "score_batch_size is 0; it must be at least 1"),
    ],
)
def test_a_parameter_of_the_loss_selector_out_of_range_is_refused(
    params: dict[str, Any], says: str
) -> None:
    with pytest.raises(BadInput, match=f"component 'loss': {says}"):
        resolve("dynamic_select", "loss", params).build()


POOL = np.array([3, 5, 8, 9, 12])


def drawn(count: int, step: int = 0, **params: Any) -> list[int]:
    """What the random selector answers at `step`, of the rows in POOL."""
    context: Any = SimpleNamespace(step=step, candidates=POOL)
    selection = RandomSelector(**params).select(count, context)
    assert selection.indices.dtype == np.int64
    assert selection.scores is None
    return [int(row) for row in selection.indices]


def test_random_rows_are_distinct_candidates_each_as_likely_as_the_others() -> None:
    draws = [drawn(2, step) for step in range(2000)]
    assert all(len(set(rows)) == 2 for rows in draws)
    counts = np.array([sum(row in rows for rows in draws) for row in POOL])
    assert counts.sum() == 4000, "candidates alone"
    assert np.abs(counts / 2000 - 2 / 5).max() < 0.04
    assert sorted(drawn(5)) == POOL.tolist()


def test_random_rows_with_replacement_may_repeat_each_drawn_by_itself() -> None:
    draws = [drawn(2, step, replacement=True) for step in range(2000)]
    repeated = np.mean([rows[0] == rows[1] for rows in draws])
    assert abs(repeated - 1 / 5) < 0.03
    many = drawn(5000, replacement=True)
    counts = np.array([many.count(row) for row in POOL])
    assert counts.sum() == 5000, "candidates alone, more of them than there are"
    assert np.abs(counts / 5000 - 1 / 5).max() < 0.03


@pytest.mark.parametrize("replacement", [False, True])
def test_random_rows_follow_seed_and_step_alone(replacement: bool) -> None:
    first = drawn(5, step=7, seed=1, replacement=replacement)
    assert drawn(5, step=7, seed=1, replacement=replacement) == first
    others = [drawn(5, step=7, seed=2, replacement=replacement),
              drawn(5, step=8, seed=1, replacement=replacement)]  # fmt: skip
    assert first not in others


def test_more_random_rows_than_candidates_are_refused_unless_they_may_repeat() -> None:
    with pytest.raises(BadInput, match="6 rows requested of 5 usable ones without replacement"):
        drawn(6)
    assert len(drawn(6, replacement=True)) == 6


def test_the_example_to_copy_draws_the_longest_answers_of_the_candidates_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    target = "examples.train_lora.selectors.longest_answer:LongestAnswer"
    longest = resolve("dynamic_select", "custom", {"target": target, "share": 0.5}).build()
    train = SimpleNamespace(target_tokens=np.array([90, 80, 1, 4, 3, 2, 70]))
    context: Any = SimpleNamespace(
        run=SimpleNamespace(data=SimpleNamespace(train=train)),
        step=0,
        candidates=np.array([2, 3, 4, 5]),
    )
    chosen = longest.select(2, context)
    assert sorted(chosen.indices.tolist()) == [3, 4]
    assert sorted(chosen.scores.tolist()) == [3, 4]
    assert sorted(longest.select(3, context).indices.tolist()) == [3, 4, 5]
