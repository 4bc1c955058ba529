"""Methods of rules.py and real.py by a selector's own rule, and one that no target has part in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
from world import Chosen, World

from dataflex.data.rows import Rows
from dataflex.selectors.cluster_less import ClusterLessSelector, RowClusters, representatives
from dataflex.selectors.icons import IconsSelector
from dataflex.selectors.tsds import TsdsSelector
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores, subtask_influence
from gradstore.scoring.selection import select_top
from gradstore.similarity.clusters import cluster
from gradstore.similarity.rows import ClusterDirections

Floats = npt.NDArray[np.float32]


def by_loss(world: World, target: int) -> Chosen:
    """Rows that the model finds hardest; the target has no part in it."""
    losses = world.once("losses", lambda: world.run.losses(world.run.data.train))
    return select_top(losses, world.k)


def icons(world: World, target: int) -> Chosen:
    """Rows that many target rows vote for, each a task of its own, as selectors/icons.py does."""
    rows, queries = world.run.data.train, world.run.data.targets[target]
    features = world.features("adam_marginal", rows), (world.features("sgd", queries),)
    sizes = [1] * len(queries)
    found = subtask_influence([CheckpointFeatures(*features)], subtask_sizes=sizes).values
    votes = IconsSelector().fold(found, np.ones(len(found), dtype=bool), world.k)
    return select_top(votes, world.k)


class Cosines:
    """Neighbours among embeddings in memory, as `gradstore.similarity.neighbours` has them."""

    def __init__(self, train: Floats, queries: Floats) -> None:
        """Take (n, d) and (q, d) rows of length 1."""
        self._train, self._queries = train, queries
        self.usable = np.ones(len(train), dtype=bool)

    def nearest(self, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Return (q, k) cosines, highest first, and (q, k) training rows."""
        return self._best(self._queries, k)

    def around(self, rows: npt.NDArray[np.int64], k: int) -> Floats:
        """Return (len(rows), k) cosines of training rows to their nearest, themselves first."""
        return self._best(self._train[rows], k)[0]

    def _best(self, asked: Floats, k: int) -> tuple[Floats, npt.NDArray[np.int64]]:
        cosines = asked @ self._train.T
        rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(cosines, rows, axis=1), rows


def cluster_less(world: World, target: int) -> Chosen:
    """Rows of the clusters whose representatives help most, as selectors/cluster_less.py does."""
    train, queries = world.run.data.train, world.run.data.targets[target]
    selector, n = ClusterLessSelector(), len(train)
    embedded, k = world.embeddings("mean", train), selector.clusters_of(n)
    seed, every = selector.settings.seed, np.ones(n, dtype=bool)
    found = cluster(selector.method, embedded, k, seed=seed, max_iter=selector.max_iter)
    chosen = representatives(
        found.labels, found.distances, every, selector.samples_per_cluster,
        selector.representative_strategy, seed,
    )  # fmt: skip
    selector.restore({"clusters": vars(RowClusters(found.labels, found.distances, chosen))})
    some = Rows(f"{len(chosen)} representatives", train.dataset.select(chosen.tolist()))
    gradients = world.features("adam_marginal", some)
    directions = ClusterDirections(gradients, found.labels[chosen], k)
    pair = CheckpointFeatures(directions, (world.features("sgd", queries),))
    of_clusters = influence_scores([pair]).values
    return selector.take(of_clusters[found.labels], world.k, every)


def tsds(world: World, target: int) -> Chosen:
    """Rows drawn by a transport from the target's hidden states, as selectors/tsds.py does."""
    data = world.run.data
    sets = (data.train, data.targets[target])
    near: Any = Cosines(*(world.embeddings("mean", rows) for rows in sets))
    context: Any = SimpleNamespace(
        run=SimpleNamespace(data=data), step=world.run.step, among_candidates=lambda usable: usable
    )
    return TsdsSelector().choose(world.k, context, near).indices
