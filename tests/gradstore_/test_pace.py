"""The forecast of a long pass."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from gradstore import pace
from gradstore.pace import Pace, product_seconds
from gradstore.similarity.clusters import METHODS, cluster, rows_read
from gradstore.similarity.row_chunks import CountedRows


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that the test sets."""
    held = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace.time, "perf_counter", lambda: held.now)
    return held


def test_a_long_pass_is_told_once_by_the_rate_of_its_first_rows(clock: SimpleNamespace) -> None:
    told: list[float] = []
    passing = Pace(1000, told.append)
    for clock.now in (0.5, 1.0, 1.5, 2.0):
        passing.advance(5)
    assert told == [100.0]  # 10 rows of 1000 in a second


def test_the_cost_of_rows_counts_where_it_is_known(clock: SimpleNamespace) -> None:
    """The longest rows come first: by rows alone the forecast would be four times too long."""
    told: list[float] = []
    passing = Pace(np.array([90] * 10 + [10] * 90), told.append)
    clock.now = 20.0
    passing.advance(10)
    assert told == [pytest.approx(40.0)]


def test_a_short_pass_is_told_nothing(clock: SimpleNamespace) -> None:
    told: list[float] = []
    passing = Pace(20, told.append)
    clock.now = 1.0
    passing.advance(10)
    Pace(0, told.append).advance(0)
    assert told == []


def test_a_product_takes_what_is_forecast_within_a_factor() -> None:
    import time

    import torch

    x = torch.ones(1024, 1024)
    forecast = product_seconds(3 * 1024**3)
    began = time.perf_counter()
    for _ in range(3):
        x @ x
    assert 0.1 < (time.perf_counter() - began) / forecast < 10


@pytest.mark.parametrize("method", METHODS)
def test_a_clustering_reads_as_many_rows_as_is_said(method: str) -> None:
    rows = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    read = [0]
    counted = CountedRows(rows, lambda done: read.append(done))
    found = cluster(method, counted, 6, seed=1, max_iter=3, chunk_rows=16)
    plain = cluster(method, rows, 6, seed=1, max_iter=3, chunk_rows=16)
    np.testing.assert_array_equal(found.labels, plain.labels)
    counted[np.array([0])]  # the last slice counts when something more is read
    most = rows_read(method, 50, 6, 3)
    assert sum(read) <= most
    if method not in ("kmeans", "spherical_kmeans"):  # which may converge earlier
        assert sum(read) == most
