"""Influence by landmarks: gradients of a few rows, from which all others' influence is estimated.

Letters: n training rows, m landmarks, q sub-tasks of the target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Count, Positive
from dataflex.config.registry import register
from dataflex.data.rows import Rows, RunData
from dataflex.run.context import RunContext, UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.less import LessSelector
from dataflex.selectors.row_scores import RowScores
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from dataflex.features.embeddings import EmbeddingService
    from dataflex.features.gradients import FeatureService
    from dataflex.run.forecast import Forecast
    from gradstore.scoring.best_rows import Keep, TargetTable
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.similarity.landmarks import Regression
    from gradstore.store.filling import CheckpointExport
    from gradstore.store.generation import Generation


@register("selector", "landmarks")
class LandmarksSelector(LessSelector):
    """Selector by influence that is computed for some rows, and estimated for all from those.

    At every update: the gradients of the target rows and of the landmarks, their influence as
    `less` has it; of every training row a forward pass, whose error at the output layer makes an
    embedding; kernel ridge regression of influence on embeddings over the landmarks, by which all
    rows are scored. The landmarks are drawn once, by `seed`, from rows with a target token.

    Args:
        landmarks: m, rows whose gradients are computed; all where there are fewer.
        ridge: of the regression; higher smooths more.
        embedding_batch_size: rows of an embedding batch, at most; tokens bound it as well.
        less: as for `LessSelector`.
    """

    paper = (
        "Nikdan et al. 2025, Efficient Data Selection at Scale via Influence Distillation, "
        "arXiv:2505.19051"
    )
    neutral = LessSelector.neutral | {"embedding_batch_size"}

    def __init__(
        self,
        landmarks: Count = 512,
        ridge: Positive = 0.01,
        embedding_batch_size: Count = 32,
        **less: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**less)
        if self.scoring != "projected":
            raise ValueError(
                f"scoring is {self.scoring!r}; landmarks are scored by projected features; leave "
                "it out"
            )
        if landmarks < 2:
            raise ValueError("landmarks is 1; an estimate needs at least 2")
        self.landmarks, self.ridge = landmarks, float(ridge)
        self.embedding_batch_size = embedding_batch_size
        self._embedder: EmbeddingService | None = None
        self._chosen = np.empty(0, dtype=np.int64)
        self._embedded = ""
        self._explained = float("nan")

    # -- life cycle -------------------------------------------------------------------------------

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the embeddings of all rows, and the gradients of landmarks and target."""
        from dataflex.features.embedders import OutputLayer
        from dataflex.features.forecasts import embedding_forecasts, gradient_forecasts

        kept, train = self.keep_generations, run.data.train
        source = OutputLayer(run, self.embedding_batch_size, self.settings.seed)
        gradients = gradient_forecasts(
            run, self.settings, len(steps), sample_rows=len(self.drawn(run.data)), kept=kept
        )
        return [
            *embedding_forecasts(run, source, len(steps), (train,), kept),
            *gradients,
            *self.rerank_forecasts(run, gradients),
        ]

    def start(self, run: RunContext) -> None:
        """Draw the landmarks, open the store."""
        from dataflex.features.embedders import OutputLayer
        from dataflex.features.embeddings import EmbeddingService

        self._chosen = self.drawn(run.data)
        hashes = run.data.train.row_set.hashes[self._chosen]
        self.train_set = f"landmarks-{hashlib.sha256(hashes.tobytes()).hexdigest()[:8]}"
        super().start(run)
        assert self._service is not None  # scoring is projected
        service = self._service
        source = OutputLayer(run, self.embedding_batch_size, self.settings.seed)
        self._embedder = EmbeddingService(run, source.settings, lambda: service.writer, source)

    def drawn(self, data: RunData) -> npt.NDArray[np.int64]:
        """Draw the landmarks, (m,) rising rows; the same for the same rows and seed.

        Raises:
            BadInput: fewer than 2 rows have a target token.
        """
        usable = np.flatnonzero(data.train.target_tokens > 0)
        if len(usable) < 2:
            raise BadInput(f"landmarks: {len(usable)} training rows have a target token; give 2.")
        order = np.random.default_rng(self.settings.seed).permutation(usable)
        return np.sort(order[: self.landmarks])

    # -- selecting --------------------------------------------------------------------------------

    def sample(self, run: RunContext) -> Rows | None:
        """Return the landmarks as a row set of their own."""
        train, chosen = run.data.train, self._chosen.tolist()
        sources = train.sources
        return Rows(
            self.train_set,
            train.dataset.select(chosen),
            None if sources is None else tuple(sources[i] for i in chosen),
        )

    def export(self, service: FeatureService, context: UpdateContext) -> CheckpointExport:
        """Export the embeddings of all rows, the gradients of target and landmarks; collective."""
        assert self._embedder is not None  # since start
        embedded = self._embedder.export(context.step)
        self._embedded = embedded.train
        exported = super().export(service, context)
        return replace(
            exported,
            tokens=exported.tokens + embedded.tokens,
            seconds=exported.seconds + embedded.seconds,
        )

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Choose as `less` does; tell how well the estimate holds."""
        chosen = super().select(count, context)
        # Known on rank 0, whose answer counts.
        return replace(chosen, numbers={**chosen.numbers, "landmarks_explain": self._explained})

    def score(
        self, checkpoints: Sequence[CheckpointFeatures], count: int, context: UpdateContext
    ) -> RowScores:
        """Score all rows from the landmarks' influence."""
        from gradstore.scoring.best_rows import StoredTable
        from gradstore.scoring.influence import subtask_influence

        assert self._embedder is not None  # since start
        found = subtask_influence(
            checkpoints, subtask_sizes=self.subtask_sizes(context.run), product=self.product
        )
        generation = self._embedder.generation(self._embedded)
        estimate, regression = estimated(
            generation, self._chosen, found.values, found.usable, self.ridge
        )
        self._explained = regression.explained
        usable = np.asarray(np.isfinite(estimate).all(axis=1))
        scores = np.full(len(estimate), np.nan)
        scores[usable] = self.fold(estimate[usable], usable[usable], count)
        skipped = {"without_embedding": int((~usable).sum()), "landmark_without_gradient":
                   int((~found.usable).sum())}  # fmt: skip
        told = {reason: number for reason, number in skipped.items() if number}
        table = None
        if self.rule.per_target:
            each = similarities(StoredTable(checkpoints, product=self.product), len(found.usable))
            fitted = fitted_to(generation, self._chosen, each, found.usable, self.ridge)
            table = EstimatedTable(generation, fitted, each.shape[1])
        return RowScores(scores, usable, told, self.best_of(estimate), table)


@dataclass(frozen=True)
class EstimatedTable:
    """Similarities of n rows with t target rows, estimated from their embeddings chunk by chunk.

    Attributes:
        embeddings: of the n rows.
        regression: of the landmarks' similarities.
        targets: t.
    """

    embeddings: Generation
    regression: Regression
    targets: int

    def stream(self, keep: Keep) -> None:
        """Give every chunk to `keep` once, in order; nan where a row has no embedding."""
        from gradstore.similarity.rows import read_unit_rows

        for part in read_unit_rows(self.embeddings):
            keep(part.start, self.regression(part.rows).astype(np.float32))


def similarities(table: TargetTable, rows: int) -> npt.NDArray[np.float32]:
    """Hold a table's (rows, t) similarities in memory."""
    held = np.empty((rows, table.targets), dtype=np.float32)

    def keep(start: int, sums: npt.NDArray[np.float32]) -> None:
        held[start : start + len(sums)] = sums

    table.stream(keep)
    return held


def estimated(
    embeddings: Generation,
    landmarks: npt.NDArray[np.int64],
    influence: npt.NDArray[np.floating[Any]],
    usable: npt.NDArray[np.bool_],
    ridge: float,
) -> tuple[npt.NDArray[np.float64], Regression]:
    """Estimate the influence of all rows, (n, q), from that of the landmarks.

    Args:
        embeddings: of the n rows.
        landmarks: (m,) rising rows.
        influence: (m, q) of each.
        usable: (m,) bool, landmarks that have one.
        ridge: of the regression.

    Returns:
        (n, q), NaN for a row without an embedding; the regression.

    Raises:
        BadInput: as `fitted_to`.
    """
    from gradstore.similarity.rows import read_unit_rows

    regression = fitted_to(embeddings, landmarks, influence, usable, ridge)
    parts = [regression(part.rows) for part in read_unit_rows(embeddings)]
    return np.concatenate(parts), regression


def fitted_to(
    embeddings: Generation,
    landmarks: npt.NDArray[np.int64],
    influence: npt.NDArray[np.floating[Any]],
    usable: npt.NDArray[np.bool_],
    ridge: float,
) -> Regression:
    """Fit the landmarks' values to their embeddings; arguments as of `estimated`.

    Raises:
        BadInput: fewer than 2 landmarks can be used; what `fit` refuses.
    """
    from gradstore.similarity.landmarks import fit
    from gradstore.similarity.rows import UsableRows

    both = usable & embeddings.usable[landmarks]
    at = np.zeros(embeddings.rows, dtype=bool)
    at[landmarks[both]] = True
    return fit(UsableRows(embeddings, at)[:], influence[both], ridge)
