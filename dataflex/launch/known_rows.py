"""Metrics of scores that need no retraining: against a replay's table, or rows that were planted.

Letters: n training rows, q queries, q' of them that are scored, g targets of a table, m rows that a
table has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import SOURCE_ROW, Rows, RunData, as_numbers
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.evaluation import (
    Estimate,
    average_precision,
    mean_reciprocal_rank,
    ndcg_at_k,
    overlap_at,
    rank_correlation,
    recall_at_k,
)

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

#: Against exact scores, and against rows that are marked.
EXACT = ("spearman", "ndcg", "overlap")
PLANTED = ("recall", "mrr", "auprc")


@dataclass(frozen=True)
class Truth:
    """Exact scores of a replay.

    Attributes:
        scores: (g, m).
        rows: (m,) training rows that were trained on.
        members: for each target, which of the run's queries it is the mean of.
    """

    scores: Floats
    rows: Positions
    members: tuple[Positions, ...]


def read_truth(path: Path, data: RunData, queries: npt.NDArray[np.bool_]) -> Truth:
    """Read what `gradstore replay -o` wrote.

    Args:
        path: a .parquet file.
        data: rows of the run.
        queries: of its target rows, all sets in a row, those that are queries.

    Raises:
        BadInput: it is no such table, or has a target that the run has not.
        ProvenanceMismatch: it is of other training rows.
    """
    import pyarrow.parquet as pq

    try:
        held = pq.read_table(path).to_pydict()
        names, positions = held["target"], held["target_row"]
        rows, times, hashes, scores = (held[k] for k in ("row", "times", "row_hash", "score"))
    except (OSError, ValueError, KeyError) as error:
        raise BadInput(
            f'"{path}" cannot be read as a table of `gradstore replay -o`: {error}'
        ) from error
    ours = data.train.row_set.hashes
    if any(row >= len(ours) or bytes(ours[row]).hex() != hashes[i] for i, row in enumerate(rows)):
        raise ProvenanceMismatch(
            f'"{path}" is the replay of other training rows; replay the configuration given here'
        )
    found: dict[tuple[str, int | None], dict[int, float]] = {}
    for name, position, row, time, score in zip(names, positions, rows, times, scores, strict=True):
        if time > 0:  # the others have no influence, whatever they are
            found.setdefault((name, position), {})[row] = score
    if not found or len({tuple(each) for each in found.values()}) > 1:
        raise BadInput(f'"{path}" has no row that was trained on, or not the same for each target')
    members = tuple(_members(path, name, position, data, queries) for name, position in found)
    listed = next(iter(found.values()))
    return Truth(
        np.array([list(each.values()) for each in found.values()]),
        np.array(list(listed), dtype=np.int64),
        members,
    )


def _members(
    path: Path, name: str, position: int | None, data: RunData, queries: npt.NDArray[np.bool_]
) -> Positions:
    """Return the numbers of the queries of a target set, or the one of its row."""
    start = 0
    for rows in data.targets:
        if rows.name == name:
            mine = np.zeros(len(queries), dtype=bool)
            mine[start : start + len(rows)] = True
            if position is not None:
                mine &= np.arange(len(queries)) == start + position
            if (queries & mine).any():
                return np.flatnonzero((queries & mine)[queries])
        start += len(rows)
    row = "" if position is None else f" row {position}"
    raise BadInput(f'"{path}" has target {name!r}{row}, which the configuration does not have')


def against_exact(
    metric: str, truth: Truth, scores: Floats, scored: Positions, *, k: int, share: float
) -> Estimate:
    """Compare scores with a replay's, on the rows that it trained on.

    Args:
        metric: of `EXACT`.
        truth: the replay.
        scores: (q', n).
        scored: (q',) their queries; a target of several takes the mean of theirs.
        k: of ndcg.
        share: of overlap.

    Raises:
        BadInput: no target of the table was scored; what the metric refuses.
    """
    kept, cheap = [], []
    for number, members in enumerate(truth.members):
        if (of_target := np.isin(scored, members)).any():
            kept.append(number)
            cheap.append(scores[of_target][:, truth.rows].mean(axis=0))
    if not kept:
        raise BadInput("no target of the replay was scored; give scores of the same target sets.")
    given, exact = np.stack(cheap), truth.scores[kept]
    if metric == "spearman":
        return rank_correlation(given, exact)
    if metric == "ndcg":
        return ndcg_at_k(given, exact, k)
    return overlap_at(given, exact, share)


def planted_rows(
    data: RunData, column: str, queries: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """Return which training rows are planted for each query, (q, n), by a column of the files.

    A column of text, not of numbers, matches: planted for a query are the training rows with the
    query's own text, such as the name of the fact that both are about. One of numbers marks: every
    row with a number other than 0, or true, is planted for every query, and target rows need no
    such column.

    Args:
        data: rows of the run.
        column: of the data sets' files.
        queries: of its target rows, all sets in a row, those that are queries.

    Raises:
        BadInput: there is no such column, where the rows come from is unknown, or a query has a
            text that no training row has.
    """
    held = _column(data, data.train, column)
    if not any(isinstance(value, str) and not _is_number(value) for value in held):
        values = np.array(as_numbers(held, f"column {column!r} of the training rows"))
        return np.broadcast_to(
            np.isfinite(values) & (values != 0), (int(queries.sum()), len(values))
        )
    stating: dict[str, list[int]] = {}
    for row, value in enumerate(held):
        if isinstance(value, str):
            stating.setdefault(value, []).append(row)
    asked = [(source, value) for rows in data.targets
             for source, value in zip(rows.sources or (), _column(data, rows, column), strict=True)
             ]  # fmt: skip
    found = np.zeros((int(queries.sum()), len(held)), dtype=np.bool_)
    for marks, number in zip(found, np.flatnonzero(queries), strict=True):
        (name, row), value = asked[number]
        if not isinstance(value, str) or value not in stating:
            raise BadInput(
                f"target row {row} of data set {name!r} has {value!r} in column {column!r}, which "
                "no training row has, so nothing is planted for it; take it out of that file, or "
                "set target_dataset to sets of planted facts."
            )
        marks[stating[value]] = True
    return found


def _column(data: RunData, rows: Rows, column: str) -> list[Any]:
    """Read a column of the files that rows come from, (n,); None where a row has no value."""
    what = "the training rows" if rows is data.train else f"target set {rows.name!r}"
    if rows.sources is None:
        raise BadInput(
            f"--planted {column} is a column of the data sets' files, and {what} do not say which "
            "rows of them they are: remove tokenized_path and packing."
        )
    found: dict[str, dict[int, Any]] = {}
    for name in {name for name, _ in rows.sources}:
        file = data.files[name]
        if column not in file.column_names:
            have = ", ".join(sorted(c for c in file.column_names if c != SOURCE_ROW))
            raise BadInput(
                f"data set {name!r} of {what} has no column {column!r}; its columns are {have}. "
                "Name one of them in --planted."
            )
        found[name] = dict(zip(file[SOURCE_ROW][:], file[column][:], strict=True))
    return [found[name][row] for name, row in rows.sources]


def against_planted(
    metric: str, planted: npt.NDArray[np.bool_], scores: Floats, *, k: int
) -> Estimate:
    """Say how high scores (q', n) rank planted rows (q', n), by a metric of `PLANTED`."""
    if metric == "recall":
        return recall_at_k(scores, planted, k)
    if metric == "mrr":
        return mean_reciprocal_rank(scores, planted)
    return average_precision(scores, planted)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
