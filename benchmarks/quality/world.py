"""A paused run and what methods of selection compute of it, each once and with its price."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import ProjectionSpec
from tinyrun import Held, TinyRun, as_stored

from dataflex.data.rows import Rows
from gradstore.export.direct import TargetDirections, direct_products, target_directions
from gradstore.export.features import FeatureSpec
from gradstore.export.gauss_newton import GaussNewton, conjugate_gradients
from gradstore.export.gradient_space import effective_seed
from gradstore.export.kronecker import Kind as KroneckerKind
from gradstore.export.kronecker import KroneckerFactors
from gradstore.export.kronecker_fit import fit_factors
from gradstore.export.moments import AdamMoments
from gradstore.export.output_gradients import OutputGradients
from gradstore.export.pooling import HiddenStates, Pooling, to_unit
from gradstore.export.projected import export_features
from gradstore.export.share import OptimizerStep, StepShare, expected_share
from gradstore.export.units import Batches
from gradstore.scoring.selection import rows_for_fraction

#: Features as a store keeps them: 8 KB a row.
DIM = 4096
#: Of conjugate gradients, as `rerank` has them by default.
DAMPING, ITERATIONS = 0.1, 100

Chosen = npt.NDArray[np.int64]


def target_kind(kind: str) -> str:
    """Kind of the target rows' features beside training rows of one: plain gradients for Adam."""
    return kind if kind == "sign" or kind in get_args(KroneckerKind) else "sgd"


@dataclass
class World:
    """One run at one step, and what methods have computed of it.

    Attributes:
        run: paused between two steps; targets first, held-out sets behind.
        moments: of its optimizer.
        texts: question and answer, by data set.
        part: of the rows that a method takes.
        earlier: the run at steps before, of which only what was made then can be asked.
    """

    run: TinyRun
    moments: AdamMoments
    texts: dict[str, list[str]]
    part: float = 0.05
    earlier: tuple[World, ...] = ()
    _made: dict[str, Any] = field(default_factory=dict)
    _spent: dict[str, float] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)
    _new: float = 0.0

    @property
    def k(self) -> int:
        """Rows taken."""
        return rows_for_fraction(self.part, len(self.run.skills))

    def clock(self) -> float:
        """Read the processor's seconds, which other work changes least; on a GPU, wall-clock."""
        if self.run.trained[0].is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def once(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `make` makes
        """Compute something once, and keep the seconds that it took."""
        if name not in self._made:
            began = self.clock()
            self._made[name] = make()
            self._spent[name] = self.clock() - began
            self._new += self._spent[name]
        self._used.add(name)
        return self._made[name]

    def timed(self, choose: Callable[[], Chosen]) -> tuple[Chosen, float]:
        """Choose rows; seconds of it as if nothing had been computed before."""
        worlds = (*self.earlier, self)
        for world in worlds:
            world._used.clear()
            world._new = 0.0
        began = self.clock()
        chosen = choose()
        own = self.clock() - began - sum(world._new for world in worlds)
        return chosen, own + sum(w._spent[name] for w in worlds for name in w._used)

    def features(self, kind: str, rows: Rows) -> Held:
        """Projected features of a set, as a store gives them back.

        Args:
            kind: of `FeatureSpec`; or kfac or ekfac, plain gradients in the metric of such factors.
            rows: the set.
        """

        def make() -> Held:
            p = sum(parameter.numel() for parameter in self.run.trained)
            seed = effective_seed(self.run.seed, self.run.step)
            spec = ProjectionSpec("sjlt", p=p, d=DIM, seed=seed)
            found = np.empty((len(rows), DIM), np.float32)
            norm = np.empty(len(rows), np.float32)
            if kind in get_args(KroneckerKind):
                feature = FeatureSpec("sgd", curvature=self.factors(kind))
            else:
                feature = FeatureSpec(kind)  # type: ignore[arg-type]
            if feature.needs_share:
                feature = replace(feature, share=self.share)
            parts = export_features(
                self.run.model, self.run.batches(rows), features=feature, projection=spec,
                moments=self.moments if feature.needs_moments else None,
            )  # fmt: skip
            for part in parts:
                found[part.rows], norm[part.rows] = part.features, part.norm
            return Held(as_stored(found), norm)

        return self.once(f"{kind} {rows.name}", make)  # type: ignore[no-any-return]

    def factors(self, kind: str) -> KroneckerFactors:
        """Fit Kronecker factors to a sample of the training rows."""

        def make() -> KroneckerFactors:
            rows = self.run.data.train
            sample = Batches(rows.dataset, self.run.collate, rows.lengths).sample(self.run.seed)
            return fit_factors(self.run.model, sample, kind)  # type: ignore[arg-type]

        return self.once(f"{kind} factors", make)  # type: ignore[no-any-return]

    @property
    def share(self) -> StepShare:
        """What a step of the run takes of a training row."""
        rows, step = self.run.data.train, OptimizerStep(self.run.batch_size, self.run.max_grad_norm)
        batches = Batches(rows.dataset, self.run.collate, rows.lengths)
        return expected_share(self.run.model, batches.sample(self.run.seed), step)

    def embeddings(self, pooling: Pooling, rows: Rows) -> npt.NDArray[np.float32]:
        """Hidden states of a set, pooled, of length 1."""

        def make() -> npt.NDArray[np.float32]:
            embed = HiddenStates(self.run.model, pooling=pooling)
            found: dict[int, npt.NDArray[np.float32]] = {}
            for chosen, batch in self.run.batches(rows):
                found |= dict(zip(chosen.tolist(), embed(batch).cpu().numpy(), strict=True))
            return np.stack([found[row] for row in range(len(rows))])

        return self.once(f"{pooling} {rows.name}", make)  # type: ignore[no-any-return]

    def output_gradients(self, rows: Rows) -> npt.NDArray[np.float32]:
        """Gradients of a set at the output layer, projected, of length 1."""

        def make() -> npt.NDArray[np.float32]:
            embed = OutputGradients(self.run.model, seed=42)
            found = np.empty((len(rows), embed.dim), np.float32)
            for chosen, batch in self.run.batches(rows):
                found[chosen] = to_unit(embed(batch))[0].cpu().numpy()
            return found

        return self.once(f"output gradients {rows.name}", make)  # type: ignore[no-any-return]

    def whole_products(
        self, rows: Rows, queries: Sequence[Rows], by: str, curvature_rows: int = 64
    ) -> npt.NDArray[np.float64]:
        """(m, q) cosines of whole gradients, each query set's rows averaged: `rerank` by that name.

        Args:
            rows: m training rows.
            queries: q sets.
            by: exact, of adam_marginal; or cg, of plain gradients in the Gauss-Newton metric.
            curvature_rows: training rows that this is made of, drawn by the run's seed.
        """
        run, sgd = self.run, FeatureSpec("sgd")
        directions = target_directions(run.model, [run.batches(each) for each in queries], sgd)
        if by == "exact":
            spec, moments = FeatureSpec("adam_marginal"), self.moments
            return _products(run, rows, directions, spec, moments)
        train, matrix = run.data.train, GaussNewton(run.model)
        drawn = np.random.default_rng(run.seed).permutation(len(train))[:curvature_rows]
        some = Rows("curvature", train.dataset.select(drawn.tolist()))
        batches = [batch for _, batch in run.batches(some)]
        solved = conjugate_gradients(
            lambda v: matrix.summed(batches, v) / len(drawn), directions.matrix,
            damping=DAMPING, iterations=ITERATIONS,
        )  # fmt: skip
        bent = replace(directions, matrix=(solved.level * solved.x).float())
        return _products(run, rows, bent, sgd, None)


def _products(
    run: TinyRun,
    rows: Rows,
    directions: TargetDirections,
    spec: FeatureSpec,
    moments: AdamMoments | None,
) -> npt.NDArray[np.float64]:
    found = direct_products(run.model, run.batches(rows), len(rows), directions, spec, moments)
    return found.astype(np.float64)
