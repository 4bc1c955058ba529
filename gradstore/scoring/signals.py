"""Signals of single training rows: how hard each pulls at the model, and with whom.

Letters: n train rows, q target sets. Every signal is a weighted mean over checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import CHUNK_ROWS, combine
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.scan import as_device
from gradstore.scoring.subtasks import Subtask, source_name
from gradstore.store.generation import Generation

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowSignals:
    """Signals of the training rows; nan where a row is not usable.

    Attributes:
        codes: (n,) uint8, `RowStatus` of the first checkpoint that can't use the row, else OK.
        tokens: (n,) int32, target tokens.
        loss: (n,) float64, mean over the target tokens; all nan where a checkpoint lacks losses.
        gradient_norm: (n,) float64, length of the stored feature before its projection.
        self_influence: (n,) float64, the mean of the squared lengths.
        agreement: (n,) float64, mean cosine to all other usable training rows.
        targets: (n, q) float64, mean cosine to each target set's rows.
    """

    codes: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.int32]
    loss: Numbers
    gradient_norm: Numbers
    self_influence: Numbers
    agreement: Numbers
    targets: Numbers

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) bool, rows that every checkpoint can use."""
        return np.asarray(self.codes == RowStatus.OK)


def row_signals(
    checkpoints: Sequence[CheckpointFeatures],
    *,
    device: str | torch.device = "cpu",
    chunk_rows: int = CHUNK_ROWS,
    on_rows: Callable[[int], None] | None = None,
) -> RowSignals:
    """Compute the signals of every training row in one pass over the features.

    Args:
        checkpoints: generations of the same rows; they may have no target set at all.
        device: where the products are computed.
        chunk_rows: rows between two progress calls; rounded up to a multiple of 256.
        on_rows: called with the number of rows just done.

    Raises:
        BadInput: no usable training row, or a target set without a usable row.
    """
    trains = [_generation(checkpoint) for checkpoint in checkpoints]
    weights = np.array([checkpoint.weight for checkpoint in checkpoints])
    weights = weights / weights.sum()
    targets = checkpoints[0].targets
    n = trains[0].rows
    everyone = Subtask(0, 0, n, f"the training rows ({source_name(trains[0])})")
    sets = [
        Subtask(index, 0, target.rows, f"target set {source_name(target)}")
        for index, target in enumerate(targets, start=1)
    ]
    beside = [
        CheckpointFeatures(one.train, (one.train, *one.targets), float(weight))
        for one, weight in zip(checkpoints, weights, strict=True)
    ]
    cosines = np.empty((n, 1 + len(sets)), dtype=np.float64)

    def keep(start: int, stop: int, means: npt.NDArray[np.float32]) -> None:
        cosines[start:stop] = means
        if on_rows is not None:
            on_rows(stop - start)

    codes = combine(beside, [everyone, *sets], keep, as_device(device), chunk_rows)
    usable = codes == RowStatus.OK
    cosines[~usable] = np.nan
    norms = [_masked(train.norm, usable) for train in trains]
    losses = [_losses(train, usable) for train in trains]
    return RowSignals(
        codes=codes,
        tokens=trains[-1].tokens,
        loss=_mean(losses, weights),
        gradient_norm=_mean(norms, weights),
        self_influence=_mean([norm**2 for norm in norms], weights),
        agreement=_without_self(cosines[:, 0], int(usable.sum())),
        targets=cosines[:, 1:],
    )


def _generation(checkpoint: CheckpointFeatures) -> Generation:
    """Return the training rows, which must come from a store: an array has no norms."""
    assert isinstance(checkpoint.train, Generation)
    return checkpoint.train


def _masked(values: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_]) -> Numbers:
    return np.where(usable, values.astype(np.float64), np.nan)


def _losses(train: Generation, usable: npt.NDArray[np.bool_]) -> Numbers:
    """Return (n,) losses; nan where the generation was stored without."""
    losses = train.loss
    return np.full(train.rows, np.nan) if losses is None else _masked(losses, usable)


def _mean(parts: Sequence[Numbers], weights: Numbers) -> Numbers:
    """Compute the weighted mean over checkpoints, (n,)."""
    total = np.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total += weight * part
    return total


def _without_self(mean: Numbers, count: int) -> Numbers:
    """Take each row's cosine to itself, 1, out of its mean cosine to `count` rows."""
    if count < 2:
        return np.full_like(mean, np.nan)
    return (mean * count - 1.0) / (count - 1)
