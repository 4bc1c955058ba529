"""Exact influence of training rows: two passes that leave nothing in the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import Rows
from dataflex.features.settings import FeatureSettings
from dataflex.features.step_share import train_features
from dataflex.features.target_source import TargetFeatures
from dataflex.models.passes import batches, fitting, longest_row, whole_rows
from dataflex.run.context import UpdateContext
from dataflex.run.log import OnRows, progress
from gradstore.capture.limits import token_budget
from gradstore.export.combined import combined_directions
from gradstore.export.direct import TargetDirections, direct_products, target_directions
from gradstore.export.moments import AdamMoments
from gradstore.export.units import check_bad_rows
from gradstore.format.layout import RowStatus
from gradstore.scoring.best_rows import HeldTable, TargetTable
from gradstore.scoring.metric import Normalize

#: Directions of the target -> the same, changed by a curvature; collective.
Metric = Callable[[TargetDirections], TargetDirections]


@dataclass(frozen=True)
class DirectInfluence:
    """Exact influence of training rows.

    Attributes:
        values: (n, q) float64, the product with each sub-task's mean row; NaN where a row cannot be
            used or was not asked for.
        each: (n, t) float32, the product with each usable target row; None unless asked for.
        skipped: rows asked for that cannot be used, by status.
        target_rows: usable rows of the target.
        tokens: tokens of both passes.
    """

    values: npt.NDArray[np.float64]
    skipped: dict[str, int]
    target_rows: int
    tokens: int
    each: npt.NDArray[np.float32] | None = None

    @property
    def table(self) -> TargetTable | None:
        """The products with each target row, as subset rules read them."""
        return None if self.each is None else HeldTable(self.each)


def direct_influence(
    context: UpdateContext,
    settings: FeatureSettings,
    subtask_sizes: Sequence[int] | None,
    source: TargetFeatures | None = None,
    *,
    each_row: bool = False,
    among: npt.NDArray[np.int64] | None = None,
    normalize: Normalize = "cosine",
    metric: Metric | None = None,
) -> DirectInfluence:
    """Compute products with the q sub-tasks without a projection.

    Collective: every rank takes the target's directions, the training rows are shared.

    Args:
        context: the boundary.
        settings: of the features.
        subtask_sizes: rows of each sub-task where the only target set is split; None if not.
        source: of target gradients; None takes those of the target rows' answers.
        each_row: keep the products with each target row as well: a direction as long as the
            gradient is held for every usable target row, beside one for each sub-task.
        among: (m,) training rows that are asked for; None for all.
        normalize: whose norms are divided by: cosine (both rows'), target, or none.
        metric: changes the directions before training rows are multiplied with them.

    Raises:
        BadInput: a sub-task without a usable row; too many rows with a non-finite gradient.
    """
    run, data = context.run, context.run.data
    for rows in data.targets:
        longest_row(run.model, rows)
    asked = np.arange(len(data.train)) if among is None else among
    short_enough = fitting(run, data.train, asked)
    # A source takes its target pass alone, unseen; ranks share the training rows.
    total = len(short_enough) + (sum(len(rows) for rows in data.targets) if source is None else 0)
    with progress(f"exact influence at step {context.step}", total,
                  shown=run.shows_progress, told=run.ranks.leads) as advance:  # fmt: skip
        passes = _Passes(context, settings, normalize, each_row, advance)
        directions = passes.directions(subtask_rows(data.targets, subtask_sizes), source)
        if metric is not None:
            directions = metric(directions)
        products, status = passes.products(directions, short_enough)
    bad = np.flatnonzero(status == RowStatus.NON_FINITE).tolist()
    check_bad_rows(len(bad), bad, len(asked), settings.max_bad_fraction)
    tokens = data.train.lengths[asked].sum() + sum(rows.lengths.sum() for rows in data.targets)
    counts = Counter(RowStatus(int(s)).name.lower() for s in status[asked] if s != RowStatus.OK)
    q = len(directions.rows)
    return DirectInfluence(
        products[:, :q].astype(np.float64),
        dict(counts),
        sum(directions.rows),
        int(tokens),
        products[:, q:] if each_row else None,
    )


@dataclass(frozen=True)
class _Passes:
    """The two passes, at one boundary.

    Attributes:
        context: the boundary.
        settings: of the features.
        normalize: whose norms are divided by.
        each_row: keep the directions of target rows beside those of sub-tasks.
        advance: told how many rows are done.
    """

    context: UpdateContext
    settings: FeatureSettings
    normalize: Normalize
    each_row: bool
    advance: OnRows

    @property
    def budget(self) -> int:
        """Padded tokens of a batch."""
        return self.settings.tokens_per_batch or token_budget(self.context.run.model)

    def directions(
        self,
        subtasks: Sequence[tuple[Rows, npt.NDArray[np.int64]]],
        source: TargetFeatures | None,
    ) -> TargetDirections:
        """Compute the direction of every sub-task, from its rows or from what `source` makes."""
        run, features = self.context.run, self.settings.target_features
        unit = self.normalize != "none"
        if source is not None:
            return combined_directions(
                run.model,
                [source.weighted(rows.name, at.tolist()) for rows, at in subtasks],
                run.collate,
                features,
                token_budget=self.budget,
                each_row=self.each_row,
                unit=unit,
                room=run.whole_room,
            )
        whole = whole_rows(run.model)
        return target_directions(
            run.model,
            [
                batches(run, rows, at, self.budget, self.advance, whole, room=run.whole_room)
                for rows, at in subtasks
            ],
            features,
            each_row=self.each_row,
            unit=unit,
        )

    def products(
        self, directions: TargetDirections, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]:
        """Multiply training rows with every direction, shared by the ranks: (n, q), status (n,)."""
        run, settings = self.context.run, self.settings
        n, world = len(run.data.train), run.ranks.world
        moments = None
        if settings.train_features.needs_moments:
            moments = AdamMoments.from_optimizer(self.context.optimizer, run.model)
        status = np.full(n, RowStatus.TOO_LONG, dtype=np.uint8)
        products = direct_products(
            run.model,
            batches(run, run.data.train, rows, self.budget,
                    lambda done: self.advance(done * world), shared=True, room=run.whole_room),
            n,
            directions,
            train_features(run, settings),
            moments,
            status,
            unit=self.normalize == "cosine",
        )  # fmt: skip
        return _merged(run.ranks.gather(lambda: (products, status)))


def _merged(
    parts: Sequence[tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]],
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]:
    """Merge each row from the rank that computed it: on the others it is still TOO_LONG."""
    products, status = parts[0]
    for other_products, other_status in parts[1:]:
        taken = other_status != RowStatus.TOO_LONG
        products[taken], status[taken] = other_products[taken], other_status[taken]
    return products, status


def subtask_rows(
    targets: Sequence[Rows], sizes: Sequence[int] | None
) -> list[tuple[Rows, npt.NDArray[np.int64]]]:
    """Make each target set a sub-task, or split the only set into consecutive `sizes`."""
    if sizes is None:
        return [(rows, np.arange(len(rows))) for rows in targets]
    ends = np.cumsum(sizes)
    return [(targets[0], np.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
