"""Passes that go on in smaller batches where memory runs out, and neither lose nor double a row.

What a pass has made when memory runs out says how it goes on: `computed_parts` and
`computed_batches` leave out the rows that are done; `computed_whole` begins again, for passes that
have added up rows and cannot tell how far the last batch came.

Letters: k rows of a unit, b rows of a batch, t tokens.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gradstore.capture.limits import ran_out_of_memory, release_memory
from gradstore.export.units import Batch, Batches, FeatureRows, PlannedRows, RowBatch
from gradstore.format.plans import UnitRange

Made = TypeVar("Made")

_log = logging.getLogger(__name__)


def computed_parts(
    batches: Batches,
    unit: UnitRange,
    compute: Callable[[Iterator[RowBatch]], Generator[FeatureRows, None, None]],
) -> Generator[FeatureRows, None, None]:
    """Compute the rows of a unit; where memory runs out, those left in smaller batches.

    Args:
        batches: the rows; they stay smaller for the units that follow.
        unit: which rows.
        compute: batches -> features of their rows.

    Raises whatever `compute` raises; that memory ran out, if a single row takes too much.
    """
    done = np.zeros(unit.stop - unit.start, dtype=np.bool_)
    while True:
        try:
            with closing(compute(batches.of(unit, done))) as parts:  # else the model stays frozen
                for part in parts:
                    done[part.rows - unit.start] = True
                    yield part
            return
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error) or not batches.lower(unit, done):
                raise
        _go_on(batches)


def computed_batches(
    pairs: Iterable[RowBatch], compute: Callable[[npt.NDArray[np.int64], Batch], Made]
) -> Iterator[Made]:
    """Yield what `compute` makes of each batch; of one too large for memory, in smaller ones.

    Args:
        pairs: row positions (b,) and their batch (b, t). Only `PlannedRows` can be cut.
        compute: leaves nothing behind where it fails.

    Raises whatever `compute` raises; that memory ran out, if a single row takes too much.
    """
    if not isinstance(pairs, PlannedRows):
        for rows, batch in pairs:
            yield compute(rows, batch)
        return
    left = deque(pairs.planned)
    while left:
        first, *others = pairs.batches.cut(left.popleft())
        left.extendleft(reversed(others))
        try:
            made = compute(*pairs.batches.made(first))
        except (MemoryError, RuntimeError) as error:
            if not ran_out_of_memory(error) or not pairs.batches.lower_for([first]):
                raise
        else:
            yield made
            pairs.tell(len(first))
            continue
        left.appendleft(first)
        _go_on(pairs.batches)


def computed_whole(
    pairs: Iterable[RowBatch], compute: Callable[[Iterable[RowBatch]], Made]
) -> Made:
    """Return what `compute` makes of all batches; from the beginning in smaller ones.

    Args:
        pairs: row positions (b,) and their batch (b, t). Only `PlannedRows` can be cut.
        compute: begins with nothing each time.

    Raises whatever `compute` raises; that memory ran out, if a single row takes too much.
    """
    while True:
        try:
            return compute(pairs)
        except (MemoryError, RuntimeError) as error:
            if not isinstance(pairs, PlannedRows) or not ran_out_of_memory(error):
                raise
            fitting = (rows for planned in pairs.planned for rows in pairs.batches.cut(planned))
            if not pairs.batches.lower_for(fitting):
                raise
        _go_on(pairs.batches)


def _go_on(batches: Batches) -> None:
    _log.warning(
        "out of memory: batches of at most %d padded tokens from here on; no row is lost "
        "(tokens_per_batch sets it from the start)", batches.tokens_at_once,
    )  # fmt: skip
    release_memory()
