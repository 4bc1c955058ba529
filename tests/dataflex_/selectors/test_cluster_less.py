"""The cluster_less selector against the worked numbers E12."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.selectors.cluster_less import (
    ClusterLessSelector,
    RowClusters,
    Strategy,
    representatives,
)
from gradstore.errors import BadInput
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.similarity.rows import ClusterDirections


class Plain:
    """Features as rows of an array."""

    def __init__(self, features: Any, usable: Any = None) -> None:
        self.features = np.asarray(features, dtype=np.float32)
        self.rows, self.dim = self.features.shape
        self.usable = np.ones(self.rows, bool) if usable is None else np.asarray(usable)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.features[start:stop]


def selector(clusters: RowClusters, **params: Any) -> ClusterLessSelector:
    made = ClusterLessSelector(**params)
    made.restore({"clusters": vars(clusters)})
    return made


def boundary(n: int) -> Any:
    config = SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=None))
    return SimpleNamespace(run=SimpleNamespace(config=config))


#: Rows 0, 2, 4 are cluster 0 (represented by 0 and 4), rows 1 and 3 cluster 1 (by 3).
E12 = RowClusters(
    np.array([0, 1, 0, 1, 0, -1]),
    np.array([0.3, 0.2, 0.1, 0.1, 0.2, np.nan], dtype=np.float32),
    np.array([0, 3, 4]),
)


def test_e12_a_clusters_score_is_the_cosine_of_its_mean_unit_representative() -> None:
    sample = Plain([(1.0, 0.0), (0.0, 5.0), (8.0, 6.0)])
    checkpoint = CheckpointFeatures(sample, (Plain([(0.6, 0.8)]),))
    less = selector(E12)
    scored = less.score([checkpoint], 4, boundary(6))
    np.testing.assert_allclose(
        scored.values, [0.822192, 0.8, 0.822192, 0.8, 0.822192, np.nan], atol=1e-5
    )
    assert scored.skipped == {"without_embedding": 1}
    rows = less.take(scored.values, 4, scored.usable)
    assert rows.tolist() == [2, 4, 0, 3], "cluster 0 first, nearest to the centroid first"


def test_an_unusable_representative_is_left_out_and_a_cluster_without_one_is_skipped() -> None:
    sample = Plain([(1.0, 0.0), (np.nan, 0.0), (8.0, 6.0)], [True, False, False])
    directions = ClusterDirections(sample, np.array([0, 1, 0]), 2)
    assert directions.usable.tolist() == [True, False]
    np.testing.assert_array_equal(directions.read(0, 1), [[1.0, 0.0]])
    scored = selector(E12).score(
        [CheckpointFeatures(sample, (Plain([(0.6, 0.8)]),))], 2, boundary(6)
    )
    assert scored.usable.tolist() == [True, False, True, False, True, False]
    assert scored.skipped == {"without_embedding": 1, "without_gradient": 2}
    with pytest.raises(BadInput, match="asked 4, 3 usable"):
        selector(E12).take(scored.values, 4, scored.usable)


def test_checkpoints_add_up_by_their_weight() -> None:
    target = Plain([(0.6, 0.8)])
    samples = [Plain([(1, 0), (0, 1), (1, 0)]), Plain([(0, 1), (1, 0), (0, 1)])]
    checkpoints = [
        CheckpointFeatures(s, (target,), w) for s, w in zip(samples, (0.75, 0.25), strict=True)
    ]
    scored = selector(E12).score(checkpoints, 2, boundary(6))
    np.testing.assert_allclose(scored.values[:2], [0.75 * 0.6 + 0.25 * 0.8, 0.65 + 0.1], atol=1e-6)


LABELS = np.array([0, 0, 0, 0, 1, 1, -1, 0, 2])
DISTANCES = np.array([4.0, 1.0, 3.0, 2.0, 0.5, 0.5, np.nan, 1.0, 9.0])


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("nearest", [1, 3, 4, 5, 7, 8]),
        ("farthest", [0, 2, 3, 4, 5, 8]),
        ("mixed", [0, 1, 4, 5, 7, 8]),
    ],
)
def test_representatives_by_distance(strategy: Any, expected: list[int]) -> None:
    found = representatives(LABELS, DISTANCES, LABELS > -5, 3, strategy, seed=0)
    assert found.tolist() == expected


@given(
    labels=st.lists(st.integers(-1, 4), min_size=1, max_size=40),
    per_cluster=st.integers(1, 5),
    strategy=st.sampled_from(get_args(Strategy)),
    seed=st.integers(0, 100),
)
def test_every_cluster_is_represented_by_eligible_rows_of_its_own(
    labels: list[int], per_cluster: int, strategy: Any, seed: int
) -> None:
    groups = np.array([*labels, 0])
    eligible = np.arange(len(groups)) % 3 != 1
    eligible[-1] = True
    distances = np.random.default_rng(seed).random(len(groups))
    found = representatives(groups, distances, eligible, per_cluster, strategy, seed)
    assert (np.diff(found) > 0).all()
    assert eligible[found].all()
    for number in range(groups.max() + 1):
        members = int(((groups == number) & eligible).sum())
        assert (groups[found] == number).sum() == min(per_cluster, members)
    again = representatives(groups, distances, eligible, per_cluster, strategy, seed)
    np.testing.assert_array_equal(found, again)


def test_a_resumed_selector_has_the_same_clusters() -> None:
    kept = selector(E12)
    resumed = ClusterLessSelector()
    resumed.restore(kept.state())
    for name, value in kept.state()["clusters"].items():
        np.testing.assert_array_equal(resumed.state()["clusters"][name], value)
    assert ClusterLessSelector().state() == {}


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"cluster_size": 0}, "cluster_size is 0"),
        ({"num_clusters": -1}, "num_clusters is -1"),
        ({"samples_per_cluster": 1.5}, "samples_per_cluster is 1.5"),
        ({"clustering_batch_size": 0}, "clustering_batch_size is 0"),
        ({"clustering_max_iter": 0}, "clustering_max_iter is 0"),
        ({"assignment_chunk_size": 0}, "assignment_chunk_size is 0"),
        ({"clustering_method": "kmedoids"}, "choose kmeans, spherical_kmeans, farthest_first"),
        ({"lsh_num_bits": 63}, "it must be from 1 to 62"),
        ({"representative_strategy": "best"}, "choose random, nearest, farthest or mixed"),
        ({"scoring": "direct"}, "scoring is 'direct'"),
        ({"embedding_model_dtype": "int4"}, "embedding_model_dtype is 'int4'"),
    ],
)
def test_parameters_out_of_range_are_refused(params: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ClusterLessSelector(**params)
