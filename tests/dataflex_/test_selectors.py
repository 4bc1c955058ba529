"""The loss and random selectors against the worked numbers E5 and E6."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.selectors.loss import band_weights, draw, tempered
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


def test_no_finite_loss_is_refused() -> None:
    with pytest.raises(BadInput, match="no training row has a finite loss"):
        band_weights(np.array([np.nan, np.inf]), "low", 5.0, QUANTILES)
