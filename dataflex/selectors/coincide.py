"""COINCIDE: a coreset of vision-language rows, spread over clusters that transfer well.

Letters: n rows, k clusters, m chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le, MinLen

from dataflex.config.parameters import Count, ModelDtype, ModelName, Natural
from dataflex.config.registry import register
from dataflex.data.images import have_pictures
from dataflex.models.paths import model_path_faults
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.log import progress
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.selectors.base import Selection, StoreSelector
from gradstore.errors import BadInput
from gradstore.format.foreign import read_object
from gradstore.similarity.coresets import Groups

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from dataflex.data.rows import RunData
    from dataflex.features.embedders import Embedder
    from dataflex.features.embeddings import EmbeddingExport, EmbeddingService
    from dataflex.run.forecast import Forecast
    from gradstore.similarity.rows import UsableRows

_log = logging.getLogger(__name__)

#: Rows of a cluster, on average, and most clusters, where the user sets no number.
ROWS_PER_CLUSTER, MOST_CLUSTERS = 64, 10_000


@register("selector", "coincide")
class CoincideSelector(StoreSelector):
    """Selector of rows from every cluster of vision-language features, most from transferable ones.

    A row's score is the transferability of its cluster.

    Args:
        embedding_model_name_or_path: a fixed vision-language model whose features are taken once;
            null takes the model in training, again at every update.
        embedding_model_dtype: of a fixed model's weights: auto, fp32, fp16 or bf16.
        embedding_layers: numbers of decoder layers, from 0; null takes five, evenly spread.
        num_clusters: null for a 64th of the rows, at most 10000.
        clustering_batch_size: rows of a batch through the model, at most.
        clustering_device: auto (the model's), cpu, cuda.
        clustering_max_iter: updates of the centroids, at most.
        assignment_chunk_size: rows compared with all centroids at once.
        temperature: tau; the smaller, the more the best clusters are preferred.
        density_chunk_size: rows of a cluster compared with its others at once.
        single_member_density: density of a cluster of one row.
        advance: leave out rows of earlier updates while others last; null: only with a fixed model,
            whose features never change.
        keep_generations: newest steps kept in the store; null keeps the newest alone in the run's
            own store, since features are long, and all in one that others may use.
        seed: of the first centroids.
    """

    distinct = True
    paper = "Lee et al. 2024, COINCIDE, arXiv:2406.10995"
    neutral = frozenset({"clustering_batch_size", "keep_generations"})

    def __init__(
        self,
        embedding_model_name_or_path: ModelName | None = None,
        embedding_model_dtype: ModelDtype = "auto",
        embedding_layers: Annotated[Sequence[Natural], MinLen(1)] | None = None,
        num_clusters: Count | None = None,
        clustering_batch_size: Count = 8,
        clustering_device: Literal["auto", "cpu", "cuda"] = "auto",
        clustering_max_iter: Count = 10,
        assignment_chunk_size: Count = 4096,
        temperature: Annotated[float, Gt(0)] = 0.1,
        density_chunk_size: Count = 2048,
        single_member_density: Annotated[float, Gt(0), Le(1)] = 1.0,
        advance: bool | None = None,
        keep_generations: Count | None = None,
        seed: Natural = 42,
    ) -> None:
        from dataflex.features.vision import VisionSettings

        if embedding_layers is not None and len(set(embedding_layers)) < len(embedding_layers):
            raise ValueError(f"embedding_layers is {list(embedding_layers)}; name every layer once")
        self.settings = VisionSettings(
            embedding_model_name_or_path,
            embedding_model_dtype,
            None if embedding_layers is None else tuple(embedding_layers),
            clustering_batch_size,
        )
        self.num_clusters = num_clusters
        self.device = clustering_device
        self.max_iter = clustering_max_iter
        self.chunk_rows = assignment_chunk_size
        self.temperature = float(temperature)
        self.density_chunk = density_chunk_size
        self.single_density = float(single_member_density)
        self.fixed = embedding_model_name_or_path is not None
        if not self.fixed:
            self.whole_model = frozenset({FSDP, ZERO3})
        self.advance = self.fixed if advance is None else advance
        self.keep_generations = keep_generations
        self.seed = seed
        self._service: EmbeddingService | None = None
        self._embedded: EmbeddingExport | None = None
        self._groups: Groups | None = None
        #: Rows of earlier updates, where they are left out.
        self._served = np.empty(0, dtype=np.int64)

    # -- checks -----------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> list[str]:
        """Return a fault for a text-only model, where its folder says so."""
        from gradstore.export.visual import VISUAL_KEYS

        faults = []
        for key, path in (
            ("model_name_or_path", config.known.model_name_or_path),
            ("embedding_model_name_or_path", self.settings.model),
        ):
            file = Path(str(path)).expanduser() / "config.json"
            if path is None or not file.is_file():
                continue
            if broken := model_path_faults(key, str(path)):
                faults += broken
                continue
            content = read_object(file.read_text(encoding="utf-8"))
            if not set(VISUAL_KEYS) & set(content):
                faults.append(
                    f"component coincide needs a vision-language model, but {key} {str(path)!r} "
                    f"({content.get('model_type', 'unknown type')}) has no image tokens. Choose a "
                    "model such as LLaVA or Qwen2-VL, or another component."
                )
        return faults

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Refuse rows without pictures."""
        if not have_pictures(data.train):
            raise BadInput(
                "component coincide needs rows with images, but no training row has one. Add an "
                "images column (and its tag in dataset_info.json), or choose another component."
            )

    # -- life cycle -------------------------------------------------------------------------------

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the features of the training rows."""
        from dataflex.features.forecasts import embedding_forecasts

        times = 1 if self.fixed else len(steps)
        kept = self._kept(run)
        return embedding_forecasts(run, self.source(run), times, (run.data.train,), kept)

    def start(self, run: RunContext) -> None:
        """Open the store; a fixed model's features are taken now, once."""
        from dataflex.features.embedders import EmbeddingSettings
        from dataflex.features.embeddings import EmbeddingService

        self._service = EmbeddingService(
            run, EmbeddingSettings(self.settings.model), source=self.source(run)
        )
        if self.fixed:
            self._embedded = self._service.export(0)

    def source(self, run: RunContext) -> Embedder:
        """Return what makes the features of rows: a fixed model, or the one in training."""
        from dataflex.features.vision import CurrentVisionModel, FixedVisionModel

        return (FixedVisionModel if self.fixed else CurrentVisionModel)(run, self.settings)

    def state(self) -> dict[str, Any]:
        """Return the rows that later updates leave out."""
        return {"served": self._served}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on leaving them out."""
        self._served = np.asarray(state.get("served", ()), dtype=np.int64)

    # -- selecting --------------------------------------------------------------------------------

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Take features of all rows, cluster them, and choose; rank 0 decides."""
        service = self._service
        assert service is not None  # since start
        tokens, seconds = 0, 0.0
        if self._embedded is None or not self.fixed:
            self._groups = None
            self._embedded = service.export(context.step)
            tokens, seconds = self._embedded.tokens, self._embedded.seconds
        train, ranks = self._embedded.train, context.run.ranks
        selection = ranks.decide(lambda: self._choose(count, context, service, train))
        return replace(selection, tokens=tokens, export_seconds=seconds)

    def _choose(
        self, count: int, context: UpdateContext, service: EmbeddingService, name: str
    ) -> Selection:
        """Choose the rows of one update, on rank 0."""
        from gradstore.scoring.selection import check_k
        from gradstore.similarity.rows import UsableRows

        began = time.perf_counter()
        train = service.generation(name)
        features = UsableRows(train)
        allowed = context.among_candidates(train.usable)
        check_k(count, int(allowed.sum()), train.rows)
        if self.advance:
            fresh = allowed.copy()
            fresh[self._served] = False
            if fresh.sum() < count:
                self._served = np.empty(0, dtype=np.int64)
            else:
                allowed = fresh
        device = self._device(context.run)
        if self._groups is None:
            self._groups = self._grouped(features, device)
        clustered = time.perf_counter()
        spread = self._groups.spread(
            features,
            count,
            allowed[features.rows],
            temperature=self.temperature,
            device=device,
            chunk_rows=self.density_chunk,
        )
        rows = features.rows[spread.rows]
        if self.advance:
            self._served = np.union1d(self._served, rows)
        if (keep := self._kept(context.run)) is not None and not self.fixed:
            service.clean(keep)
        return Selection(
            rows,
            self._groups.transfer[spread.clusters],
            numbers={**self._groups.numbers, **spread.numbers},
            score_seconds=clustered - began,
            select_seconds=time.perf_counter() - clustered,
            skipped={k: v for k, v in train.status_counts().items() if v and k != "ok"},
            manifest={"train": name, "commit": train.commit_sha, "clusters": self._groups.count},
        )

    def _grouped(self, features: UsableRows, device: str) -> Groups:
        """Cluster all usable rows and judge the clusters."""
        from gradstore.similarity.clusters import rows_read, spherical_kmeans
        from gradstore.similarity.row_chunks import CountedRows

        by_size = round(len(features) / ROWS_PER_CLUSTER)
        k = self.num_clusters or max(1, min(MOST_CLUSTERS, by_size))
        reads = rows_read("spherical_kmeans", len(features), k, self.max_iter)
        with progress(f"k-means of {len(features)} rows, {k} clusters", reads,
                      shown=False) as advance:  # fmt: skip
            clusters = spherical_kmeans(
                CountedRows(features, advance),
                k,
                seed=self.seed,
                max_iter=self.max_iter,
                chunk_rows=self.chunk_rows,
                device=device,
            )
        if clusters.count > len(features) / 2 > 1:
            _log.warning(
                "coincide: %d clusters of %d rows: most hold one row, so their densities are "
                "meaningless. Lower num_clusters, or leave it out",
                clusters.count,
                len(features),
            )
        return Groups.of(
            features, clusters, device=device, chunk_rows=self.density_chunk,
            single=self.single_density,
        )  # fmt: skip

    def _kept(self, run: RunContext) -> int | None:
        """Return how many steps' features the store keeps; None for all."""
        return self.keep_generations or (None if run.config.own_store is None else 1)

    def _device(self, run: RunContext) -> str:
        """Return the device that distances are computed on."""
        own = next(run.model.parameters()).device
        return str(own) if self.device == "auto" else self.device
