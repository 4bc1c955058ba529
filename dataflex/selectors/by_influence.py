"""Common base of selectors by gradient influence: store, generations, state, two ways to score.

Letters: n training rows, q sub-tasks of the target.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Ge

from dataflex.config.parameters import Count
from dataflex.data.rows import Rows, RunData
from dataflex.features.settings import FeatureSettings
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.log import progress
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.selectors.base import Selection, StoreSelector
from dataflex.selectors.directly import select_directly
from dataflex.selectors.product import (
    AnyPreconditioner,
    check_product,
    in_metric,
    product_of,
    product_told,
)
from dataflex.selectors.ranked_again import rank_again
from dataflex.selectors.rerank import lora_alone, rerank_of
from dataflex.selectors.row_scores import RowScores
from dataflex.selectors.subset_rule import SubsetRule
from gradstore.scoring.metric import Normalize

if TYPE_CHECKING:
    from dataflex.features.gradients import FeatureService
    from dataflex.features.target_source import TargetFeatures
    from dataflex.run.forecast import Forecast
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.store.filling import CheckpointExport


class InfluenceSelector(StoreSelector):
    """Base of selectors that score a row by its gradient's cosines to the target's gradients.

    A subclass says in `fold` what a row's influence on the sub-tasks adds up to.

    Args:
        scoring: projected (through the store) or direct (exact, nothing stored).
        checkpoints: generations combined, weighted by learning rate: last, all, or a number.
        keep_generations: newest checkpoints kept in the store; null keeps all.
        unique: of rows that are copies of one another, choose none but the first.
        normalize: whose norms a product is divided by: cosine (both rows'), target, or none.
        preconditioner: none; fisher: products in the metric of the training rows' second moment,
            which needs gradient_type sgd or sign; subspace: products in the main directions of the
            target rows; kfac or ekfac: gradients in the metric of Kronecker factors, which needs
            gradient_type sgd; docs/products.md.
        damping: of fisher, kfac and ekfac, as a multiple of the mean eigenvalue; null takes 1 of
            fisher, 0.1 of the others.
        rerank: ranks the best rows again by whole gradients, a mapping of top (share of the rows),
            by (exact or cg) and what cg takes, docs/rerank.md; null leaves the store's order.
        features: as for `FeatureSettings`.
    """

    needs_lora = True
    needs_targets = True
    whole_model = frozenset({FSDP, ZERO3})
    distinct = True
    neutral = frozenset({"tokens_per_batch", "max_bad_fraction", "keep_generations", "unit_rows"})

    def __init__(
        self,
        scoring: Literal["projected", "direct"] = "projected",
        checkpoints: Literal["last", "all"] | Count = "last",
        keep_generations: Count | None = None,
        unique: bool = False,
        normalize: Normalize = "cosine",
        preconditioner: AnyPreconditioner = "none",
        damping: Annotated[float, Ge(0)] | None = None,
        rerank: Mapping[str, Any] | None = None,
        **features: Annotated[Any, FeatureSettings],  # noqa: ANN401 - those of that class
    ) -> None:
        self.settings = in_metric(preconditioner, damping, features)
        self.gradient_features = self.settings
        self.product = product_of(
            normalize, preconditioner, damping,
            scoring=scoring, gradient_type=self.settings.gradient_type,
        )  # fmt: skip
        self.rerank = rerank_of(rerank, scoring=scoring, preconditioner=preconditioner)
        self.lora_alone = lora_alone(scoring, self.settings, self.rerank)
        if scoring == "direct" and checkpoints != "last":
            raise ValueError(
                f"checkpoints is {checkpoints!r}, but scoring: direct keeps no features of earlier "
                "checkpoints; use checkpoints: last or scoring: projected"
            )
        self.needs_moments = self.settings.train_features.needs_moments
        if keep_generations is not None and (
            checkpoints == "all" or keep_generations < (1 if checkpoints == "last" else checkpoints)
        ):
            raise ValueError(
                f"keep_generations is {keep_generations}, fewer than checkpoints: {checkpoints} "
                "combines; raise it or leave it out"
            )
        self.scoring = scoring
        self.which = checkpoints
        self.keep_generations = keep_generations
        self.unique = unique
        #: The rule that turns scores into rows; a subclass that offers others sets it.
        self.rule = SubsetRule()
        #: Name of the sample that stands for the training rows; "" where all are taken.
        self.train_set = ""
        self._service: FeatureService | None = None
        self._restored: Mapping[str, Any] = {}
        self._generations_saved = 0

    # -- what a strategy decides ------------------------------------------------------------------

    def fold(
        self,
        influence: npt.NDArray[np.floating[Any]],
        candidates: npt.NDArray[np.bool_],
        count: int,
    ) -> npt.NDArray[np.floating[Any]]:
        """Fold a row's influence on each sub-task into the score of the row.

        Args:
            influence: (n, q) mean cosines.
            candidates: (n,) bool, rows that may be chosen; others may hold anything.
            count: m, how many will be.

        Returns:
            (n,) the larger the better.
        """
        raise TypeError(f"{type(self).__name__} does not implement fold")

    def subtask_sizes(self, run: RunContext) -> Sequence[int] | None:
        """Return the rows of each sub-task if one target set is split into several; None if not."""
        return run.config.dataflex.target_subtasks

    def best_of(
        self, influence: npt.NDArray[np.floating[Any]]
    ) -> npt.NDArray[np.integer[Any]] | None:
        """Return the sub-task (n,) that alone decides a row's score; None where several do.

        Args:
            influence: (n, q) mean cosines.
        """
        return None

    def won(
        self,
        rows: npt.NDArray[np.int64],
        best: npt.NDArray[np.integer[Any]] | None,
        run: RunContext,
    ) -> dict[str, int]:
        """Count the chosen rows by the target that each helps most; {} for one target."""
        sizes, names = self.subtask_sizes(run), [target.name for target in run.data.targets]
        if sizes is not None and len(names) == 1:
            names = [f"{names[0]}[{i}]" for i in range(len(sizes))]
        if best is None or len(names) < 2:
            return {}
        counts = np.bincount(best[rows], minlength=len(names))
        return dict(zip(names, counts.tolist(), strict=True))

    def target_source(self) -> TargetFeatures | None:
        """Return the source of target features; None: gradients of the target rows' answers."""
        return None

    def sample(self, run: RunContext) -> Rows | None:
        """Return training rows that represent all of them, named `train_set`; None takes all."""
        return None

    def score(
        self, checkpoints: Sequence[CheckpointFeatures], count: int, context: UpdateContext
    ) -> RowScores:
        """Score all rows from the generations of one or more checkpoints."""
        from gradstore.scoring.influence import subtask_influence

        sizes, n = self.subtask_sizes(context.run), checkpoints[0].train.rows
        with progress(f"scores at step {context.step}", n, shown=False) as advance:
            found = subtask_influence(
                checkpoints, subtask_sizes=sizes, on_rows=advance, product=self.product
            )
        candidates = context.among_candidates(found.usable)
        return RowScores(self.fold(found.values, candidates, count), found.usable, found.skipped)

    def take(
        self,
        scores: npt.NDArray[np.floating[Any]],
        count: int,
        candidates: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int64]:
        """Return the (count,) best candidates, best first; ties go to the lower row."""
        from gradstore.scoring.selection import select_top

        return select_top(scores, count, usable=candidates)

    # -- life cycle -------------------------------------------------------------------------------

    def check_count(self, count: int, data: RunData) -> None:
        """Refuse, before the model is loaded, rows that can't be answered or compared."""
        super().check_count(count, data)
        check_product(self.product, data)
        if self.rerank is not None:
            self.rerank.check_count(count, data, rule=self.rule, unique=self.unique)

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the gradients of the target rows and of the training rows."""
        from dataflex.features.forecasts import gradient_forecasts

        stored = self.scoring == "projected"
        first = gradient_forecasts(
            run, self.settings, len(steps), stored=stored, kept=self.keep_generations
        )
        return [*first, *self.rerank_forecasts(run, first)]

    def rerank_forecasts(self, run: RunContext, first: Sequence[Forecast]) -> Sequence[Forecast]:
        """Forecast the second ranking from the passes of the first: target sets, training rows."""
        if self.rerank is None:
            return []
        return self.rerank.forecasts(run, self.settings, first, self.subtask_sizes(run))

    def start(self, run: RunContext) -> None:
        """Open the store: its refusals come before the first training step."""
        if self.scoring == "projected":
            from dataflex.features.gradients import FeatureService
            from dataflex.features.store_owner import check_same_store

            expected = self._restored.get("store_uuid")
            run.ranks.decide(lambda: check_same_store(run.config.store_path, expected))
            self._service = FeatureService(run, self.settings)

    def state(self) -> dict[str, Any]:
        """Return the store's identity and progress: a resume refuses another store."""
        if self._service is None or not self._service.run.ranks.leads:
            return {}
        store = self._service.store
        head = store.head
        self._generations_saved = len(self._service.steps(self.train_set))
        return {
            "store_uuid": store.uuid,
            "commit": None if head is None else head.sha256,
            "generations": self._generations_saved,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Keep the state until the store is open."""
        self._restored = state
        self._generations_saved = int(state.get("generations", 0))

    # -- selecting --------------------------------------------------------------------------------

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Score every training row against the target, take the best `count`; collective."""
        if self.product.normalize != "cosine":
            from dataflex.features.step_share import tell_clipping

            tell_clipping(context, self.settings)
        if self._service is None:
            return select_directly(self, count, context)
        service, scores = self._service, list[RowScores]()  # of rank 0
        exported = self.export(service, context)
        chosen = context.run.ranks.decide(
            lambda: self._choose(count, context, service, exported, scores)
        )
        if self.rerank is None:
            return chosen
        return rank_again(self, self.rerank, chosen, scores, context)

    def export(self, service: FeatureService, context: UpdateContext) -> CheckpointExport:
        """Commit the generations of this boundary; collective."""
        from gradstore.export.moments import AdamMoments

        moments = None
        if self.settings.train_features.needs_moments:
            moments = AdamMoments.from_optimizer(context.optimizer, context.run.model)
        return service.export(
            context.step,
            context.learning_rate,
            moments,
            self.target_source(),
            self.sample(context.run),
        )

    def _choose(
        self,
        count: int,
        context: UpdateContext,
        service: FeatureService,
        exported: CheckpointExport,
        kept: list[RowScores],
    ) -> Selection:
        """Score the exported rows, keep the scores, and choose the best rows; on rank 0."""
        clock = [time.perf_counter()]
        checkpoints = service.checkpoints(self.which, context.step, self.train_set)
        scores = self.score(checkpoints, count, context)
        clock.append(time.perf_counter())
        candidates = context.among_candidates(scores.usable)
        if self.rule.plain:
            rows = self.take(scores.values, count, candidates)
        else:
            choose = partial(
                self.rule.stored_rows, scores=scores, candidates=candidates,
                checkpoints=checkpoints, context=context, product=self.product,
            )  # fmt: skip
            rows = choose(count)
            if self.rerank is not None:
                again = self.rerank.candidates(int(candidates.sum()), count)
                scores = replace(scores, again=np.sort(choose(again)))
        kept.append(scores)
        clock.append(time.perf_counter())
        if self.keep_generations is not None:
            # Generations since the last checkpoint are kept in addition: a resume starts before
            # them and needs the ones that they would displace.
            since = len(service.steps(self.train_set)) - self._generations_saved
            service.writer.clean(self.keep_generations + since)
            self._generations_saved = len(service.steps(self.train_set)) - since
        train = service.store.generation(exported.train)
        return Selection(
            rows,
            scores.values[rows],
            target_rows=exported.target_rows,
            tokens=exported.tokens,
            export_seconds=exported.seconds,
            score_seconds=clock[1] - clock[0],
            select_seconds=clock[2] - clock[1],
            skipped=scores.skipped,
            manifest={
                "train": exported.train,
                "targets": list(exported.targets),
                "commit": train.commit_sha,
                "adapter": train.record.adapter_hash,
                **product_told(self.product, checkpoints),
                **self.rule.told(),
                "won": self.won(rows, scores.best, context.run),
                "all_scores": spread_of(scores.values, candidates, rows),
            },
        )
