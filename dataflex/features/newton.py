"""Target directions solved for in the metric of the training rows' Gauss-Newton matrix.

Letters: q directions of the target, p gradient length.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.features.settings import FeatureSettings
from dataflex.models.precision import autocast
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.forecast import Forecast, Positions, measured_seconds, peak_memory
from dataflex.run.log import progress
from gradstore.capture.limits import token_budget
from gradstore.export.direct import TargetDirections
from gradstore.export.gauss_newton import GaussNewton, Solution, conjugate_gradients
from gradstore.export.units import plan_batches

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Curvature:
    """Settings of the solver.

    Attributes:
        rows: training rows that the matrix is made of, at most.
        damping: of the curvature along the target, above 0.
        iterations: products at most.
        tolerance: of the residual.
    """

    rows: int
    damping: float
    iterations: int
    tolerance: float

    def drawn(self, usable: npt.NDArray[np.bool_], seed: int) -> npt.NDArray[np.int64]:
        """Draw the rows of the matrix, rising; the same for the same rows and seed."""
        order = np.random.default_rng(seed).permutation(np.flatnonzero(usable))
        return np.sort(order[: self.rows])


class NewtonMetric:
    """The map t -> l (G + l I)^-1 t of the target's directions, which tends to t as l grows.

    Called on every rank: each multiplies with its part of the rows.

    Args:
        context: the boundary.
        settings: of the features.
        curvature: of the solver.
        rows: training rows of the matrix, each with a finite gradient.

    Attributes:
        solution: the last; None before the first.
    """

    def __init__(
        self,
        context: UpdateContext,
        settings: FeatureSettings,
        curvature: Curvature,
        rows: npt.NDArray[np.int64],
    ) -> None:
        self.solution: Solution | None = None
        self._context, self._curvature, self._rows = context, curvature, rows
        self._budget = settings.tokens_per_batch or token_budget(context.run.model)
        self._matrix = GaussNewton(context.run.model)

    def __call__(self, directions: TargetDirections) -> TargetDirections:
        """Solve for each direction, (q, p) float32.

        Raises:
            BadInput: there is nothing to solve; the model has no forward-mode derivatives.
        """
        given, run = self._curvature, self._context.run
        what = f"conjugate gradients at step {self._context.step}"
        with progress(what, given.iterations, shown=run.shows_progress, told=False,
                      unit="product") as advance:  # fmt: skip
            found = conjugate_gradients(
                self._product, directions.matrix, damping=given.damping,
                tolerance=given.tolerance, iterations=given.iterations, tell=advance,
            )  # fmt: skip
        self.solution = found
        if run.ranks.leads:
            self._tell(found)
        return replace(directions, matrix=(found.level * found.x).float())

    def told(self) -> dict[str, Any]:
        """Return what was solved, for a selection's manifest."""
        found = self.solution
        assert found is not None  # the metric was called
        return {
            "rows": len(self._rows), "level": found.level, "curvature": found.curvature,
            "iterations": found.iterations, "residual": found.residual,
            "converged": found.converged,
        }  # fmt: skip

    def _product(self, vectors: torch.Tensor) -> torch.Tensor:
        """Multiply (m, p) float64 with G; the same bits on every rank."""
        run = self._context.run

        def own_part() -> npt.NDArray[np.float64]:
            found = self._matrix.summed(row_batches(run, self._rows, self._budget), vectors)
            return np.asarray(found.cpu().numpy())

        total = np.sum(run.ranks.gather(own_part), axis=0)
        return torch.from_numpy(total / len(self._rows)).to(vectors.device)

    def _tell(self, found: Solution) -> None:
        reached = (
            f"{found.iterations} products over {len(self._rows)} rows, residual "
            f"{found.residual:.1e}, damping {found.level:.3g} ({self._curvature.damping:g} times "
            f"the curvature along the target)"
        )
        if found.converged:
            _log.info("conjugate gradients: %s", reached)
            return
        _log.warning(
            "conjugate gradients did not converge: %s, where rerank.tolerance asks %.1e. The rows "
            "are ranked by what was reached; raise rerank.iterations or rerank.damping.",
            reached,
            self._curvature.tolerance,
        )


def row_batches(
    run: RunContext, rows: npt.NDArray[np.int64], budget: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's part of the batches of training rows, each row on one rank alone."""
    device, train = next(run.model.parameters()).device, run.data.train
    for batch_of in run.ranks.share(plan_batches(train.lengths[rows], budget, 1024)):
        batch = run.collate([train.dataset[int(i)] for i in rows[batch_of]])
        yield {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def newton_forecast(
    run: RunContext, settings: FeatureSettings, curvature: Curvature, times: int, targets: int
) -> Forecast:
    """Forecast the products of all systems, as many as are made at most.

    Args:
        run: with its model.
        settings: of the features.
        curvature: of the solver.
        times: how often systems are solved.
        targets: q, directions that are solved for at once.
    """
    rows = curvature.drawn(run.data.train.target_tokens > 0, settings.seed)
    lengths = run.data.train.lengths[rows]
    budget = settings.tokens_per_batch or token_budget(run.model)
    matrix = GaussNewton(run.model)
    vectors = torch.ones(targets, matrix.p, device=next(run.model.parameters()).device)

    def work(positions: Positions) -> None:
        matrix.summed(row_batches(run, rows[positions], budget), vectors)

    with autocast(run.model, run.autocast):
        seconds = measured_seconds(work, lengths, budget)
    return Forecast(
        "Gauss-Newton products, at most", times * curvature.iterations, len(rows),
        int(lengths.sum()), seconds, memory_bytes=peak_memory(),
    )  # fmt: skip
