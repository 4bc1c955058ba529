"""Exact influence of every training row: two passes that leave nothing in the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import Rows
from dataflex.features.settings import FeatureSettings
from dataflex.features.step_share import train_features
from dataflex.features.target_source import TargetFeatures
from dataflex.models.passes import batches, fitting, longest_row, whole_rows
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.log import OnRows, progress
from gradstore.capture.limits import token_budget
from gradstore.export.combined import combined_directions
from gradstore.export.direct import TargetDirections, direct_cosines, target_directions
from gradstore.export.moments import AdamMoments
from gradstore.export.units import check_bad_rows
from gradstore.format.layout import RowStatus
from gradstore.scoring.best_rows import HeldTable, TargetTable


@dataclass(frozen=True)
class DirectInfluence:
    """Exact influence of every training row.

    Attributes:
        cosines: (n, q) float64, NaN where a row cannot be used.
        each: (n, t) float32, the cosines to each usable target row; None unless asked for.
        skipped: rows that cannot be used, by status.
        target_rows: usable rows of the target.
        tokens: tokens of both passes.
    """

    cosines: npt.NDArray[np.float64]
    skipped: dict[str, int]
    target_rows: int
    tokens: int
    each: npt.NDArray[np.float32] | None = None

    @property
    def table(self) -> TargetTable | None:
        """The cosines to each target row, as subset rules read them."""
        return None if self.each is None else HeldTable(self.each)


def direct_influence(
    context: UpdateContext,
    settings: FeatureSettings,
    subtask_sizes: Sequence[int] | None,
    source: TargetFeatures | None = None,
    *,
    each_row: bool = False,
) -> DirectInfluence:
    """Compute mean cosines to the q sub-tasks without a projection (`scoring: direct`).

    Collective: every rank takes the target's directions, the training rows are shared.
    With `each_row` the cosines to each target row are kept as well: a direction as long as the
    gradient is held for every usable target row, beside one for each sub-task.

    Raises:
        BadInput: a sub-task without a usable row; too many rows with a non-finite gradient.
    """
    run, data = context.run, context.run.data
    for rows in data.targets:
        longest_row(run.model, rows)
    short_enough = fitting(run, data.train, np.arange(len(data.train)))
    status = np.full(len(data.train), RowStatus.TOO_LONG, dtype=np.uint8)
    moments = None
    if settings.train_features.needs_moments:
        moments = AdamMoments.from_optimizer(context.optimizer, run.model)
    budget = settings.tokens_per_batch or token_budget(run.model)
    features = train_features(run, settings)
    # A source takes its target pass alone, unseen; ranks share the training rows.
    total = len(short_enough) + (sum(len(rows) for rows in data.targets) if source is None else 0)
    with progress(f"exact influence at step {context.step}", total,
                  shown=run.shows_progress, told=run.ranks.leads) as advance:  # fmt: skip
        subtasks = subtask_rows(data.targets, subtask_sizes)
        directions = _directions(run, settings, subtasks, source, budget, advance, each_row)
        cosines = direct_cosines(
            run.model,
            batches(run, data.train, short_enough, budget,
                    lambda done: advance(done * run.ranks.world), shared=True),
            len(data.train),
            directions,
            features,
            moments,
            status,
        )  # fmt: skip
    cosines, status = _merged(run.ranks.gather(lambda: (cosines, status)))
    bad = np.flatnonzero(status == RowStatus.NON_FINITE).tolist()
    check_bad_rows(len(bad), bad, len(data.train), settings.max_bad_fraction)
    tokens = data.train.lengths.sum() + sum(rows.lengths.sum() for rows in data.targets)
    counts = Counter(RowStatus(int(s)).name.lower() for s in status if s != RowStatus.OK)
    q = len(directions.rows)
    return DirectInfluence(
        cosines[:, :q].astype(np.float64),
        dict(counts),
        sum(directions.rows),
        int(tokens),
        cosines[:, q:] if each_row else None,
    )


def _directions(
    run: RunContext,
    settings: FeatureSettings,
    subtasks: Sequence[tuple[Rows, npt.NDArray[np.int64]]],
    source: TargetFeatures | None,
    budget: int,
    advance: OnRows,
    each_row: bool,
) -> TargetDirections:
    """Compute the gradient direction of every sub-task, from its rows or what `source` makes."""
    if source is not None:
        return combined_directions(
            run.model,
            [source.weighted(rows.name, positions.tolist()) for rows, positions in subtasks],
            run.collate,
            settings.target_features,
            token_budget=budget,
            each_row=each_row,
        )
    whole = whole_rows(run.model)
    return target_directions(
        run.model,
        [batches(run, rows, positions, budget, advance, whole) for rows, positions in subtasks],
        settings.target_features,
        each_row=each_row,
    )


def _merged(
    parts: Sequence[tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]],
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]:
    """Merge each row from the rank that computed it: on the others it is still TOO_LONG."""
    cosines, status = parts[0]
    for other_cosines, other_status in parts[1:]:
        taken = other_status != RowStatus.TOO_LONG
        cosines[taken], status[taken] = other_cosines[taken], other_status[taken]
    return cosines, status


def subtask_rows(
    targets: Sequence[Rows], sizes: Sequence[int] | None
) -> list[tuple[Rows, npt.NDArray[np.int64]]]:
    """Make each target set a sub-task, or split the only set into consecutive `sizes`."""
    if sizes is None:
        return [(rows, np.arange(len(rows))) for rows in targets]
    ends = np.cumsum(sizes)
    return [(targets[0], np.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
