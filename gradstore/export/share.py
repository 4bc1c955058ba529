"""The share of a row's gradient that enters an optimizer step: one row of many, clipped.

A trainer's loss is the mean over the target tokens of a step's rows, and its gradient is scaled
down to `max_grad_norm`. Row i, with t_i target tokens and gradient g_i of its own mean loss, adds

    s_i g_i with s_i = c t_i / (t_i + (B - 1) T)

to what the optimizer sees, where B are the rows of a step, T the mean target tokens of the others
and c = min(1, max_grad_norm / N). Which rows a step has is not known beforehand; N² is the
expectation over steps of B rows by lot: with u_i = t_i g_i / T, (1 - 1/B) |E u|² + E |u|² / B.

Letters: b batch, p gradient length, S sampled rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradstore.capture.chosen import Modules
from gradstore.capture.losses import Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import expect, expect_whole
from gradstore.export.smaller import computed_whole
from gradstore.export.units import RowBatch


@dataclass(frozen=True)
class OptimizerStep:
    """A run's optimizer step.

    Attributes:
        rows: B, over micro-batches, accumulated steps and processes.
        max_grad_norm: that the gradient is clipped to; 0 for none.

    Raises:
        BadInput: fewer rows than 1, or a norm below 0 or not finite.
    """

    rows: int
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        """Check both numbers."""
        expect_whole(self.rows, "rows of a step")
        norm = self.max_grad_norm
        fits = isinstance(norm, int | float) and math.isfinite(norm) and norm >= 0
        expect(fits, "max_grad_norm", norm, "a number of 0 (no clipping) or more")


@dataclass(frozen=True)
class StepShare:
    """The share of each row's gradient that a step takes.

    Attributes:
        rows: B.
        max_grad_norm: 0 for none.
        tokens: T, mean target tokens of a row.
        norm: N, expected norm of a step's gradient before it is clipped.
    """

    rows: int
    max_grad_norm: float
    tokens: float
    norm: float

    @property
    def step(self) -> OptimizerStep:
        """The step that it is a share of."""
        return OptimizerStep(self.rows, self.max_grad_norm)

    @property
    def clip(self) -> float:
        """Factor c of a step's gradient, at most 1."""
        clipped = 0 < self.max_grad_norm < self.norm
        return self.max_grad_norm / self.norm if clipped else 1.0

    def of(self, tokens: Tensor) -> Tensor:
        """Return s (b,) float32 of rows with `tokens` (b,) target tokens."""
        own = tokens.float()
        others = (self.rows - 1) * self.tokens
        return self.clip * own / (own + others).clamp(min=1.0)  # no token, no share


def expected_share(
    model: nn.Module,
    batches: Iterable[RowBatch],
    step: OptimizerStep,
    modules: Modules = "all",
) -> StepShare:
    """Estimate T and N from some training rows, at the model's present state.

    Args:
        model: whose gradients are taken, in eval mode.
        batches: S rows by lot, of those that training draws from (`Batches.sample`); where memory
            runs out, the estimate begins again with smaller ones.
        step: of the run.
        modules: as of the features (`FeatureSpec.modules`); the norm of the parameters that are
            left out is not in N.

    Raises:
        BadInput: none of the rows has a target token.
    """
    with GradientCapture(model, modules) as capture:
        device = next(model.parameters()).device
        found = computed_whole(batches, lambda pairs: _added_up(capture, pairs, device))
    rows, mean = found.rows, found.tokens / max(found.rows, 1)
    expect(rows > 0, "sampled training rows", rows, "rows with target tokens")
    energy, alone = float(found.total.double().square().sum()), found.squares / rows
    # Of S rows, |sum u|² holds S single terms and S (S - 1) pairs: these are unbiased for |E u|².
    common = (energy - found.squares) / (rows * (rows - 1)) if rows > 1 else 0.0
    square = (1 - 1 / step.rows) * max(0.0, common) + alone / step.rows
    return StepShare(step.rows, float(step.max_grad_norm), mean, math.sqrt(square) / mean)


class _Sums(NamedTuple):
    """Sums over rows with target tokens: tokens t, |t g|², their number, and t g (p,)."""

    tokens: float
    squares: float
    rows: int
    total: Tensor


def _added_up(capture: GradientCapture, batches: Iterable[RowBatch], device: torch.device) -> _Sums:
    """Add up the rows of all batches."""
    counts, squares, rows = 0.0, 0.0, 0
    total = torch.zeros(capture.p, device=device)
    for _, given in batches:
        batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        tokens = Targets.of(batch).counts.float()
        sums: list[Tensor] = []

        def sink(
            slot: ParameterSlot,
            gradient: Tensor,
            tokens: Tensor = tokens,
            sums: list[Tensor] = sums,
        ) -> None:
            # A row that is not finite stops no estimate: the export counts and refuses those.
            weighted = torch.nan_to_num(gradient * tokens[:, None], 0.0, 0.0, 0.0)
            total[slot.start : slot.start + slot.numel] += weighted.sum(dim=0)
            sums.append(torch.linalg.vector_norm(weighted).double().square())

        capture.capture(batch, sink)
        squares += float(torch.stack(sums).sum())
        counts += float(tokens.sum())
        rows += int((tokens > 0).sum())
    return _Sums(counts, squares, rows, total)
