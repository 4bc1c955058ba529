"""LESS by clusters: a few rows' gradients speak for all rows like them.

Letters: n training rows, k clusters, r representatives, d projected dimensions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Interval

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Count, ModelDtype, ModelName
from dataflex.config.registry import register
from dataflex.data.rows import Rows
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.log import progress
from dataflex.selectors.less import LessSelector
from dataflex.selectors.rerank import check_alone
from dataflex.selectors.row_scores import RowScores
from gradstore.similarity.clusters import Method
from gradstore.similarity.rows import ClusterDirections

if TYPE_CHECKING:
    from dataflex.features.embeddings import EmbeddingExport, EmbeddingService
    from dataflex.features.gradients import FeatureService
    from dataflex.run.forecast import Forecast
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.store.filling import CheckpointExport

Strategy = Literal["random", "nearest", "farthest", "mixed"]


@dataclass(frozen=True)
class RowClusters:
    """Clusters of rows, and the representatives whose gradients are computed.

    Attributes:
        labels: (n,) int64, cluster of each row; -1 where its embedding can't be used.
        distances: (n,) float32, squared distance to the cluster's centroid; NaN there.
        representatives: (r,) int64, rising rows whose gradients are taken.
    """

    labels: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]
    representatives: npt.NDArray[np.int64]

    @property
    def count(self) -> int:
        """Number of clusters, k."""
        return int(self.labels.max()) + 1


@register("selector", "cluster_less")
class ClusterLessSelector(LessSelector):
    """Selector of rows from the clusters whose representatives have the largest influence.

    Rows are embedded and clustered once, representatives drawn once; their gradients are taken at
    every update, 1 row in 16 by default. The mean of a cluster's unit gradients is its direction;
    its rows share the score, and those nearest to the centroid come first.

    Args:
        cluster_size: rows of a cluster, on average.
        num_clusters: null makes as many as cluster_size says.
        samples_per_cluster: representatives, at most.
        clustering_batch_size: rows of an embedding batch, at most; tokens bound it as well.
        clustering_max_iter: updates of the centroids, at most.
        assignment_chunk_size: rows compared with all centroids at once.
        clustering_method: kmeans, spherical_kmeans, farthest_first, random_projection_lsh or
            random_partition.
        lsh_num_bits: hyperplanes of random_projection_lsh; null follows the number of clusters.
        representative_strategy: random, nearest or farthest to the centroid, or mixed (both).
        embedding_model_name_or_path: a sentence-transformers folder (needs the extra `encoders`),
            any encoder's folder, or a hub id; null takes the model in training, at the first
            update.
        embedding_model_dtype: of that encoder's weights: auto, fp32, fp16 or bf16.
        embedding_layer: index into the hidden states; -1 is the last layer's output.
        less: as for `LessSelector`; `seed` is also that of clusters and representatives.
    """

    neutral = LessSelector.neutral | {"clustering_batch_size"}

    def __init__(
        self,
        cluster_size: Count = 64,
        num_clusters: Count | None = None,
        samples_per_cluster: Count = 3,
        clustering_batch_size: Count = 8,
        clustering_max_iter: Count = 20,
        assignment_chunk_size: Count = 4096,
        clustering_method: Method = "kmeans",
        lsh_num_bits: Annotated[int, Interval(ge=1, le=62)] | None = None,
        representative_strategy: Strategy = "random",
        embedding_model_name_or_path: ModelName | None = None,
        embedding_model_dtype: ModelDtype = "auto",
        embedding_layer: int = -1,
        **less: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        from dataflex.features.embedders import EmbeddingSettings

        super().__init__(**less)
        if self.scoring != "projected":
            raise ValueError(
                f"scoring is {self.scoring!r}; cluster_less scores projected features; leave it out"
            )
        if not self.rule.plain:
            raise ValueError(
                f"subset is {self.rule.subset!r}, quotas are {dict(self.rule.quotas)}; cluster_less"
                " takes whole clusters, best first, by a rule of its own; leave both out"
            )
        check_alone(self.rerank, "cluster_less takes whole clusters")
        self.cluster_size, self.num_clusters = cluster_size, num_clusters
        self.samples_per_cluster = samples_per_cluster
        self.max_iter, self.chunk_rows = clustering_max_iter, assignment_chunk_size
        self.method, self.lsh_num_bits = clustering_method, lsh_num_bits
        self.representative_strategy: Strategy = representative_strategy
        self.embeddings = EmbeddingSettings(
            embedding_model_name_or_path,
            embedding_model_dtype,
            embedding_layer,
            clustering_batch_size,
        )
        self._embedder: EmbeddingService | None = None
        self._clusters: RowClusters | None = None

    # -- life cycle -------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> list[str]:
        """Return a fault if the encoder's folder is missing."""
        return [*super().check(config), *self.embeddings.faults(config)]

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast embeddings and clusters, made once, and the gradients of representatives."""
        from dataflex.features.embedders import embedder_of
        from dataflex.features.forecasts import embedding_forecasts, gradient_forecasts

        n, source = len(run.data.train), embedder_of(run, self.embeddings)
        representing = min(n, self.clusters_of(n) * self.samples_per_cluster)
        return [
            *embedding_forecasts(run, source, 1, (run.data.train,)),
            self._clustering(n, source.dim),
            *gradient_forecasts(
                run, self.settings, len(steps), sample_rows=representing, kept=self.keep_generations
            ),
        ]

    def _clustering(self, n: int, d: int) -> Forecast:
        """Forecast the clustering of n rows by its multiplications, at most, on the CPU."""
        from dataflex.run.forecast import Forecast
        from gradstore.pace import product_seconds
        from gradstore.similarity.clusters import rows_read

        k = self.clusters_of(n)
        compared = k if self.method in ("kmeans", "spherical_kmeans") else 1
        reads = rows_read(self.method, n, k, self.max_iter)
        seconds = product_seconds(float(reads) * compared * d)
        return Forecast(f"{self.method}, {k:,} clusters, at most", 1, n, 0, seconds)

    def start(self, run: RunContext) -> None:
        """Open the store; with an encoder of its own, embed and cluster now."""
        super().start(run)
        if self._clusters is not None:
            self.train_set = name_of_sample(run.data.train, self._clusters)
        if self._clusters is not None or self._service is None:
            return
        from dataflex.features.embeddings import EmbeddingService

        service = self._service
        self._embedder = EmbeddingService(run, self.embeddings, lambda: service.writer)
        if self._embedder.frozen:
            self._cluster(run, self._embedder, 0)

    def state(self) -> dict[str, Any]:
        """Return the store's part of the state, and the clusters once they are made."""
        made = self._clusters
        clusters = {} if made is None else {"clusters": dict(vars(made))}
        return {**super().state(), **clusters}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the same clusters and representatives."""
        super().restore(state)
        if "clusters" in state:
            self._clusters = RowClusters(**state["clusters"])

    # -- selecting --------------------------------------------------------------------------------

    def export(self, service: FeatureService, context: UpdateContext) -> CheckpointExport:
        """Export gradients of the target and of the representatives; collective."""
        embedded = None
        if self._clusters is None and self._embedder is not None:
            embedded = self._cluster(context.run, self._embedder, context.step)
        exported = super().export(service, context)
        if embedded is None:
            return exported
        return replace(
            exported,
            tokens=exported.tokens + embedded.tokens,
            seconds=exported.seconds + embedded.seconds,
        )

    def sample(self, run: RunContext) -> Rows | None:
        """Return the representatives as a row set of their own."""
        train, chosen = run.data.train, self._made.representatives
        sources = train.sources
        return Rows(
            self.train_set,
            train.dataset.select(chosen.tolist()),
            None if sources is None else tuple(sources[i] for i in chosen.tolist()),
        )

    def score(
        self, checkpoints: Sequence[CheckpointFeatures], count: int, context: UpdateContext
    ) -> RowScores:
        """Score each row with the score of its cluster."""
        made = self._made
        owners = made.labels[made.representatives]
        of_clusters = super().score(
            [replace(c, train=ClusterDirections(c.train, owners, made.count)) for c in checkpoints],
            count,
            context,
        )
        placed = made.labels >= 0
        values = np.where(placed, of_clusters.values[made.labels], np.nan)
        usable = placed & of_clusters.usable[made.labels]
        skipped = {
            "without_embedding": int((~placed).sum()),
            "without_gradient": int((placed & ~usable).sum()),
        }
        return RowScores(values, usable, {k: v for k, v in skipped.items() if v})

    def take(
        self,
        scores: npt.NDArray[np.floating[Any]],
        count: int,
        candidates: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int64]:
        """Take the best clusters first; inside one, the rows nearest to its centroid."""
        from gradstore.scoring.selection import check_k

        rows = np.flatnonzero(candidates & ~np.isnan(scores))
        check_k(count, len(rows), len(scores))
        order = np.lexsort((rows, self._made.distances[rows], -scores[rows]))
        return rows[order[:count]].astype(np.int64)

    def clusters_of(self, n: int) -> int:
        """Return the number of clusters that are made of n rows, at most."""
        return self.num_clusters or math.ceil(n / self.cluster_size)

    @property
    def _made(self) -> RowClusters:
        if self._clusters is None:
            raise RuntimeError("the rows are not clustered yet")
        return self._clusters

    def _cluster(self, run: RunContext, service: EmbeddingService, step: int) -> EmbeddingExport:
        """Embed the training rows and cluster them; collective, once per run."""
        embedded = service.export(step)
        made = run.ranks.decide(lambda: self._grouped(run, service, embedded))
        self._clusters, self.train_set = made, name_of_sample(run.data.train, made)
        return embedded

    def _grouped(
        self, run: RunContext, service: EmbeddingService, made: EmbeddingExport
    ) -> RowClusters:
        from gradstore.similarity.clusters import cluster, rows_read
        from gradstore.similarity.row_chunks import CountedRows
        from gradstore.similarity.rows import UsableRows

        rows: Any = UsableRows(service.generation(made.train))
        k = self.clusters_of(len(rows))
        reads = rows_read(self.method, len(rows), k, self.max_iter)
        with progress(f"{self.method} of {len(rows)} rows, {k} clusters", reads,
                      shown=run.shows_progress) as advance:  # fmt: skip
            found = cluster(
                self.method,
                CountedRows(rows, advance),
                k,
                seed=self.settings.seed,
                max_iter=self.max_iter,
                lsh_num_bits=self.lsh_num_bits,
                chunk_rows=self.chunk_rows,
                device=next(run.model.parameters()).device,
            )
        n = len(run.data.train)
        labels = np.full(n, -1, dtype=np.int64)
        distances = np.full(n, np.nan, dtype=np.float32)
        labels[rows.rows], distances[rows.rows] = found.labels, found.distances
        chosen = representatives(
            labels,
            distances,
            run.data.train.target_tokens > 0,
            self.samples_per_cluster,
            self.representative_strategy,
            self.settings.seed,
        )
        return RowClusters(labels, distances, chosen)


def name_of_sample(train: Rows, clusters: RowClusters) -> str:
    """Return the representatives' name in the store: different representatives are another set."""
    hashes = train.row_set.hashes[clusters.representatives]
    return f"representatives-{hashlib.sha256(hashes.tobytes()).hexdigest()[:8]}"


def representatives(
    labels: npt.NDArray[np.int64],
    distances: npt.NDArray[np.floating[Any]],
    eligible: npt.NDArray[np.bool_],
    per_cluster: int,
    strategy: Strategy,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Choose (r,) rows that represent their clusters, in rising order.

    Args:
        labels: (n,) cluster of each row; -1 for none.
        distances: (n,) to its centroid.
        eligible: (n,) bool, rows that may represent: those with a target token.
        per_cluster: at most so many of each cluster.
        strategy: random, nearest, farthest, or mixed: the nearest half and the farthest half.
        seed: of random.
    """
    chosen: list[npt.NDArray[np.int64]] = []
    rows = np.flatnonzero(eligible & (labels >= 0))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    stops = np.cumsum(np.bincount(labels[rows]))
    for number, members in enumerate(np.split(rows, stops[:-1])):
        if strategy == "random":
            chosen.append(np.random.default_rng([seed, number]).permutation(members)[:per_cluster])
            continue
        order = members[np.argsort(distances[members], kind="stable")]
        near = {"nearest": per_cluster, "farthest": 0, "mixed": -(-per_cluster // 2)}[strategy]
        far = order[near:][::-1][: per_cluster - near]
        chosen += [order[:near], far]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
