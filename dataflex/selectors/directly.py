"""A selection by exact influence alone: nothing is stored (`scoring: direct`)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from dataflex.run.context import UpdateContext
from dataflex.run.spread import spread_of
from dataflex.selectors.base import Selection
from dataflex.selectors.product import product_told

if TYPE_CHECKING:
    from dataflex.selectors.by_influence import InfluenceSelector


def select_directly(selector: InfluenceSelector, count: int, context: UpdateContext) -> Selection:
    """Score every training row by whole gradients, and choose the best; collective.

    Args:
        selector: says what influence adds up to, and which rule chooses.
        count: rows of the update.
        context: the boundary.

    Raises:
        BadInput: a sub-task without a usable row; too many rows with a non-finite gradient.
    """
    from dataflex.features.direct import direct_influence

    began, rule = time.perf_counter(), selector.rule
    found = direct_influence(
        context,
        selector.settings,
        selector.subtask_sizes(context.run),
        selector.target_source(),
        each_row=rule.per_target,
        normalize=selector.product.normalize,
    )
    exported = time.perf_counter()
    candidates = context.among_candidates(np.asarray(np.isfinite(found.values).all(axis=1)))
    scores = selector.fold(found.values, candidates, count)
    if rule.plain:
        rows = selector.take(scores, count, candidates)
    else:
        rows = rule.rows(count, scores, candidates, found.table, context.run.data)
    return Selection(
        rows,
        scores[rows],
        target_rows=found.target_rows,
        tokens=found.tokens,
        export_seconds=exported - began,
        select_seconds=time.perf_counter() - exported,
        skipped=found.skipped,
        manifest={
            "scoring": "direct",
            "feature": selector.settings.gradient_type,
            **product_told(selector.product, ()),
            **rule.told(),
            "won": selector.won(rows, selector.best_of(found.values), context.run),
            "all_scores": spread_of(scores, candidates, rows),
        },
    )
