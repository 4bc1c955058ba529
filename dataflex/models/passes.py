"""Passes over rows under the current model: batches that keep rows apart, and each row's loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from dataflex.data.rows import Rows
from dataflex.run.context import RunContext
from dataflex.run.log import OnRows, progress
from gradstore.capture.limits import longest_of, token_budget
from gradstore.capture.losses import IGNORED_LABEL
from gradstore.capture.per_sample import batch_losses
from gradstore.export.room import Room
from gradstore.export.units import Batches, PlannedRows

Collate = Callable[[list[Any]], Any]


def own_labels(collate: Collate) -> Collate:
    """Return a collator whose padding is no label, so that a row's targets are its own.

    With `ignore_pad_token_for_loss: false` LlamaFactory's pads labels with the pad token: training
    learns it, and how often a row has it depends on the longest row of its batch.
    """
    if getattr(collate, "label_pad_token_id", IGNORED_LABEL) == IGNORED_LABEL:
        return collate
    own: Any = copy.copy(collate)
    own.label_pad_token_id = IGNORED_LABEL
    return own  # type: ignore[no-any-return]


def longest_row(model: Any, rows: Rows) -> int | None:  # noqa: ANN401 - a PreTrainedModel
    """Return the tokens of the longest row that can be passed through the model; None for any.

    Raises:
        BadInput: a row's features would depend on its batch, see `longest_of`.
    """
    return longest_of(model, rows.lengths, rows.name)


def fitting(run: RunContext, rows: Rows, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the positions of rows that are not too long for the model."""
    return positions[rows.lengths[positions] <= (longest_row(run.model, rows) or np.inf)]


def row_losses(
    run: RunContext,
    positions: npt.NDArray[np.int64] | None = None,
    *,
    rows: Rows | None = None,
    max_rows: int = 1024,
) -> npt.NDArray[np.float64]:
    """Compute the mean token cross-entropy of rows under the current model, in eval mode.

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
    longest_row(run.model, rows)  # refuses rows whose losses would depend on their batch
    # Twice the budget of a gradient pass: nothing is kept for a backward.
    budget = 2 * token_budget(run.model)
    work = -np.sort(-(rows.lengths if positions is None else rows.lengths[positions]))
    total = len(work)

    def own_part() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        where, found = [np.empty(0, np.int64)], [np.empty(0)]
        with progress(
            f"losses of {rows.name}", work, shown=run.shows_progress, told=run.ranks.leads
        ) as advance:

            def advance_rows(done: int) -> None:
                advance(min(done * run.ranks.world, total))

            for at, batch in batches(
                run, rows, positions, budget, advance_rows, max_rows, shared=True
            ):
                where.append(at)
                found.append(batch_losses(run.model, batch).loss.double().cpu().numpy())
        return np.concatenate(where), np.concatenate(found)

    losses = np.full(len(rows), np.nan)
    for where, found in run.ranks.gather(own_part):
        # A batch may be repeated, to make the number of passes equal on all ranks.
        new = ~np.isfinite(losses[where])
        losses[where[new]] = found[new]
    return losses


def whole_rows(model: nn.Module) -> int:
    """Return the number of rows of a target batch whose full gradients fit into 1 GiB."""
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
    room: Room | None = None,
) -> PlannedRows:
    """Give collated batches on the model's device, longest rows first, with row positions.

    With `shared` this rank gets its part of the batches alone. Passes of `gradstore.export` go on
    in smaller ones where memory runs out, and note it in `room`.
    """
    device = next(run.model.parameters()).device

    def moved(items: list[Any]) -> dict[str, Any]:
        batch = run.collate(items)
        return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}

    cut = Batches(rows.dataset, moved, rows.lengths, budget, max_rows=max_rows, room=room or Room())
    # What is shared out is planned alike on every rank, whatever room each of them has found.
    plan = replace(cut, room=Room()) if shared else cut
    planned = plan.cut(np.arange(len(rows)) if positions is None else positions)
    if shared:
        # Equally many passes on every rank: one that stopped early would leave the others waiting
        # where parameters are sharded (ZeRO-3). The shortest batch may come several times.
        more = planned[-1:] * (-len(planned) % run.ranks.world)
        planned = list(run.ranks.share([*planned, *more]))
    return PlannedRows(cut, planned, advance)
