"""Mirrored influence: rows whose loss falls when the model is trained on the target instead.

Letters: n training rows, q sub-tasks of the target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Count, Natural, Positive
from dataflex.config.registry import register
from dataflex.data.rows import Rows
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.selectors.base import Selection, Selector
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from dataflex.models.trained import ShortTraining
    from dataflex.run.forecast import Forecast

FloatArray = npt.NDArray[np.float64]
#: Name of a sub-task, its data set and its rows there that can be trained on.
Subtask = tuple[str, Rows, npt.NDArray[np.int64]]

#: Nats below which a loss counts as this much where falls are taken relative to it.
LEAST_LOSS = 1e-6


@register("selector", "mirror")
class MirrorSelector(Selector):
    """Selector of the rows that a short training on the target rows teaches most.

    Influence asks how much a training row would lower the target's loss. Its mirror image is asked
    here: the model in training takes a few epochs on the target rows, score(i) = L_i(theta) -
    L_i(theta_target) is how far row i's loss fell, and the model is put back. Two forward passes
    over the rows and one short training for each sub-task; no gradient of a training row.

    Args:
        target_epochs: passes over the target rows.
        learning_rate: of AdamW on the target rows; null for the run's mean since the last update.
        batch_size: target rows of a step.
        relative: divide a row's fall by its loss before; the plain fall favours rows with high
            losses, wrong answers among them.
        aggregation: over sub-tasks of the target, each with a training of its own: max or mean.
        seed: of the order of target rows, combined with the step.
        unique: of rows that are copies of one another, choose none but the first.
        score_batch_size: rows of a scoring batch, at most; batches are bounded by tokens as well.
        tokens_per_batch: padded tokens of a forward and backward on target rows, at most; null for
            what suits the device.
    """

    paper = "Ko et al. 2024, The Mirrored Influence Hypothesis, arXiv:2402.08922"
    neutral = frozenset({"score_batch_size", "tokens_per_batch"})
    needs_targets = True
    scores_by_loss = True
    whole_model = frozenset({FSDP, ZERO3})
    distinct = True

    def __init__(
        self,
        target_epochs: Count = 8,
        learning_rate: Positive | None = None,
        batch_size: Count = 8,
        relative: bool = True,
        aggregation: Literal["max", "mean"] = "max",
        seed: Natural = 42,
        unique: bool = False,
        score_batch_size: Count = 64,
        tokens_per_batch: Count | None = None,
    ) -> None:
        self.target_epochs = target_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.relative = relative
        self.aggregation = aggregation
        self.seed = seed
        self.unique = unique
        self.score_batch_size = score_batch_size
        self.tokens_per_batch = tokens_per_batch

    # -- life cycle -------------------------------------------------------------------------------

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the losses before, the trainings on the target, and the losses after each."""
        from dataflex.models.precision import autocast
        from dataflex.models.trained import trained_on
        from dataflex.run.forecast import Forecast, losses_forecast, measured_seconds, peak_memory
        from gradstore.capture.limits import token_budget

        before, subtasks = losses_forecast(run, len(steps)), self._subtasks(run)
        what = f"{before.what}, after the target"
        found = [before, replace(before, what=what, times=len(steps) * len(subtasks))]
        once, budget = self._training(1e-3, epochs=1), token_budget(run.model)
        for name, rows, where in subtasks:

            def work(
                positions: npt.NDArray[np.int64],
                rows: Rows = rows,
                where: npt.NDArray[np.int64] = where,
            ) -> None:
                with trained_on(run, rows, where[positions], once, [0]):
                    pass

            lengths = rows.lengths[where]
            with autocast(run.model, run.autocast):
                seconds = measured_seconds(work, lengths, self.tokens_per_batch or budget)
            found.append(Forecast(
                f"training on {name}", len(steps), self.target_epochs * len(where),
                self.target_epochs * int(lengths.sum()), self.target_epochs * seconds,
                memory_bytes=peak_memory(), shared=False,
            ))  # fmt: skip
        return found

    def start(self, run: RunContext) -> None:
        """Refuse, before the first step, a model or a target that can't be trained."""
        self._subtasks(run)

    # -- selecting --------------------------------------------------------------------------------

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Score every candidate by how far its loss falls, take the best `count`."""
        from gradstore.scoring.selection import select_top

        began = time.perf_counter()
        run, subtasks = context.run, self._subtasks(context.run)
        before, tokens = self._losses_before(context)
        after, told = self._losses_after(context, subtasks)
        measured = time.perf_counter()
        falls = falls_of(before, after, relative=self.relative)
        usable = np.asarray(np.isfinite(falls).all(axis=1))
        candidates = context.among_candidates(usable)
        scores = np.asarray((np.max if self.aggregation == "max" else np.mean)(falls, axis=1))
        scored = time.perf_counter()
        rows = select_top(scores, count, usable=candidates)
        trained = sum(int(rows.lengths[where].sum()) for _, rows, where in subtasks)
        tokens += len(subtasks) * int(run.data.train.lengths[context.candidates].sum())
        return Selection(
            rows,
            scores[rows],
            target_rows=sum(len(where) for _, _, where in subtasks),
            tokens=tokens + self.target_epochs * trained,
            export_seconds=measured - began,
            score_seconds=scored - measured,
            select_seconds=time.perf_counter() - scored,
            skipped={"no_loss": len(context.candidates) - int(candidates.sum())},
            numbers={"loss_mean": float(np.nanmean(before)), **told},
            manifest={
                "learning_rate": self._rate(context),
                "won": self._won(falls[rows], subtasks),
                "all_scores": spread_of(scores, candidates, rows),
            },
        )

    def _losses_before(self, context: UpdateContext) -> tuple[FloatArray, int]:
        """Return (n,) losses of the candidates under the present model; tokens passed for them."""
        board = context.run.board
        if board is None:
            raise BadInput("losses are scored during training alone")
        # Of this very model, also where a pipeline lets its stages take older losses: the fall
        # between two models of training would count as the target's.
        board = board.view(max_age=0)
        before = board.losses(context.step, context.candidates, max_rows=self.score_batch_size)
        return before, board.tokens

    def _losses_after(
        self, context: UpdateContext, subtasks: Sequence[Subtask]
    ) -> tuple[FloatArray, dict[str, float]]:
        """Return (n, q) losses under the model trained on each sub-task; how the trainings went."""
        from dataflex.models.passes import row_losses
        from dataflex.models.trained import trained_on

        run, training = context.run, self._training(self._rate(context))
        columns, went = [], []
        for index, (_, rows, where) in enumerate(subtasks):
            seed = [self.seed, context.step, index]
            with trained_on(run, rows, where, training, seed) as first_and_last:
                found = row_losses(run, context.candidates, max_rows=self.score_batch_size)
            columns.append(found)
            went.append(first_and_last)
        first, last = np.mean(went, axis=0)
        told = {"target_loss_first": float(first), "target_loss_last": float(last)}
        return np.stack(columns, axis=1), told

    def _rate(self, context: UpdateContext) -> float:
        """Return the learning rate of the trainings on the target."""
        if self.learning_rate is not None:
            return self.learning_rate
        if context.learning_rate > 0:
            return context.learning_rate
        # Before the first step of a schedule that rises from 0: its highest.
        return float(context.optimizer.param_groups[0]["initial_lr"])

    def _training(self, learning_rate: float, epochs: int | None = None) -> ShortTraining:
        from dataflex.models.trained import ShortTraining

        return ShortTraining(
            epochs or self.target_epochs, learning_rate, self.batch_size, self.tokens_per_batch
        )

    def _subtasks(self, run: RunContext) -> list[Subtask]:
        """List the sub-tasks of the target with their rows that can be trained on.

        Raises:
            BadInput: one has none, or the model has nothing to train.
        """
        if not any(parameter.requires_grad for parameter in run.model.parameters()):
            raise BadInput(
                "mirror: no parameter of the model is trained, so that none can be on the target "
                "rows. Check finetuning_type."
            )
        return list(_trainable(run))

    def _won(self, falls: FloatArray, subtasks: Sequence[Subtask]) -> dict[str, int]:
        """Count chosen rows (m, q) by the sub-task that scored them; {} where not one alone did."""
        if self.aggregation != "max" or len(subtasks) < 2:
            return {}
        counts = np.bincount(falls.argmax(axis=1), minlength=len(subtasks))
        return {name: int(n) for (name, _, _), n in zip(subtasks, counts, strict=True)}


def _trainable(run: RunContext) -> Iterator[Subtask]:
    """Yield each sub-task with its rows that have a target token and fit into the model."""
    from dataflex.features.direct import subtask_rows
    from dataflex.models.passes import longest_row

    sizes = run.config.dataflex.target_subtasks
    for index, (rows, positions) in enumerate(subtask_rows(run.data.targets, sizes)):
        name = rows.name if sizes is None else f"{rows.name}[{index}]"
        longest = longest_row(run.model, rows)
        fitting = rows.lengths <= (longest or np.inf)
        where = positions[((rows.target_tokens > 0) & fitting)[positions]]
        if not len(where):
            most = "" if longest is None else f" and at most the {longest} tokens the model takes"
            raise BadInput(
                f"mirror: none of the {len(positions)} rows of target {name!r} has a target token"
                f"{most}. Give it rows with a response, or change cutoff_len."
            )
        yield name, rows, where


def falls_of(before: FloatArray, after: FloatArray, *, relative: bool) -> FloatArray:
    """Compute (n, q) how far losses fell; NaN where one of the two is not known.

    Args:
        before: (n,) under the model in training.
        after: (n, q) under the model trained on each sub-task.
        relative: as a part of the loss before.

    Examples:
        >>> falls_of(np.array([2.0, 4.0]), np.array([[1.0], [3.0]]), relative=True).ravel().tolist()
        [0.5, 0.25]
    """
    falls = before[:, None] - after
    return np.asarray(falls / np.maximum(before, LEAST_LOSS)[:, None] if relative else falls)
