"""The second ranking itself: the best rows of a first one in the order of whole gradients.

Letters: n training rows, c candidates, q sub-tasks of the target, m rows of an update.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.run.context import UpdateContext
from dataflex.run.spread import spread_of
from dataflex.selectors.base import Selection
from dataflex.selectors.rerank import Rerank
from dataflex.selectors.row_scores import RowScores

if TYPE_CHECKING:
    from dataflex.features.newton import NewtonMetric
    from dataflex.features.settings import FeatureSettings
    from dataflex.selectors.by_influence import InfluenceSelector


def rank_again(
    selector: InfluenceSelector,
    rerank: Rerank,
    first: Selection,
    scores: Sequence[RowScores],
    context: UpdateContext,
) -> Selection:
    """Score the best rows by whole gradients at the model's present state; collective.

    The order is theirs, then the store's for all other rows: these come in only where fewer
    candidates can be used than an update takes.

    Args:
        selector: whose sub-tasks, features and fold are those of the first ranking.
        rerank: how.
        first: the store's choice of m rows.
        scores: on rank 0 the store's scores alone; not read elsewhere.
        context: the boundary.

    Raises:
        BadInput: too many rows with a non-finite gradient; a system that cannot be solved.
    """
    from dataflex.features.direct import direct_influence

    began, run, count = time.perf_counter(), context.run, len(first.indices)
    best = run.ranks.decide(lambda: rerank.best(scores[0], count, context))
    settings = rerank.features(selector.settings)
    metric = _metric(rerank, settings, scores, context)
    found = direct_influence(
        context,
        settings,
        selector.subtask_sizes(run),
        selector.target_source(),
        each_row=selector.rule.per_target,
        among=best,
        normalize=selector.product.normalize,
        metric=metric,
    )
    usable = np.asarray(np.isfinite(found.values).all(axis=1))
    values = np.full(len(usable), np.nan)
    if usable.any():
        values[usable] = selector.fold(found.values, usable, count)[usable]
    second = RowScores(values, usable, found.skipped, table=found.table)
    rows = run.ranks.decide(lambda: _taken(selector, second, scores[0], best, count, context))
    told, numbers = _told(rerank, metric, float(np.isin(rows, first.indices).mean()))
    return replace(
        first,
        indices=rows,
        scores=values[rows],
        tokens=first.tokens + found.tokens,
        export_seconds=first.export_seconds + time.perf_counter() - began,
        numbers={**first.numbers, **numbers},
        manifest={
            **first.manifest,
            "rerank": {**told, "rows": len(best), "skipped": found.skipped},
            "won": selector.won(rows[usable[rows]], selector.best_of(found.values), run),
            "all_scores": spread_of(values, usable, rows),
        },
    )


def _taken(
    selector: InfluenceSelector,
    second: RowScores,
    stored: RowScores,
    best: npt.NDArray[np.int64],
    count: int,
    context: UpdateContext,
) -> npt.NDArray[np.int64]:
    """Take (count,) of the candidates, and the store's next best where too few are usable."""
    rows, left, usable = np.empty(0, dtype=np.int64), int(second.usable.sum()), second.usable
    if left >= count and second.table is not None:
        return selector.rule.rows(count, second.values, usable, second.table, context.run.data)
    if left:
        rows = selector.take(second.values, min(count, left), usable)
    if len(rows) == count:
        return rows
    rest = context.among_candidates(stored.usable)
    rest[best] = False
    return np.concatenate([rows, selector.take(stored.values, count - len(rows), rest)])


def _metric(
    rerank: Rerank, settings: FeatureSettings, scores: Sequence[RowScores], context: UpdateContext
) -> NewtonMetric | None:
    """Make the metric of rows that the store found to have a finite gradient."""
    curvature = rerank.curvature
    if curvature is None:
        return None
    from dataflex.features.newton import NewtonMetric

    drawn = context.run.ranks.decide(lambda: curvature.drawn(scores[0].usable, settings.seed))
    return NewtonMetric(context, settings, curvature, drawn)


def _told(
    rerank: Rerank, metric: NewtonMetric | None, kept: float
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the second ranking for a selection's manifest, and its numbers for the log.

    Args:
        rerank: its settings.
        metric: after its call.
        kept: share of the chosen rows that the store had chosen too.
    """
    given, numbers = asdict(rerank), {"rerank_kept_share": kept}
    if metric is None:
        return {key: given[key] for key in ("top", "by")}, numbers
    solved = metric.told()
    numbers |= {f"rerank_{key}": float(solved[key]) for key in ("iterations", "residual")}
    return {**given, "solved": solved}, numbers
