"""Selector that draws rows by the band that their current loss falls in."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Gt

from dataflex.config.parameters import Count, Natural, Positive
from dataflex.config.registry import register
from dataflex.run.context import UpdateContext
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP
from dataflex.selectors.base import Selection, Selector
from gradstore.errors import BadInput

FloatArray = npt.NDArray[np.float64]


@register("selector", "loss")
class LossSelector(Selector):
    """Selector of rows with low, medium or high loss.

    Args:
        focus: the preferred band: low, medium or high.
        focus_weight: how many times likelier a row of that band is.
        quantiles: the two quantiles of the finite losses that separate the bands.
        temperature: probabilities are weight ** (1 / temperature), normalised.
        replacement: draw each row independently; else rows are distinct while they last.
        seed: combined with the step.
        score_batch_size: rows of a scoring batch, at most; batches are bounded by tokens as well.
    """

    neutral = frozenset({"score_batch_size"})
    whole_model = frozenset({FSDP})
    scores_by_loss = True

    def __init__(
        self,
        focus: Literal["low", "medium", "high"] = "high",
        focus_weight: Positive = 5.0,
        quantiles: Sequence[float] = (0.33, 0.66),
        temperature: Annotated[float, Gt(0)] = 1.0,
        replacement: bool = False,
        seed: Natural = 42,
        score_batch_size: Count = 8,
    ) -> None:
        if len(quantiles) != 2 or not 0 <= quantiles[0] <= quantiles[1] <= 1:
            raise ValueError(f"quantiles are {list(quantiles)}; give two rising numbers in [0, 1]")
        self.focus = focus
        self.focus_weight = float(focus_weight)
        self.quantiles = (float(quantiles[0]), float(quantiles[1]))
        self.temperature = float(temperature)
        self.replacement = replacement
        self.seed = seed
        self.score_batch_size = score_batch_size

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Score every row with the current model, then draw."""
        began = time.perf_counter()
        losses = current_losses(context, self.score_batch_size)
        scored, board = time.perf_counter(), context.run.board
        weights = band_weights(losses, self.focus, self.focus_weight, self.quantiles)
        probabilities = tempered(weights, self.temperature)
        generator = np.random.default_rng(self.seed + context.step)
        rows = draw(probabilities, count, generator, replacement=self.replacement)
        return Selection(
            rows,
            losses[rows],
            tokens=0 if board is None else board.tokens,
            score_seconds=scored - began,
            select_seconds=time.perf_counter() - scored,
            skipped={"no_loss": len(context.candidates) - int(np.isfinite(losses).sum())},
            numbers={"loss_mean": float(np.nanmean(losses))},
            manifest={
                "focus": self.focus,
                "seed": self.seed + context.step,
                "all_scores": spread_of(losses, np.isfinite(losses), rows),
            },
        )


def current_losses(
    context: UpdateContext, max_rows: int, rows: npt.NDArray[np.int64] | None = None
) -> FloatArray:
    """Return (n,) mean token losses under the current model; NaN elsewhere.

    Args:
        context: of the boundary.
        max_rows: rows of a batch, at most.
        rows: (m,) whose losses; None for the candidates'.
    """
    board = context.run.board
    if board is None:
        raise BadInput("losses are scored during training alone")
    asked = context.candidates if rows is None else rows
    return board.losses(context.step, asked, max_rows=max_rows)


def band_weights(
    losses: FloatArray, focus: str, focus_weight: float, quantiles: tuple[float, float]
) -> FloatArray:
    """Compute (n,) weights: `focus_weight` inside the band, 1 outside, 0 without a finite loss."""
    finite = np.isfinite(losses)
    if not finite.any():
        raise BadInput("loss: no training row has a finite loss. Check the model and the labels.")
    low, high = np.quantile(losses[finite], quantiles)
    with np.errstate(invalid="ignore"):
        inside = {
            "low": losses <= low,
            "medium": (losses > low) & (losses <= high),
            "high": losses > high,
        }[focus]
    return np.where(finite, np.where(inside, focus_weight, 1.0), 0.0)


def tempered(weights: FloatArray, temperature: float) -> FloatArray:
    """Compute (n,) probabilities weight ** (1 / temperature), normalised.

    A weight of 0 stays exactly 0 (E6); any other keeps a chance, however cold it gets.
    """
    powered = (weights / weights.max()) ** (1.0 / temperature)
    powered = np.where(weights > 0, np.maximum(powered, np.finfo(np.float64).tiny), 0.0)
    return np.asarray(powered / powered.sum())


def draw(
    probabilities: FloatArray, count: int, generator: np.random.Generator, *, replacement: bool
) -> npt.NDArray[np.int64]:
    """Draw `count` positions; with replacement if asked, or if too few have a chance.

    Without replacement by the Gumbel top-m trick, which has no limit on n.
    """
    chances = np.flatnonzero(probabilities > 0)
    if replacement or len(chances) < count:
        return generator.choice(len(probabilities), size=count, p=probabilities).astype(np.int64)
    keys: npt.NDArray[Any] = np.log(probabilities[chances]) + generator.gumbel(size=len(chances))
    return chances[np.argsort(-keys, kind="stable")[:count]].astype(np.int64)
