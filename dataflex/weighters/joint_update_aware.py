"""Weighting of samples so that their joint update points to the target without redundancy.

Letters: n samples of a micro-batch over all ranks, d hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic import AllowInfNan

from dataflex.config.parameters import Count, Positive
from dataflex.config.registry import register
from dataflex.weighters.base import FloatArray, WeightContext
from dataflex.weighters.by_target import TargetWeighter, unit
from gradstore.export.pooling import Pooling

Objective = Literal["full", "align_only", "diverse_only", "uniform"]

#: Names of DataFlex 1.1.0 -> those of gradstore.export.pooling.
POOLINGS: dict[str, Pooling] = {"last_token": "last_token", "mean_pool": "mean"}

#: The iteration ends below this residual, or after so many rounds.
RESIDUAL = 1e-6
ROUNDS = 200

SHORTEST = 1e-12

#: Factor of the entropy's weight from one followed answer to the next.
COOLING = 0.8


@register("weighter", "joint_update_aware")
class JointUpdateAwareWeighter(TargetWeighter):
    """Weights that trade closeness to the target rows against likeness among samples.

    With unit embeddings Z of the samples of a micro-batch and u of the target rows' mean, s = Z u
    and G = Z Z': weights w on the simplex maximise s'w - beta/2 w'G w + tau H(w), H the entropy
    (ALGORITHMS 3.3). The samples of one micro-batch share its part of the step, so a micro-batch
    should hold several.

    Args:
        beta: how much samples that are alike push each other down.
        tau: how even the weights are.
        fixed_point_iters: rounds of the solution, if more than 200; it ends once it is exact.
        damping: part of the way a round goes, in (0, 1]; halved where that leads further away.
        target_update_step: steps after which the target rows are embedded again.
        target_batch_size: target rows of one forward pass.
        target_num_batches: forward passes a look at the target takes, over another draw of its rows
            each time; 0 or less for all of them.
        embed_normalize: embeddings of length 1; else as the model gives them.
        pooling: which of a row's tokens make its embedding: last_token or mean_pool.
        embed_layer: of the model's hidden states; -1 is the last.
        objective_mode: full, align_only (without G), diverse_only (without s), or uniform.
    """

    scope = "micro"

    def __init__(
        self,
        beta: Annotated[float, Ge(0), AllowInfNan(False)] = 0.1,
        tau: Positive = 0.05,
        fixed_point_iters: Count = 5,
        damping: Annotated[float, Gt(0), Le(1)] = 1.0,
        target_update_step: Count = 50,
        target_batch_size: Count = 8,
        target_num_batches: int = 0,
        embed_normalize: bool = True,
        pooling: Literal["last_token", "mean_pool"] = "last_token",
        embed_layer: int = -1,
        objective_mode: Objective = "full",
    ) -> None:
        super().__init__(
            layer=embed_layer,
            pooling=POOLINGS[pooling],
            shortest=SHORTEST if embed_normalize else None,
            every=target_update_step,
            batch_rows=target_batch_size,
            batches=target_num_batches,
        )
        self.beta, self.tau, self.damping = float(beta), float(tau), float(damping)
        self.rounds = max(fixed_point_iters, ROUNDS)
        self.normalizes = embed_normalize
        self.objective_mode: Objective = objective_mode

    def weights(self, losses: FloatArray, context: WeightContext) -> FloatArray:
        """Compute (n,) weights that sum to 1; 0 where a loss is not finite."""
        if context.measured is None:
            raise RuntimeError("the samples were not measured")
        found = np.zeros(len(losses))
        usable = np.isfinite(losses) & np.isfinite(context.measured).all(axis=1)
        if usable.any():
            z = context.measured[usable]
            u = unit(self.mean, SHORTEST) if self.normalizes else self.mean
            found[usable] = joint_weights(
                z @ u, z @ z.T, self.beta, self.tau, self.damping, self.rounds, self.objective_mode
            )
        return found


def joint_weights(
    s: FloatArray,
    g: FloatArray,
    beta: float,
    tau: float,
    damping: float = 1.0,
    rounds: int = ROUNDS,
    mode: Objective = "full",
) -> FloatArray:
    """Maximise s'w - beta/2 w'G w + tau H(w) on the simplex (E27, E28).

    Args:
        s: (n,) cosines to the target.
        g: (n, n) cosines among samples.
        beta: weight of G, >= 0.
        tau: weight of the entropy, > 0; with it the answer is unique.
        damping: part of its way that a round goes, at first.
        rounds: at most; a round is one of Newton's method on the logits of w.
        mode: which terms count.

    Returns:
        (n,) weights that sum to 1.
    """
    if mode == "uniform":
        return np.full(len(s), 1.0 / len(s))
    if mode == "diverse_only":
        s = np.zeros(len(s))
    if mode == "align_only":
        beta = 0.0

    curved = _Objective(s, beta * g)
    v, settled = curved.logits(np.zeros(len(s)), tau, damping, rounds)
    if not settled:
        # Newton's steps shrink to nothing beside a corner of the simplex that is not the answer:
        # the answer is followed there from an entropy that keeps it off the corners.
        hot = max(tau, 1.0)
        v, _ = curved.logits(np.zeros(len(s)), hot, damping, rounds)
        while hot > tau:
            cooler = max(tau, COOLING * hot)
            v, hot = curved.logits(v * (hot / cooler), cooler, damping, rounds)[0], cooler
    return _softmax(v)


@dataclass(frozen=True)
class _Objective:
    """s'w - w'G w / 2 + tau H(w), with G (n, n) weighted already."""

    s: FloatArray
    g: FloatArray

    def logits(
        self, v: FloatArray, tau: float, damping: float, rounds: int
    ) -> tuple[FloatArray, bool]:
        """Go from logits v (n,) to those of the maximum; return whether they have settled."""

        def ahead(v: FloatArray) -> FloatArray:
            return np.asarray((self.s - self.g @ _softmax(v)) / tau - v)

        gap = ahead(v)
        for _ in range(rounds):
            w = _softmax(v)
            if np.abs(_softmax(v + gap) - w).max() < RESIDUAL:
                return v, True
            # d gap / d v is -(1 + G (diag w - w w') / tau), whose eigenvalues are -1 or less.
            slope = np.eye(len(v)) + self.g @ (np.diag(w) - np.outer(w, w)) / tau
            towards, step, length = np.linalg.solve(slope, gap), damping, np.linalg.norm(gap)
            while np.linalg.norm(ahead(v + step * towards)) > length and step > SHORTEST:
                step /= 2
            v = v + step * towards
            gap = ahead(v)
        return v, bool(np.abs(_softmax(v + gap) - _softmax(v)).max() < RESIDUAL)


def _softmax(x: FloatArray) -> FloatArray:
    odds = np.exp(x - x.max())
    return np.asarray(odds / odds.sum())
