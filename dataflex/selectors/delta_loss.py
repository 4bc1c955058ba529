"""Selector by loss decrease: a window that slides from fast learners to slow ones."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import Gt, Le

from dataflex.config.parameters import Count, Natural
from dataflex.config.registry import register
from dataflex.run.context import UpdateContext
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP
from dataflex.selectors.base import Selection, Selector
from dataflex.selectors.loss import current_losses, draw
from gradstore.errors import BadInput

FloatArray = npt.NDArray[np.float64]

#: Weight of a row outside the window, where one inside has 1.
OUTSIDE = 0.025

#: How sharply the window passes from one end to the other.
STEEPNESS = 10.0


@register("selector", "delta_loss")
class DeltaLossSelector(Selector):
    """Selector of rows whose loss fell most at first, later those whose loss still falls.

    The first update scores every row, keeps the losses as the baseline and draws uniformly. Later
    ones sort the candidates by how far their loss fell since; a window of that order slides along a
    sigmoid of the updates and stops before the first row whose loss rose.

    Args:
        window_size: share of the candidates that the window holds, above 0, at most 1.
        seed: combined with the step.
        score_batch_size: rows of a scoring batch, at most; batches are bounded by tokens as well.
    """

    neutral = frozenset({"score_batch_size"})
    whole_model = frozenset({FSDP})
    scores_by_loss = True

    def __init__(
        self,
        window_size: Annotated[float, Gt(0), Le(1)] = 0.2,
        seed: Natural = 42,
        score_batch_size: Count = 8,
    ) -> None:
        self.window_size = float(window_size)
        self.seed = seed
        self.score_batch_size = score_batch_size
        self._baseline: FloatArray | None = None

    def state(self) -> dict[str, Any]:
        """Return the baseline, once it is measured."""
        return {} if self._baseline is None else {"baseline": self._baseline.copy()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore the baseline, so that deltas continue from the same one."""
        held = state.get("baseline")
        self._baseline = None if held is None else np.array(held, dtype=np.float64)

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Score with the current model, then draw around the window."""
        began = time.perf_counter()
        first = self._baseline is None
        baseline, losses, tokens = self._losses(context)
        scored = time.perf_counter()
        deltas = baseline - losses
        finite = int(np.isfinite(deltas).sum())
        if not finite:
            raise BadInput("delta_loss: no candidate has a finite loss. Check the model's weights.")
        window = (0, 0) if first else window_of(deltas, progress_of(context), self.window_size)
        generator = np.random.default_rng([self.seed, context.step])
        rows = draw(window_chances(deltas, window), count, generator, replacement=False)
        return Selection(
            rows,
            deltas[rows],
            tokens=tokens,
            score_seconds=scored - began,
            select_seconds=time.perf_counter() - scored,
            skipped={"no_loss": len(context.candidates) - finite},
            numbers={
                "loss_mean": float(np.nanmean(losses)),
                "window_start": float(window[0]),
                "window_stop": float(window[1]),
            },
            manifest={
                "baseline": "taken" if first else "kept",
                "window": list(window),
                "all_scores": spread_of(deltas, np.isfinite(deltas), rows),
            },
        )

    def _losses(self, context: UpdateContext) -> tuple[FloatArray, FloatArray, int]:
        """Return (n,) baseline, measured the first time; (n,) candidates' losses; tokens scored."""
        board, tokens = context.run.board, 0
        if self._baseline is None:
            # Of every row, not only the present pool: a later pool needs its rows' baseline.
            scorable = np.flatnonzero(context.run.data.train.target_tokens > 0)
            self._baseline = current_losses(context, self.score_batch_size, scorable)
            tokens = 0 if board is None else board.tokens
        losses = current_losses(context, self.score_batch_size)
        return self._baseline, losses, tokens + (0 if board is None else board.tokens)


def progress_of(context: UpdateContext) -> float:
    """Compute x in [0, 1], the run's progress through its updates; c / T where stages never end."""
    if context.run.config.dataflex.update_times <= 0:
        return min(1.0, context.update / context.updates)
    if context.updates == 1:
        return 1.0
    return (context.update - 1) / (context.updates - 1)


def window_of(deltas: FloatArray, x: float, window_size: float) -> tuple[int, int]:
    """Compute the positions [start, stop) of the sorted deltas that are preferred.

    Args:
        deltas: (n,) how far each loss fell; NaN rows do not count.
        x: progress in [0, 1].
        window_size: share of the rows.

    Returns:
        Half-open; empty where the window lies beyond the last row whose loss did not rise.
    """
    finite = deltas[np.isfinite(deltas)]
    n = len(finite)
    span = window_size * n
    start = (n - span) / (1.0 + math.exp(-STEEPNESS * (x - 0.5)))
    fell = int((finite >= 0).sum())
    return int(start), max(int(start), min(int(start + span), fell))


def window_chances(deltas: FloatArray, window: tuple[int, int]) -> FloatArray:
    """Compute (n,) probabilities: weight 1 in the window, `OUTSIDE` for other rows, 0 for NaN rows.

    Args:
        deltas: (n,) sorted from the largest, ties to the lower row.
        window: from `window_of`; an empty one makes all alike.
    """
    finite = np.flatnonzero(np.isfinite(deltas))
    order = finite[np.argsort(-deltas[finite], kind="stable")]
    weights = np.zeros(len(deltas))
    weights[order] = OUTSIDE
    weights[order[slice(*window)]] = 1.0
    return np.asarray(weights / weights.sum())
