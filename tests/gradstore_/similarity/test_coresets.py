"""COINCIDE's arithmetic on worked numbers, and what holds for any clusters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.similarity.coresets import (
    Groups,
    Spread,
    capped_counts,
    density,
    pick_by_mmd,
    preferences,
    shares,
    transferability,
)

POINTS = torch.tensor([[0.0], [0.1], [0.2], [2.0]])
S, D, SIZES = np.array([0.5, 0.3, 0.1]), np.array([0.5, 0.6, 1.0]), np.array([4, 20, 20])


def test_e14_transferability() -> None:
    centroids = np.array([[1.0, 0], [0.8, 0.6], [0, 1]])
    assert transferability(centroids) == pytest.approx([0.4, 0.7, 0.3], abs=1e-5)
    assert transferability(3 * centroids) == pytest.approx([0.4, 0.7, 0.3], abs=1e-5)
    assert transferability(centroids[:1]) == pytest.approx([0.0])


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_e14_density(chunk: int) -> None:
    assert density(POINTS, chunk) == pytest.approx(0.504237, abs=1e-5)
    assert density(POINTS[:1], chunk, single=0.7) == 0.7


@pytest.mark.parametrize("chunk", [1, 100])
def test_e14_greedy_mmd(chunk: int) -> None:
    picked = pick_by_mmd(POINTS, 3, chunk_rows=chunk)
    assert picked.rows.tolist() == [1, 3, 0]
    assert picked.distances == pytest.approx([0.124602, 0.118783, 0.014797], abs=1e-5)


def test_e15_shares_and_counts() -> None:
    logits = preferences(S, D, 1.0)
    assert shares(logits) == pytest.approx([0.496746, 0.301292, 0.201962], abs=1e-5)
    assert capped_counts(logits, SIZES, 10).tolist() == [4, 3, 3]
    assert capped_counts(preferences(S, D, 0.1), SIZES, 10).tolist() == [4, 5, 1]


def test_a_share_too_small_for_a_float_still_counts() -> None:
    logits = np.array([4000.0, 2000.0, 0.0])
    assert shares(logits).tolist() == [1.0, 0.0, 0.0]
    assert capped_counts(logits, np.array([2, 50, 50]), 30).tolist() == [2, 27, 1]


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_counts_add_up_and_never_pass_a_clusters_size(data: st.DataObject) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12)))
    total = data.draw(st.integers(0, int(sizes.sum())))
    floats = st.floats(-1000, 1000)
    logits = np.array(data.draw(st.lists(floats, min_size=len(sizes), max_size=len(sizes))))
    counts = capped_counts(logits, sizes, total)
    assert counts.sum() == total
    assert (counts <= sizes).all()
    assert (counts >= 0).all()


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_each_pick_is_the_best_one_by_the_definition(
    n: int, seed: int, data: st.DataObject
) -> None:
    rows = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, 2))).float()
    allowed = np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    allowed[0] = True
    count = data.draw(st.integers(1, int(allowed.sum())))
    table = torch.exp(-torch.cdist(rows.double(), rows.double()).square()).numpy()

    def mmd(chosen: list[int]) -> float:
        inside, across = table[np.ix_(chosen, chosen)].mean(), table[:, chosen].mean()
        return float(table.mean() + inside - 2 * across)

    picked = pick_by_mmd(rows, count, allowed)
    assert len(set(picked.rows.tolist())) == count
    assert allowed[picked.rows].all()
    for size in range(1, count + 1):
        before = picked.rows[: size - 1].tolist()
        best = min(mmd([*before, i]) for i in np.flatnonzero(allowed) if i not in before)
        assert mmd(picked.rows[:size].tolist()) == pytest.approx(best, abs=1e-6)
        assert picked.distances[size - 1] == pytest.approx(best, abs=1e-6)


def test_equal_rows_go_to_the_lower_one() -> None:
    assert pick_by_mmd(torch.ones(4, 3), 3).rows.tolist() == [0, 1, 2]


def test_rows_are_spread_over_clusters_and_only_allowed_ones_are_taken() -> None:
    rows = np.random.default_rng(0).standard_normal((44, 3)).astype(np.float32)
    order = np.random.default_rng(1).permutation(44)
    members = tuple(np.sort(part) for part in np.split(order, [4, 24]))
    groups = Groups(members, S, D)

    def spread(allowed: np.ndarray, temperature: float) -> Spread:
        return groups.spread(rows, 10, allowed, temperature=temperature, device="cpu",
                             chunk_rows=5)  # fmt: skip

    everyone = np.ones(44, dtype=bool)
    found = spread(everyone, 0.1)
    assert np.bincount(found.clusters).tolist() == [4, 5, 1]
    assert all(row in members[c] for row, c in zip(found.rows, found.clusters, strict=True))
    expected = pick_by_mmd(torch.from_numpy(rows[members[1]]), 5).rows
    assert found.rows[4:9].tolist() == members[1][expected].tolist()
    fewer = everyone.copy()
    fewer[found.rows] = False
    again = spread(fewer, 1.0)
    assert not set(again.rows.tolist()) & set(found.rows.tolist())
    assert np.bincount(again.clusters).tolist()[0] == 0, "the first cluster is used up"
