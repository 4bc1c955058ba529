"""Common base of selectors by embedding: service, neighbours of target rows, files made offline.

Letters: n training rows, q target rows, k neighbours, d dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Count, ModelDtype, ModelName
from dataflex.data.rows import Rows, RunData
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.selectors.base import Selection, StoreSelector
from dataflex.selectors.row_scores import RowScores
from dataflex.selectors.subset_rule import SubsetRule
from gradstore.errors import BadInput
from gradstore.similarity.neighbours import Neighbours

if TYPE_CHECKING:
    from dataflex.features.embeddings import EmbeddingExport, EmbeddingService
    from dataflex.run.forecast import Forecast


class EmbeddingSelector(StoreSelector):
    """Base of selectors that compare the rows' embeddings with the target's.

    Args:
        embedding_model_name_or_path: a sentence-transformers folder (needs the extra `encoders`),
            any encoder's folder, or a hub id: rows are embedded once, as text. null takes the model
            in training, at every update.
        embedding_model_dtype: of that encoder's weights: auto, fp32, fp16 or bf16.
        embedding_layer: index into the hidden states; -1 is the last layer's output.
        embedding_batch_size: rows of an embedding batch, at most; tokens bound it as well.
        keep_generations: newest steps kept of the embeddings of the model in training; null keeps
            all.
        unique: of rows that are copies of one another, choose none but the first.
    """

    needs_targets = True
    distinct = True
    neutral = frozenset({"embedding_batch_size", "keep_generations"})

    def __init__(
        self,
        embedding_model_name_or_path: ModelName | None = None,
        embedding_model_dtype: ModelDtype = "auto",
        embedding_layer: int = -1,
        embedding_batch_size: Count = 32,
        keep_generations: Count | None = None,
        unique: bool = False,
    ) -> None:
        from dataflex.features.embedders import EmbeddingSettings

        self.embeddings = EmbeddingSettings(
            embedding_model_name_or_path,
            embedding_model_dtype,
            embedding_layer,
            embedding_batch_size,
        )
        self.keep_generations = keep_generations
        self.unique = unique
        if embedding_model_name_or_path is None:
            self.whole_model = frozenset({FSDP, ZERO3})
        #: The rule that a user names in the place of the selector's own; a subclass that offers
        #: one sets it.
        self.rule: SubsetRule | None = None
        #: A file computed offline that replaces embeddings; none are computed then.
        self.file: Path | None = None
        self._service: EmbeddingService | None = None
        self._embedded: EmbeddingExport | None = None
        self._neighbours: Neighbours | None = None

    # -- what a strategy decides ------------------------------------------------------------------

    def choose(
        self, count: int, context: UpdateContext, neighbours: Neighbours | None
    ) -> Selection:
        """Choose the rows; called on rank 0.

        Args:
            count: m.
            context: of the boundary.
            neighbours: of the present embeddings; None where a file stands for them.
        """
        raise TypeError(f"{type(self).__name__} does not implement choose")

    def by_rule(
        self,
        count: int,
        context: UpdateContext,
        neighbours: Neighbours,
        rule: SubsetRule,
        served: npt.NDArray[np.bool_] | None = None,
    ) -> Selection:
        """Choose by a subset rule, which takes a row's mean cosine for its score.

        Args:
            count: m.
            context: of the boundary.
            neighbours: of the present embeddings.
            rule: the rule.
            served: (n,) bool, rows to leave out while the others are enough; brought up to date.
                None leaves none out.
        """
        from gradstore.scoring.influence import influence_scores

        found = influence_scores([neighbours.pair], aggregation="mean")
        scores = RowScores(found.values, found.usable, found.skipped)
        allowed = left = context.among_candidates(scores.usable)
        if served is not None:
            limits, left = rule.limits(context.run.data, count), allowed & ~served
            if count > (int(left.sum()) if limits is None else limits.room(left)):
                served[:], left = False, allowed
        rows = rule.stored_rows(count, scores, left, [neighbours.pair], context)
        if served is not None:
            served[rows] = True
        chosen = scored(rows, scores.values.astype(np.float64), allowed, {})
        return replace(chosen, manifest={**chosen.manifest, **rule.told()})

    # -- life cycle -------------------------------------------------------------------------------

    def check_count(self, count: int, data: RunData) -> None:
        """Refuse, before the model is loaded, rows that can't be answered or chosen by the rule."""
        super().check_count(count, data)
        if self.rule is not None:
            self.rule.check_count(count, data, unique=self.unique)

    def check(self, config: RunConfig) -> list[str]:
        """Return a fault if the encoder's folder, or the file made offline, is missing."""
        if self.file is None:
            return self.embeddings.faults(config)
        return [] if self.file.is_file() else [f"{str(self.file)!r} is not a file here."]

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the embeddings of all rows, and the search of the target's neighbours."""
        if self.file is not None:
            return ()
        from dataflex.features.embedders import embedder_of
        from dataflex.features.forecasts import embedding_forecasts
        from dataflex.run.forecast import Forecast
        from gradstore.pace import product_seconds

        source, train, targets = embedder_of(run, self.embeddings), run.data.train, run.data.targets
        times = 1 if self.embeddings.frozen else len(steps)
        queries, n = sum(len(rows) for rows in targets), len(train)
        seconds = product_seconds(float(queries) * n * source.dim)
        return [
            *embedding_forecasts(run, source, times, (train, *targets), self.keep_generations),
            Forecast(f"search of {queries} rows' neighbours", len(steps), n, 0, seconds),
        ]

    def start(self, run: RunContext) -> None:
        """Open the store; an encoder of its own embeds all rows now, once."""
        if self.file is not None:
            return
        from dataflex.features.embeddings import EmbeddingService

        self._service = EmbeddingService(run, self.embeddings)
        if self._service.frozen:
            self._embedded = self._service.export(0, run.data.targets)

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Embed what is not embedded yet, then choose."""
        if self._service is None:
            return context.run.ranks.decide(lambda: self.choose(count, context, None))
        service, new = self._service, None
        if self._embedded is None or not service.frozen:
            self._neighbours = None
            self._embedded = new = service.export(context.step, context.run.data.targets)
        embedded = self._embedded
        return context.run.ranks.decide(
            lambda: self._choose(count, context, service, embedded, new)
        )

    def _choose(
        self,
        count: int,
        context: UpdateContext,
        service: EmbeddingService,
        embedded: EmbeddingExport,
        new: EmbeddingExport | None,
    ) -> Selection:
        from gradstore.scoring.selection import check_k

        began = time.perf_counter()
        train = service.generation(embedded.train)
        if self._neighbours is None:
            targets = [service.generation(name) for name in embedded.targets]
            cache = service.store.index_folder if service.frozen else None
            self._neighbours = Neighbours(train, targets, cache)
        allowed = context.among_candidates(train.usable)
        check_k(count, int(allowed.sum()), train.rows)
        chosen = self.choose(count, context, self._neighbours)
        if self.keep_generations is not None:
            service.clean(self.keep_generations)
        return replace(
            chosen,
            target_rows=sum(len(rows) for rows in context.run.data.targets),
            tokens=0 if new is None else new.tokens,
            export_seconds=0.0 if new is None else new.seconds,
            select_seconds=time.perf_counter() - began,
            skipped={k: v for k, v in train.status_counts().items() if v and k != "ok"},
            manifest={
                **chosen.manifest,
                "train": embedded.train,
                "targets": list(embedded.targets),
                "commit": train.commit_sha,
            },
        )


def scored(
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float64],
    candidates: npt.NDArray[np.bool_],
    numbers: Mapping[str, float],
) -> Selection:
    """Return a selection with the scores of its rows, and the spread of all candidates' scores.

    Args:
        rows: (m,) chosen positions.
        scores: (n,) of all rows, NaN where a row has none.
        candidates: (n,) bool, rows that might have been chosen.
        numbers: for the Trainer's log.
    """
    spread = spread_of(scores, candidates, rows)
    return Selection(rows, scores[rows], numbers=numbers, manifest={"all_scores": spread})


def load_offline(path: Path, key: str) -> npt.NDArray[Any]:
    """Load a .npy file made offline, without running anything that is in it.

    Raises:
        BadInput: it is not one.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(
            f"{key} {str(path)!r} is no readable .npy file: {error}. Write one with numpy.save."
        ) from error
    if not isinstance(loaded, np.ndarray):
        raise BadInput(f"{key} {str(path)!r} holds several arrays; give a .npy file of one.")
    return loaded


def rows_of_file(train: Rows, key: str) -> npt.NDArray[np.int64]:
    """Return (r,) training row of each row of its source file; -1 where that row was dropped.

    Raises:
        BadInput: the training rows come from several files, so that a row number is ambiguous.
    """
    if train.sources is None:
        return np.arange(len(train), dtype=np.int64)
    names = sorted({name for name, _ in train.sources})
    if len(names) > 1:
        raise BadInput(
            f"{key} numbers the rows of one file, but the training rows come from "
            f"{', '.join(names)}. Leave {key} out: rows are then embedded here."
        )
    numbers = np.array([number for _, number in train.sources], dtype=np.int64)
    rows = np.full(int(numbers.max()) + 1, -1, dtype=np.int64)
    rows[numbers] = np.arange(len(train))
    return rows
