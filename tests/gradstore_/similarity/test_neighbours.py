"""Neighbours of target rows, and of training rows among themselves, against brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.similarity.neighbours import Neighbours
from gradstore.similarity.rows import UsableRows

N = 60


@pytest.fixture
def found(kit: Any, tmp_path: Path) -> tuple[Neighbours, np.ndarray]:
    """Neighbours in a store, and (n, n) cosines of its usable rows by hand."""
    store = kit.build(tmp_path / "s", "train/1", "target/a/1", n=N)
    train = store.generation("train/1")
    unit = UsableRows(train)[:]
    return Neighbours(train, [store.generation("target/a/1")], None), unit @ unit.T


def test_a_rows_neighbours_begin_with_itself(found: tuple[Neighbours, np.ndarray]) -> None:
    neighbours, cosines = found
    rows = np.flatnonzero(neighbours.usable)[[0, 7, 31]]
    expected = -np.sort(-cosines[[0, 7, 31]], axis=1)[:, :5]
    np.testing.assert_allclose(neighbours.around(rows, 5), expected, atol=1e-5)


@pytest.mark.parametrize("size", [10, 25])
def test_neighbours_in_a_sample_are_the_nearest_of_it_and_never_the_row_itself(
    found: tuple[Neighbours, np.ndarray], size: int
) -> None:
    neighbours, cosines = found
    m = len(cosines)
    places, sample = np.arange(m), np.arange(size) * m // size
    among = np.where(places[:, None] == sample[None], -1.0, cosines[:, sample])
    expected = -np.sort(-among, axis=1)[:, :4]
    got = neighbours.around_in_sample(np.flatnonzero(neighbours.usable), 4, size)
    np.testing.assert_allclose(-np.sort(-got, axis=1), expected, atol=1e-5)


def test_lists_of_target_rows_hold_the_best_allowed_rows_whatever_the_chunks(
    found: tuple[Neighbours, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kit: Any
) -> None:
    neighbours, _ = found
    store = kit.build(tmp_path / "t", "train/1", "target/a/1", n=N)
    train, queries = (UsableRows(store.generation(name)) for name in ("train/1", "target/a/1"))
    rows, cosines = train.rows, train[:] @ queries[:].T
    allowed = neighbours.usable.copy()
    allowed[::4] = False
    among = np.flatnonzero(allowed[rows])
    order = among[np.argsort(-cosines[among], axis=0, kind="stable")]
    for chunk, k in ((7, 5), (4096, 5), (7, N)):
        monkeypatch.setattr("gradstore.similarity.neighbours.CHUNK_ROWS", chunk)
        ranked, highest = neighbours.ranked(k, allowed)
        np.testing.assert_array_equal(ranked[:, : len(among)], rows[order.T[:, :k]])
        assert (ranked[:, len(among) :] == -1).all(), "a list ends where no row is left"
        np.testing.assert_array_equal(np.flatnonzero(np.isfinite(highest)), rows[among])
        np.testing.assert_allclose(highest[rows[among]], cosines[among].max(axis=1), atol=1e-6)
