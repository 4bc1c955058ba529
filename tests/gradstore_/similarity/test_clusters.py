"""Five clusterings: seeded, exhaustive, no empty cluster, ties to the lower index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.similarity.clusters import (
    METHODS,
    cluster,
    farthest_first,
    kmeans,
    random_partition,
    random_projection_lsh,
    spherical_kmeans,
)


def blobs(seed: int = 0, spread: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """60 rows around 4 far points, in mixed order, and the point each belongs to."""
    generator = np.random.default_rng(seed)
    truth = generator.permutation(np.repeat(np.arange(4), 15))
    points = np.array([[4, 0, 0], [0, 4, 0], [0, 0, 4], [-4, -4, 0]], dtype=np.float32)
    noise = spread * generator.standard_normal((60, 3))
    return (points[truth] + noise).astype(np.float32), truth


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len(set(a.tolist())) == len(set(b.tolist()))


@pytest.mark.parametrize("method", ["kmeans", "spherical_kmeans", "farthest_first"])
@pytest.mark.parametrize("seed", range(5))
def test_far_apart_groups_are_found_from_any_seed(method: str, seed: int) -> None:
    rows, truth = blobs()
    assert same_partition(cluster(method, rows, 4, seed=seed).labels, truth)


def test_kmeans_centroids_are_the_means_of_their_rows() -> None:
    rows, _ = blobs(spread=1.5)
    found = kmeans(rows, 5, seed=1, max_iter=100)
    for number, members in enumerate(found.members()):
        assert np.allclose(found.centroids[number], rows[members].mean(0), atol=1e-5)
    squared = ((rows[:, None] - found.centroids[None]) ** 2).sum(2)
    assert np.array_equal(found.labels, squared.argmin(1))
    assert np.allclose(found.distances, squared.min(1), atol=1e-4)


def test_spherical_kmeans_ignores_lengths() -> None:
    rows, _ = blobs(spread=0.8)
    scales = np.random.default_rng(3).uniform(0.1, 10, size=(60, 1)).astype(np.float32)
    plain, scaled = (spherical_kmeans(x, 4, seed=2) for x in (rows, rows * scales))
    assert np.array_equal(plain.labels, scaled.labels)
    assert np.allclose(np.linalg.norm(plain.centroids, axis=1), 1)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ plain.centroids.T
    assert np.allclose(plain.distances, 2 - 2 * cosines.max(1), atol=1e-5)


def test_farthest_first_adds_the_row_farthest_from_its_centres() -> None:
    rows = np.array([[0.0], [1.0], [10.0], [4.0], [10.0]], dtype=np.float32)
    firsts = set()
    for seed in range(8):
        found = farthest_first(rows, 3, seed=seed)
        centres = found.centroids[:, 0].tolist()
        firsts.add(centres[0])
        for number in (1, 2):
            gaps = np.abs(rows - np.array(centres[:number])).min(1)
            assert centres[number] == rows[gaps.argmax(), 0]
        assert found.labels[2] == found.labels[4]
    assert len(firsts) > 1


def test_lsh_rows_of_one_cluster_lie_on_the_same_sides() -> None:
    rows, _ = blobs(spread=1.0)
    found = random_projection_lsh(rows, 8, seed=4)
    planes = np.random.default_rng([4, 2]).standard_normal((3, 3)).astype(np.float32)
    sides = (rows - rows.mean(0)) @ planes > 0
    assert same_partition(found.labels, sides @ np.array([1, 2, 4]))
    assert random_projection_lsh(rows, 8, seed=4, num_bits=1).count == 2


def test_random_partition_is_balanced() -> None:
    rows, _ = blobs()
    assert sorted(random_partition(rows, 7, seed=0).sizes.tolist()) == [8, 8, 8, 9, 9, 9, 9]


def test_an_empty_cluster_takes_the_farthest_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.array([[40.0], [41.0], [42.0], [90.0]], dtype=np.float32)
    twice = torch.tensor([[41.0], [41.0]])
    monkeypatch.setattr("gradstore.similarity.clusters._first_centroids", lambda *_: twice)
    found = kmeans(rows, 2, seed=0)
    assert same_partition(found.labels, np.array([0, 0, 0, 1]))


@pytest.mark.parametrize("method", ["kmeans", "farthest_first"])
def test_equal_rows_far_from_the_origin_are_one_cluster(method: str) -> None:
    row = np.random.default_rng(0).normal(1234.567, 1, size=(1, 7)).astype(np.float32)
    assert cluster(method, np.repeat(row, 9, axis=0), 4, seed=0, chunk_rows=4).count == 1


@settings(max_examples=40, deadline=None)
@given(
    method=st.sampled_from(sorted(METHODS)),
    n=st.integers(1, 40),
    k=st.integers(1, 45),
    distinct=st.integers(1, 10),
    seed=st.integers(0, 2**31),
    chunk_rows=st.integers(1, 50),
)
def test_every_row_has_a_cluster_and_every_cluster_a_row(
    method: str, n: int, k: int, distinct: int, seed: int, chunk_rows: int
) -> None:
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((distinct, 3)).astype(np.float32)
    rows = rows[generator.integers(0, distinct, n)]
    found = cluster(method, rows, k, seed=seed, chunk_rows=chunk_rows)
    again = cluster(method, rows, k, seed=seed, chunk_rows=chunk_rows)
    assert np.array_equal(found.labels, again.labels)
    assert found.labels.shape == found.distances.shape == (n,)
    assert (found.sizes > 0).all()
    assert found.count <= min(n, k) or method == "random_projection_lsh"
    assert np.array_equal(np.sort(np.concatenate(found.members())), np.arange(n))
    assert (found.distances >= 0).all()
    if method != "random_partition":  # equal rows stay together
        _, group = np.unique(rows, axis=0, return_inverse=True)
        pairs = set(zip(group.reshape(-1).tolist(), found.labels.tolist(), strict=True))
        assert len(pairs) == len(set(group.reshape(-1).tolist()))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_half_precision_memory_maps_will_do(method: str, tmp_path: object) -> None:
    rows, _ = blobs()
    half = np.memmap(f"{tmp_path}/rows", dtype=np.float16, mode="w+", shape=rows.shape)
    half[:] = rows
    half.flush()
    mapped = np.memmap(f"{tmp_path}/rows", dtype=np.float16, mode="r", shape=rows.shape)
    assert cluster(method, mapped, 4, seed=0).centroids.dtype == np.float32


def test_bad_requests_are_refused() -> None:
    rows, _ = blobs()
    for call in (
        lambda: cluster("kmean", rows, 4, seed=0),
        lambda: kmeans(rows, 0, seed=0),
        lambda: kmeans(rows[:0], 2, seed=0),
        lambda: random_projection_lsh(rows, 4, seed=0, num_bits=63),
    ):
        with pytest.raises(BadInput):
            call()
