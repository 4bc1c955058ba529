"""One feature from several sequences: a weighted sum of their gradients, then the usual way.

A policy gradient is such a sum: of each sampled response's gradient, times how much better than
expected it was. The sum is taken over whole gradients, before the feature map and the projection,
so that it is exact for features that are not linear (`sign`) too.

Letters: r rows of a group, b sequences of a batch, p gradient length, d projected dimensions.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import Accumulator
from torch import Tensor, nn

from gradstore.capture.losses import BatchStats, Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.export.direct import Kept, TargetDirections, in_order, joined, mean_direction
from gradstore.export.features import FeatureMap, FeatureSpec, Recipe
from gradstore.export.projected import DENSE_ROWS, finished_rows, sum_of_squares
from gradstore.export.room import Room
from gradstore.export.smaller import computed_whole
from gradstore.export.units import (
    Batch,
    Batches,
    Collate,
    FeatureRows,
    OnRows,
    PlannedRows,
    RowBatch,
    UnitFeatures,
    join_unit,
)
from gradstore.format.plans import UnitRange


@dataclass(frozen=True)
class WeightedRow:
    """Sequences that make one row's gradient: sum of weight times gradient of *summed* token loss.

    Attributes:
        row: position in the processed dataset.
        sequences: k items for `collate`; those of weight 0 may be left out.
        weights: (k,) finite.
        lengths: (k,) tokens.
        tokens: target tokens of all sequences, left out ones too; 0 makes the row `MASKED`.
    """

    row: int
    sequences: Sequence[Any]
    weights: Sequence[float]
    lengths: Sequence[int]
    tokens: int


@dataclass(frozen=True)
class WeightedSums:
    """Weighted rows, and how their sequences are put into batches.

    Attributes:
        rows: in any order; a row of a unit that is not among them becomes `TOO_LONG`.
        collate: sequences -> padded batch with `labels` (b, t).
        token_budget: tokens of a padded batch.
        room: see `Batches`.
    """

    rows: Sequence[WeightedRow]
    collate: Collate
    token_budget: int = 2048
    room: Room = field(default_factory=Room, compare=False, repr=False)


def combined_gradients(
    model: nn.Module, sums: WeightedSums, features: FeatureSpec, *, buffer_bytes: int = 2 << 30
) -> Generator[tuple[Sequence[WeightedRow], Tensor], None, None]:
    """Yield features of weighted sums, before projection; the model is frozen until the end.

    Args:
        model: the model whose gradients are taken.
        sums: what is summed up.
        features: `sgd`, or `sign` where the training features are `sign`.
        buffer_bytes: memory for whole gradients.

    Yields:
        Some rows and their features (r, p) float32, overwritten by the next ones.
    """
    device, rows = next(model.parameters()).device, sums.rows
    with GradientCapture(model, features.modules) as capture:
        feature_map = FeatureMap(features, capture.slots, None, device=device)
        size = max(1, min(DENSE_ROWS, len(rows), buffer_bytes // (4 * capture.p)))
        buffer = torch.empty((size, capture.p), device=device)
        for start in range(0, len(rows), size):
            group = rows[start : start + size]
            part = buffer[: len(group)]
            _add_up(capture, group, sums, part)
            for slot in capture.slots:
                feature_map.apply_(slot, part[:, slot.start : slot.start + slot.numel])
            yield group, part


def compute_combined_unit(
    model: nn.Module,
    sums: WeightedSums,
    recipe: Recipe,
    unit: UnitRange,
    on_rows: OnRows | None = None,
) -> UnitFeatures:
    """Compute the projected features of one unit's weighted sums, on whatever rank.

    Args:
        model: the model whose gradients are taken.
        sums: the unit's rows.
        recipe: how their sums become features; of the kinds `sgd` and `sign`, without moments.
        unit: which rows.
        on_rows: called with the number of rows each time some are done.
    """
    parts = combined_gradients(model, sums, recipe.features)

    def projected() -> Iterator[FeatureRows]:
        for group, gradients in parts:
            accumulator = Accumulator(recipe.projection, len(group), device=gradients.device)
            accumulator.add(gradients, 0)
            yield finished_rows(
                np.array([each.row for each in group], dtype=np.int64),
                accumulator.result(),
                sum_of_squares(gradients),
                _without_losses([each.tokens for each in group], gradients.device),
            )

    model_tokens = sum(sum(each.lengths) for each in sums.rows)
    with closing(parts):  # or a traceback would keep the model frozen
        return join_unit(unit, recipe.projection.d, projected(), model_tokens, on_rows)


def _without_losses(target_tokens: Sequence[int], device: torch.device) -> BatchStats:
    """Return the statistics of sums: a sum of several sequences has no loss of its own."""
    tokens = torch.tensor(target_tokens, device=device)
    return BatchStats(torch.full(tokens.shape, torch.nan, device=device), tokens)


def combined_directions(
    model: nn.Module,
    subtasks: Sequence[Sequence[WeightedRow]],
    collate: Collate,
    features: FeatureSpec,
    *,
    token_budget: int = 2048,
    each_row: bool = False,
    unit: bool = True,
    room: Room | None = None,
) -> TargetDirections:
    """Compute the mean feature of each sub-task, and keep each row's if asked to.

    Args:
        model: the model whose gradients are taken.
        subtasks: for each sub-task, its rows.
        collate: sequences -> padded batch with `labels` (b, t).
        features: `sgd`, or `sign` where the training features are `sign`.
        token_budget: tokens of a padded batch.
        each_row: keep the rows as well.
        unit: whether a row counts at length 1, or with its norm.
        room: see `Batches`.

    Raises:
        BadInput: a sub-task without a usable row, named by its position.
    """
    found, each, room = [], [], room or Room()
    for number, rows in enumerate(subtasks):
        kept: Kept | None = [] if each_row else None
        sums = WeightedSums(rows, collate, token_budget, room)
        parts = combined_gradients(model, sums, features)
        with closing(parts):
            counted = (
                (
                    gradients,
                    torch.tensor([row.tokens for row in group], device=gradients.device),
                    [row.row for row in group],
                )
                for group, gradients in parts
            )
            found.append(mean_direction(counted, number, kept, unit=unit))
        each.append(in_order(kept))
    directions = torch.stack([direction for direction, _ in found])
    return TargetDirections(directions, tuple(used for _, used in found), joined(each))


def _add_up(
    capture: GradientCapture, group: Sequence[WeightedRow], sums: WeightedSums, into: Tensor
) -> None:
    """Add every sequence's weighted gradient to its row of `into` (r, p).

    Where memory runs out, the sums of the group begin again.
    """
    sequences = [sequence for each in group for sequence in each.sequences]
    owners = np.repeat(np.arange(len(group)), [len(each.sequences) for each in group])
    weights = np.array([w for each in group for w in each.weights], dtype=np.float64)
    lengths = np.array([n for each in group for n in each.lengths], dtype=np.int64)
    batches = Batches(sequences, sums.collate, lengths, sums.token_budget, room=sums.room)

    def add(pairs: Iterable[RowBatch]) -> None:
        into.zero_()
        for chosen, batch in pairs:
            _add_batch(capture, batch, weights[chosen], owners[chosen], into)

    computed_whole(PlannedRows(batches, batches.cut(np.arange(len(sequences)))), add)


def _add_batch(
    capture: GradientCapture,
    batch: Batch,
    weights: npt.NDArray[np.float64],
    owners: npt.NDArray[np.int64],
    into: Tensor,
) -> None:
    """Add a batch's weighted gradients: of sequences with weights (b,), to rows (b,)."""
    batch = {k: v.to(into.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    # The gradient taken is that of the mean over a sequence's tokens.
    tokens = Targets.of(batch).counts.double()
    scale = (torch.from_numpy(weights).to(into.device) * tokens).float()
    places = _places(owners, into.device)

    def sink(slot: ParameterSlot, gradient: Tensor) -> None:
        block = into[:, slot.start : slot.start + slot.numel]
        # Row by row: one that is not finite leaves the others alone.
        for owner, members in places:
            block[owner] += scale[members] @ gradient[members]

    capture.capture(batch, sink)


def _places(owners: npt.NDArray[Any], device: torch.device) -> list[tuple[int, Tensor]]:
    """List pairs of a row of the group and the batch positions of its sequences."""
    return [
        (int(owner), torch.from_numpy(np.flatnonzero(owners == owner)).to(device))
        for owner in np.unique(owners)
    ]
