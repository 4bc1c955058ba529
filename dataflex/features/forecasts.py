"""Forecasts of the passes that write features: a few rows of each set are taken and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dataflex.data.rows import Rows
from dataflex.features.embedders import STORED, Embedder
from dataflex.features.settings import FeatureSettings
from dataflex.features.shared import gradient_budget
from dataflex.models.precision import autocast
from dataflex.run.context import RunContext
from dataflex.run.forecast import Forecast, Positions, measured_seconds, peak_memory
from gradstore.capture.limits import token_budget
from gradstore.capture.modelstate import borrowed
from gradstore.export.features import Recipe
from gradstore.export.gradient_space import GradientSpace
from gradstore.export.kronecker import KroneckerFactors
from gradstore.export.kronecker_fit import fit_factors, whole_bytes
from gradstore.export.memory import check_published, most_rows
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import compute_unit
from gradstore.export.share import StepShare
from gradstore.export.units import SAMPLE_ROWS, Batches
from gradstore.format.layout import dtype_of_role, generation_bytes
from gradstore.format.plans import UnitRange

if TYPE_CHECKING:
    from gradstore.export.features import FeatureSpec


def gradient_forecasts(
    run: RunContext,
    settings: FeatureSettings,
    times: int,
    *,
    sample_rows: int | None = None,
    stored: bool = True,
    kept: int | None = None,
) -> list[Forecast]:
    """Forecast the gradients of every target set and of the training rows.

    Args:
        run: with its model.
        settings: of the features.
        times: how often they are taken.
        sample_rows: training rows that stand for all; None takes all.
        stored: whether the store keeps them.
        kept: how many of the passes it keeps at once; None keeps all.
    """
    projection = GradientSpace.of(run.model, settings).projection
    adam = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
    moments = AdamMoments.from_optimizer(adam, run.model)
    budget = gradient_budget(run, settings, projection)
    check_published(projection, _most_rows(run, budget, settings.unit_rows))

    factors, fits = None, list[Forecast]()
    if settings.curvature is not None:
        factors, fit = _factors_forecast(run, settings, times, budget, kept)
        fits.append(fit)

    def forecast(rows: Rows, spec: FeatureSpec, count: int) -> Forecast:
        spec = replace(spec, curvature=factors)
        if spec.needs_share:  # which one costs the same
            spec = replace(spec, share=StepShare(1, 0.0, 1.0, 0.0))
        recipe = Recipe(spec, projection, moments if spec.needs_moments else None)

        def work(positions: Positions) -> None:
            some = Batches(rows.dataset.select(positions.tolist()), run.collate,
                           rows.lengths[positions], budget)  # fmt: skip
            compute_unit(run.model, some, recipe, UnitRange(0, 0, len(positions)))

        with autocast(run.model, run.autocast):
            seconds = measured_seconds(work, rows.lengths, budget, settings.unit_rows)
        share = count / len(rows)
        dtype = dtype_of_role(settings.dtype, "train" if rows is run.data.train else "target")
        return Forecast(
            f"gradients of {rows.name}",
            times,
            count,
            round(int(rows.lengths.sum()) * share),
            seconds * share,
            generation_bytes(count, settings.proj_dim, dtype, settings.unit_rows) if stored else 0,
            kept,
            peak_memory(),
        )

    train = run.data.train
    of_targets = [forecast(r, settings.target_features, len(r)) for r in run.data.targets]
    return [*fits, *of_targets, forecast(train, settings.train_features, sample_rows or len(train))]


def _most_rows(run: RunContext, budget: int, unit_rows: int) -> int:
    """Count the rows of the largest batch of any set."""
    sets = (run.data.train, *run.data.targets)
    cut = (Batches(rows.dataset, run.collate, rows.lengths, budget) for rows in sets)
    return max(most_rows(batches, unit_rows) for batches in cut)


def _factors_forecast(
    run: RunContext, settings: FeatureSettings, times: int, budget: int, kept: int | None
) -> tuple[KroneckerFactors, Forecast]:
    """Forecast the fit of a metric's factors; return the last ones fitted, too."""
    rule, train, made = settings.curvature, run.data.train, list[KroneckerFactors]()
    assert rule is not None

    def work(positions: Positions) -> None:
        some = Batches(train.dataset.select(positions.tolist()), run.collate,
                       train.lengths[positions], budget)  # fmt: skip
        found = fit_factors(run.model, some.of(UnitRange(0, 0, len(positions))), rule.kind)
        made.append(replace(found, damping=rule.damping))

    count = min(SAMPLE_ROWS, len(train))
    with autocast(run.model, run.autocast):
        seconds = measured_seconds(work, train.lengths, budget) * count / len(train)
    return made[-1], Forecast(
        f"{rule.kind} factors",
        times,
        count,
        round(int(train.lengths.sum()) * count / len(train)),
        seconds,
        whole_bytes(GradientSpace.of(run.model, settings).slots),
        kept,
        peak_memory(),
        shared=False,
    )


def embedding_forecasts(
    run: RunContext, source: Embedder, times: int, sets: Sequence[Rows], kept: int | None = None
) -> list[Forecast]:
    """Forecast the embeddings of some row sets.

    Args:
        run: with its model.
        source: of the embeddings; gives back its memory at the end.
        times: how often they are taken.
        sets: the rows.
        kept: how many of the passes the store keeps at once; None keeps all.
    """
    budget, found = 2 * token_budget(run.model), []
    for rows in sets:

        def work(positions: Positions, rows: Rows = rows) -> None:
            origins = rows.sources and tuple(rows.sources[i] for i in positions.tolist())
            some = Rows(rows.name, rows.dataset.select(positions.tolist()), origins)
            source.unit(some, UnitRange(0, 0, len(positions)), lambda _: None)

        with borrowed(run.model, freeze=False), autocast(run.model, run.autocast):
            seconds = measured_seconds(work, rows.lengths, budget)
        found.append(Forecast(
            f"embeddings of {rows.name}", times, len(rows), int(rows.lengths.sum()), seconds,
            generation_bytes(len(rows), source.dim, STORED), kept, peak_memory(),
        ))  # fmt: skip
    source.release()
    return found
