"""Passes over the rows of a run that leave nothing behind: losses, and exact influence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dataflex.context import RunContext, UpdateContext
from dataflex.data import Rows
from dataflex.events import OnRows, progress
from dataflex.features import FeatureSettings, token_budget
from dataflex.targets import TargetFeatures
from gradstore.capture.per_sample import batch_losses
from gradstore.export.direct import direct_cosines, target_directions
from gradstore.export.moments import AdamMoments
from gradstore.export.units import check_bad_rows, plan_batches
from gradstore.format.layout import RowStatus

RowBatch = tuple[npt.NDArray[np.int64], dict[str, Any]]


def row_losses(
    run: RunContext,
    positions: npt.NDArray[np.int64] | None = None,
    *,
    rows: Rows | None = None,
    max_rows: int = 1024,
) -> npt.NDArray[np.float64]:
    """Mean token cross-entropy of rows under the current model, in eval mode.

    Collective: the ranks share the batches, each then has every loss.

    Args:
        run: model, rows and collator.
        positions: (m,) rows to score; None for all.
        rows: of which data set; None for the training rows.
        max_rows: rows of a batch, at most.

    Returns:
        (n,) float64; NaN for rows not asked for, and for rows without a target token.
    """
    rows = run.data.train if rows is None else rows
    # Twice the budget of a gradient pass: nothing is kept for a backward.
    budget = 2 * token_budget(run.model)
    total = len(rows) if positions is None else len(positions)

    def own_part() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        where, found = [np.empty(0, np.int64)], [np.empty(0)]
        with progress(f"losses of {rows.name}", total, shown=run.shows_progress) as advance:

            def told(done: int) -> None:
                advance(min(done * run.ranks.world, total))

            for at, batch in batches(run, rows, positions, budget, told, max_rows, shared=True):
                where.append(at)
                found.append(batch_losses(run.model, batch).loss.double().cpu().numpy())
        return np.concatenate(where), np.concatenate(found)

    losses = np.full(len(rows), np.nan)
    for where, found in run.ranks.gather(own_part):
        # A batch may come several times, where ranks had to make as many passes.
        new = ~np.isfinite(losses[where])
        losses[where[new]] = found[new]
    return losses


@dataclass(frozen=True)
class DirectInfluence:
    """Exact influence of every training row.

    Attributes:
        cosines: (n, q) float64, NaN where a row cannot be used.
        skipped: rows that cannot be used, by status.
        target_rows: usable rows of the target.
        tokens: tokens of both passes.
    """

    cosines: npt.NDArray[np.float64]
    skipped: dict[str, int]
    target_rows: int
    tokens: int


def direct_influence(
    context: UpdateContext,
    settings: FeatureSettings,
    subtask_sizes: Sequence[int] | None,
    source: TargetFeatures | None = None,
) -> DirectInfluence:
    """Mean cosines to the q sub-tasks without a projection (`scoring: direct`).

    Collective: every rank takes the target's directions, the training rows are shared.

    Raises:
        BadInput: a sub-task without a usable row; too many rows with a non-finite gradient.
    """
    run, data = context.run, context.run.data
    longest = getattr(run.model.config, "max_position_embeddings", None) or data.train.lengths.max()
    fitting = np.flatnonzero(data.train.lengths <= longest)
    status = np.full(len(data.train), RowStatus.TOO_LONG, dtype=np.uint8)
    moments = None
    if settings.train_features.needs_moments:
        moments = AdamMoments.from_optimizer(context.optimizer, run.model)
    budget = settings.tokens_per_batch or token_budget(run.model)
    total = len(data.train) + sum(len(rows) for rows in data.targets)
    with progress(f"exact influence at step {context.step}", total,
                  shown=run.shows_progress) as advance:  # fmt: skip
        subtasks = _subtasks(data.targets, subtask_sizes)
        if source is not None:
            directions = source.directions(run, subtasks, settings.target_features, budget)
        else:
            directions = target_directions(
                run.model,
                [
                    batches(run, rows, positions, budget, advance, whole_rows(run.model))
                    for rows, positions in subtasks
                ],
                settings.target_features,
            )
        cosines = direct_cosines(
            run.model,
            batches(run, data.train, fitting, budget, advance, shared=True),
            len(data.train),
            directions,
            settings.train_features,
            moments,
            status,
        )
    cosines, status = _merged(run.ranks.gather(lambda: (cosines, status)))
    bad = np.flatnonzero(status == RowStatus.NON_FINITE).tolist()
    check_bad_rows(len(bad), bad, len(data.train), settings.max_bad_fraction)
    tokens = data.train.lengths.sum() + sum(rows.lengths.sum() for rows in data.targets)
    counts = Counter(RowStatus(int(s)).name.lower() for s in status if s != RowStatus.OK)
    return DirectInfluence(
        cosines.astype(np.float64), dict(counts), sum(directions.rows), int(tokens)
    )


def _merged(
    parts: Sequence[tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]],
) -> tuple[npt.NDArray[np.floating[Any]], npt.NDArray[np.uint8]]:
    """Each row from the rank that took it: on the others it is still TOO_LONG."""
    cosines, status = parts[0]
    for other_cosines, other_status in parts[1:]:
        taken = other_status != RowStatus.TOO_LONG
        cosines[taken], status[taken] = other_cosines[taken], other_status[taken]
    return cosines, status


def whole_rows(model: nn.Module) -> int:
    """Rows of a target batch whose whole gradients fit into 1 GiB."""
    p = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return max(1, (1 << 30) // (4 * max(p, 1)))


def batches(
    run: RunContext,
    rows: Rows,
    positions: npt.NDArray[np.int64] | None,
    budget: int,
    advance: OnRows,
    max_rows: int = 1024,
    *,
    shared: bool = False,
) -> Iterator[RowBatch]:
    """Collated batches on the model's device, longest rows first, with their row positions.

    With `shared` this rank gets its part of the batches alone.
    """
    device = next(run.model.parameters()).device
    chosen = np.arange(len(rows)) if positions is None else positions
    planned = plan_batches(rows.lengths[chosen], budget, max_rows)
    if shared:
        # As many passes on every rank: one that stopped early would leave the others waiting where
        # parameters are spread over the ranks (ZeRO-3). The shortest batch may come several times.
        more = planned[-1:] * (-len(planned) % run.ranks.world)
        planned = list(run.ranks.share([*planned, *more]))
    for batch_of in planned:
        where = chosen[batch_of]
        batch = run.collate([rows.dataset[int(i)] for i in where])
        yield where, {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        advance(len(where))


def _subtasks(
    targets: Sequence[Rows], sizes: Sequence[int] | None
) -> list[tuple[Rows, npt.NDArray[np.int64]]]:
    """Each target set is a sub-task, or the one set is cut into consecutive `sizes`."""
    if sizes is None:
        return [(rows, np.arange(len(rows))) for rows in targets]
    ends = np.cumsum(sizes)
    return [(targets[0], np.arange(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
