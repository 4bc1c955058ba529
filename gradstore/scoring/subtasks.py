"""Target rows -> sub-tasks -> one query vector each.

Letters: q sub-tasks, d projected dimensions. A sub-task's direction is the mean of its unit rows;
it is not normalised again, so a sub-task whose rows disagree has a short query and low scores.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, unit_rows

_Rows = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Subtask:
    """Rows [start, stop) of target set number `target`; errors call it by its `label`."""

    target: int
    start: int
    stop: int
    label: str

    def no_usable_row(self) -> BadInput:
        """Build the error for a sub-task without a usable row."""
        return BadInput(
            f"{self.label}: none of its {self.stop - self.start} rows is usable; give it rows with "
            "target tokens and finite, non-zero gradients"
        )

    def no_direction(self) -> BadInput:
        """Build the error for a sub-task whose rows point nowhere together."""
        return BadInput(
            f"{self.label}: its rows cancel out or the product leaves nothing of them, so every "
            "train row would score 0; give it other rows, or another product"
        )


def source_name(source: FeatureSource) -> str:
    """Return the name error messages use for a source: its generation's name, if it has one."""
    return str(getattr(source, "name", "unnamed"))


def split_rows(name: str, rows: int, sizes: Sequence[int]) -> list[Subtask]:
    """Split one target set into consecutive sub-tasks.

    Args:
        name: of the set, for messages.
        rows: of the set.
        sizes: rows per sub-task.

    Raises:
        BadInput: a size that is no whole number >= 1, or sizes that do not add up to `rows`.

    Examples:
        >>> [(s.start, s.stop) for s in split_rows("dev", 5, [2, 3])]
        [(0, 2), (2, 5)]
    """
    try:
        whole = [operator.index(size) for size in sizes]
    except TypeError:
        whole = []
    if not whole or min(whole) < 1:
        raise BadInput(f"sub-task sizes {sizes!r} must be a list of whole numbers >= 1")
    if sum(whole) != rows:
        raise BadInput(
            f"sub-task sizes {whole} add up to {sum(whole)}, but target set {name} has {rows} "
            "rows; give sizes that add up to them"
        )
    stops = np.cumsum(whole).tolist()
    return [
        Subtask(0, stop - size, stop, f"sub-task {index} (rows {stop - size}-{stop - 1} of {name})")
        for index, (size, stop) in enumerate(zip(whole, stops, strict=True))
    ]


def subtasks_of(targets: Sequence[FeatureSource], sizes: Sequence[int] | None) -> list[Subtask]:
    """Make each target set a sub-task, or split a single set into `sizes`.

    Raises:
        BadInput: `sizes` with several sets, or sizes that do not fit.
    """
    if sizes is None:
        return [
            Subtask(index, 0, source.rows, f"sub-task {index} ({source_name(source)})")
            for index, source in enumerate(targets)
        ]
    if len(targets) != 1:
        raise BadInput(
            f"sub-task sizes given with {len(targets)} target sets; sizes cut a single set, "
            "several sets are one sub-task each"
        )
    return split_rows(source_name(targets[0]), targets[0].rows, sizes)


def usable_everywhere(sources: Iterable[FeatureSource]) -> npt.NDArray[np.bool_]:
    """Return a (rows,) bool mask of the rows that are usable in every source."""
    usable = [np.asarray(source.usable, dtype=bool) for source in sources]
    return np.asarray(np.logical_and.reduce(usable), dtype=bool)


def unit_blocks(
    source: FeatureSource, usable: npt.NDArray[np.bool_], start: int, stop: int
) -> Iterator[tuple[npt.NDArray[np.int64], _Rows]]:
    """Yield the usable rows of [start, stop), m a block: (m,) their numbers, (m, d) unit rows.

    Raises:
        BadInput: a row marked usable that has no direction.
    """
    for low in range(start, stop, BLOCK_ROWS):
        high = min(low + BLOCK_ROWS, stop)
        here = np.flatnonzero(usable[low:high])
        directions, codes = unit_rows(source.read(low, high)[here])
        if (codes != RowStatus.OK).any():
            row = low + int(here[np.flatnonzero(codes != RowStatus.OK)[0]])
            raise BadInput(
                f"row {row} of target set {source_name(source)} is marked usable but its "
                "feature is zero or not finite; export this target set again"
            )
        yield low + here, directions


def subtask_queries(
    targets: Sequence[FeatureSource],
    subtasks: Sequence[Subtask],
    usable: Sequence[npt.NDArray[np.bool_]],
    as_queries: Callable[[_Rows, _Rows], _Rows] | None = None,
) -> npt.NDArray[np.float64]:
    """Compute the directions of all sub-tasks at one checkpoint.

    Args:
        targets: the checkpoint's target sets.
        subtasks: q of them.
        usable: per target set, (rows,) bool: rows usable at every combined checkpoint.
        as_queries: (unit rows (m, d), their norms (m,)) -> (m, d), before the mean is taken; None
            takes unit rows as they are.

    Returns:
        (q, d) float64, row s the mean of the queries of sub-task s.

    Raises:
        BadInput: a sub-task without a usable row, or a row marked usable that has no direction.
    """
    queries = np.zeros((len(subtasks), targets[0].dim))
    for index, subtask in enumerate(subtasks):
        source = targets[subtask.target]
        kept = np.flatnonzero(usable[subtask.target][subtask.start : subtask.stop])
        if kept.size == 0:
            raise subtask.no_usable_row()
        norms = getattr(source, "norm", None)
        mask = usable[subtask.target]
        for rows, directions in unit_blocks(source, mask, subtask.start, subtask.stop):
            if as_queries is not None:
                lengths = np.ones(rows.size) if norms is None else norms[rows]
                directions = as_queries(directions, np.asarray(lengths, dtype=np.float64))
            queries[index] += directions.sum(axis=0)
        queries[index] /= kept.size
    return queries
