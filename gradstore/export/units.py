"""One unit of a generation, computed anywhere: its rows, their batches, the computed features.

`compute_unit` (gradstore.export.projected) and `compute_embedding_unit`
(gradstore.export.embeddings) give a `UnitFeatures`, which knows nothing of a store and can be
pickled. So several ranks can share a generation: each computes some of the pending `UnitRange`s,
and the process that holds the lock gathers them and writes (`UnitSink` of gradstore.store.filling).

```
batches, recipe = Batches(rows, collate, lengths), Recipe(features, projection, moments)
mine = [compute_unit(model, batches, recipe, unit) for unit in pending[rank::world]]
with UnitSink(writer, behind=1) as sink:        # where the lock is held
    for unit in gathered:
        sink.write(unit)
```

Letters: k rows of a unit, b rows of a batch, t tokens, d dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.export.room import Room
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange

Batch = Mapping[str, Tensor]
Collate = Callable[[list[Any]], Batch]
Lengths = Sequence[int] | npt.NDArray[np.int64]
RowBatch = tuple[npt.NDArray[np.int64], Batch]
OnRows = Callable[[int], None]

#: Rows that stand for all where a mean over the training set is estimated.
SAMPLE_ROWS = 256
#: What starting a batch costs, as a part of the tokens that fit into one. Measured with two cores:
#: 0.6 s of a batch of SmolLM2-135M, as much as 120 of its tokens; a GPU's batches hold more.
BATCH_SHARE = 16


@dataclass(frozen=True)
class FeatureRows:
    """Features of some rows, on the host.

    Attributes:
        rows: (b,) int64, positions in the processed dataset.
        features: (b, d) float32; NaN where the row cannot be used.
        norm: (b,) float32, Euclidean norm of the feature before projection.
        status: (b,) uint8, `RowStatus`.
        tokens: (b,) int32, target tokens.
        loss: (b,) float32, mean loss over the target tokens; None where the pass has none.
    """

    rows: npt.NDArray[np.int64]
    features: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    status: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.int32]
    loss: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class UnitFeatures:
    """A computed unit, on the host; plain arrays, so that it can be sent to another process.

    Attributes:
        unit: which rows.
        features: (k, d) float32; NaN where the row cannot be used.
        norm: (k,) float32, norm of each feature before projection.
        status: (k,) uint8, `RowStatus`.
        tokens: (k,) int32, target tokens.
        model_tokens: tokens of the rows that went through the model.
        loss: (k,) float32, mean loss over the target tokens; nan where the pass has none.
    """

    unit: UnitRange
    features: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    status: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.int32]
    model_tokens: int
    loss: npt.NDArray[np.float32] | None = None


def plan_batches(
    lengths: Lengths, token_budget: int, max_rows: int = 1024
) -> list[npt.NDArray[np.int64]]:
    """Group positions 0..n-1 by length into padded batches of at most `token_budget` tokens.

    A batch costs its padded tokens and `token_budget // BATCH_SHARE` more, and of all ways to cut
    the sorted lengths the cheapest is taken: rows of very different lengths share no batch, and
    batches are not so small that starting one counts.

    Args:
        lengths: (n,) tokens of each row.
        token_budget: rows x longest row of a batch; a single longer row makes a batch of its own.
        max_rows: upper bound on the rows of a batch.

    Returns:
        Position arrays, longest rows first, so that rows too long for memory fail at once.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    widths = np.maximum(np.asarray(lengths, dtype=np.int64)[order], 1)
    n, start_cost = len(order), token_budget // BATCH_SHARE
    counts = np.arange(1, min(max_rows, n) + 1)
    cheapest = np.zeros(n + 1, dtype=np.int64)  # of the rows from here to the last
    taken = np.zeros(n, dtype=np.int64)
    for start in range(n - 1, -1, -1):
        width = int(widths[start])
        most = min(max(1, min(max_rows, token_budget // width)), n - start)
        costs = counts[:most] * width + cheapest[start + 1 : start + 1 + most]
        taken[start] = most - int(costs[::-1].argmin())  # the largest of equally cheap ones
        cheapest[start] = costs[taken[start] - 1] + start_cost
    batches, start = [], 0
    while start < n:
        stop = start + int(taken[start])
        batches.append(order[start:stop])
        start = stop
    return batches


@dataclass(frozen=True)
class Batches:
    """The rows of a data set, and how those of a unit are put into batches.

    Attributes:
        dataset: n rows; `dataset[i]` is what `collate` takes a list of.
        collate: rows -> padded batch.
        lengths: (n,) tokens of each row.
        token_budget: tokens of a padded batch; fewer from where memory runs out (`lower`).
        longest: rows with more tokens get status `TOO_LONG` (the model's position limit); None
            takes all, where there is no limit or `collate` cuts them.
        max_rows: rows of a batch, at most.
        room: what was found where memory ran out; whoever gives it to further batches of the same
            model, of another set or at a later step, does not run out again.
    """

    dataset: Sequence[Any]
    collate: Collate
    lengths: Lengths
    token_budget: int = 2048
    longest: int | None = None
    max_rows: int = 1024
    room: Room = field(default_factory=Room, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Raise BadInput unless each row has a length and the limits are whole numbers.

        Raises:
            BadInput: they are not.
        """
        expect(callable(self.collate), "collate", self.collate, "a function: rows -> padded batch")
        expect_whole(self.token_budget, "token_budget")
        expect_whole(self.max_rows, "max_rows")
        sized = hasattr(self.dataset, "__len__")
        expect(sized, "dataset", self.dataset, "rows that have a length and are indexed")
        wanted = f"one whole number for each of the {len(self.dataset):,} rows"
        lengths = np.asarray(self.lengths)
        fits = lengths.shape == (len(self.dataset),) and (lengths.dtype.kind in "iu")
        expect(fits or lengths.size == len(self.dataset) == 0, "lengths", self.lengths, wanted)

    def of(self, unit: UnitRange, done: npt.NDArray[np.bool_] | None = None) -> Iterator[RowBatch]:
        """Yield row positions (b,) and their batch, made when it is asked for; longest rows first.

        Batches depend on the unit alone, not on the process, unless memory ran out there.

        Args:
            unit: which rows.
            done: (k,) rows of the unit to leave out.
        """
        for rows in self.cut(self._left(unit, done)):
            yield self.made(rows)

    def lower(self, unit: UnitRange, done: npt.NDArray[np.bool_]) -> bool:
        """Halve the tokens of the largest batch, after memory ran out in one of those left.

        Args: those of `of`.

        Returns:
            Whether that made batches smaller: not where each holds one row.
        """
        return self.lower_for(self.cut(self._left(unit, done)))

    def lower_for(self, planned: Iterable[npt.NDArray[np.int64]]) -> bool:
        """Halve the tokens of the largest of some batches that did not fit, given as positions.

        Returns:
            Whether that made batches smaller: not where each holds one row.
        """
        lengths = [self._lengths[rows] for rows in planned if len(rows) > 1]
        if lengths:
            self.room.tokens = max(len(batch) * int(batch.max()) for batch in lengths) // 2
        return bool(lengths)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a padded batch from now on."""
        room = self.room.tokens
        return self.token_budget if room is None else min(room, self.token_budget)

    def cut(self, positions: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
        """Cut rows into the batches that there is room for now: the positions of each."""
        planned = plan_batches(self._lengths[positions], self.tokens_at_once, self.max_rows)
        return [positions[chosen] for chosen in planned]

    def made(self, positions: npt.NDArray[np.int64]) -> RowBatch:
        """Make one batch of some rows."""
        return positions, self.collate([self.dataset[int(i)] for i in positions])

    def _left(self, unit: UnitRange, done: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.int64]:
        rows = self._fitting(unit)
        return rows if done is None else rows[~done[rows - unit.start]]

    def sample(self, seed: int, without: npt.NDArray[np.bool_] | None = None) -> PlannedRows:
        """Draw at most `SAMPLE_ROWS` of all rows by lot, in batches, longest rows first."""
        fits = self._fitting(UnitRange(0, 0, len(self.dataset)))
        if without is not None:
            fits = fits[~without[fits]]
        count = min(SAMPLE_ROWS, len(fits))
        some = np.sort(np.random.default_rng(seed).choice(fits, count, replace=False))
        return PlannedRows(self, self.cut(some))

    def tokens(self, unit: UnitRange) -> int:
        """Count the tokens of the unit's rows that go through the model."""
        return int(self._lengths[self._fitting(unit)].sum())

    def _fitting(self, unit: UnitRange) -> npt.NDArray[np.int64]:
        """Return the rows of the unit that the model can take."""
        rows = np.arange(unit.start, unit.stop)
        return rows if self.longest is None else rows[self._lengths[rows] <= self.longest]

    @cached_property
    def _lengths(self) -> npt.NDArray[np.int64]:
        """`lengths` as an array, made once for all units."""
        return np.asarray(self.lengths, dtype=np.int64)


@dataclass(frozen=True)
class PlannedRows:
    """Some rows in batches, each made when it is asked for.

    Who takes them as plain batches gets those; `gradstore.export.smaller` goes on in smaller ones
    where memory runs out.

    Attributes:
        batches: of whose rows.
        planned: the positions of each batch.
        on_rows: called with the number of rows of a batch when the next one is asked for.
    """

    batches: Batches
    planned: Sequence[npt.NDArray[np.int64]]
    on_rows: OnRows | None = None

    def __iter__(self) -> Iterator[RowBatch]:
        """Yield row positions (b,) and their batch."""
        for planned in self.planned:
            for rows in self.batches.cut(planned):
                yield self.batches.made(rows)
                self.tell(len(rows))

    def tell(self, rows: int) -> None:
        """Tell `on_rows` of so many rows."""
        if self.on_rows is not None:
            self.on_rows(rows)


def join_unit(
    unit: UnitRange,
    dim: int,
    parts: Iterable[FeatureRows],
    model_tokens: int,
    on_rows: OnRows | None = None,
) -> UnitFeatures:
    """Put the parts of one unit in the order of its rows; a row in no part is TOO_LONG.

    Args:
        unit: which rows.
        dim: d.
        parts: their features, in any order.
        model_tokens: tokens of the rows that go through the model.
        on_rows: called with the number of rows of each part.
    """
    k = unit.stop - unit.start
    features = np.full((k, dim), np.nan, dtype=np.float32)
    norm = np.full(k, np.nan, dtype=np.float32)
    status = np.full(k, RowStatus.TOO_LONG, dtype=np.uint8)
    tokens = np.zeros(k, dtype=np.int32)
    loss = np.full(k, np.nan, dtype=np.float32)
    for part in parts:
        at = part.rows - unit.start
        features[at], norm[at] = part.features, part.norm
        status[at], tokens[at] = part.status, part.tokens
        if part.loss is not None:
            loss[at] = part.loss
        if on_rows is not None:
            on_rows(len(part.rows))
    return UnitFeatures(unit, features, norm, status, tokens, model_tokens, loss)


def row_status(norm: Tensor, target_tokens: Tensor) -> Tensor:
    """Compute (b,) uint8 row status codes from feature norms (b,) and target tokens (b,)."""
    status = torch.full_like(target_tokens, RowStatus.OK, dtype=torch.uint8)
    status[norm == 0] = RowStatus.ZERO_NORM
    status[~torch.isfinite(norm)] = RowStatus.NON_FINITE
    status[target_tokens == 0] = RowStatus.MASKED
    return status


def check_bad_rows(
    bad: int, named: Sequence[int], rows: int, max_bad_fraction: float, what: str = "gradient"
) -> None:
    """Stop where too many rows have a non-finite gradient or embedding.

    Args:
        bad: how many there are.
        named: some of them, for the message.
        rows: of the whole data set.
        max_bad_fraction: the share that is still accepted.
        what: gradient or embedding.

    Raises:
        BadInput: there are more; names up to ten.
    """
    if bad > max_bad_fraction * rows:
        advice = "lower the learning rate" if what == "gradient" else "check the model's weights"
        raise BadInput(
            f"{bad} of {rows} rows have a non-finite {what}, more than "
            f"max_bad_fraction={max_bad_fraction:g} allows; the first: "
            f"{list(named[:10])}. Check these rows, {advice}, or raise max_bad_fraction."
        )
