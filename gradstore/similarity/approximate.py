"""Rows that helped one target row, by lists of near rows: approximate, with the recall stated.

Letters: n train rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect_whole
from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import (
    CHUNK_ROWS,
    combine,
    count_skipped,
    start_codes,
    weighted_queries,
)
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.products import COSINE
from gradstore.scoring.query import RowInfluence, one_row, query_influence
from gradstore.scoring.scan import FeatureSource
from gradstore.scoring.selection import select_top
from gradstore.scoring.some_rows import SomeRows
from gradstore.scoring.subtasks import Subtask
from gradstore.similarity.inverted import InvertedLists, lists_for
from gradstore.similarity.recalls import NEAREST, WIDER, Curve, width

#: Share of the true nearest rows that lists shall find.
RECALL = 0.95


@dataclass(frozen=True)
class Approximate:
    """An answer, and what is known of its errors.

    Attributes:
        answer: rows found; `values` is nan for all train rows that were not looked at.
        recall: share of the true best rows that the lists find, as measured; 1 of an exact answer.
        nprobe: lists looked through; 0 of an exact answer.
        lists: of how many; 0 where there are none.
        says: one line that tells it.
    """

    answer: RowInfluence
    recall: float
    nprobe: int
    lists: int
    says: str


def query_lists(
    checkpoints: Sequence[CheckpointFeatures],
    target_row: int,
    *,
    target: int = 0,
    top: int = 10,
    recall: float = RECALL,
    cache_dir: Path | None = None,
    lists: InvertedLists | None = None,
) -> Approximate:
    """Find the train rows that help one target row and those that hurt it, by lists.

    The lists name 20 rows on each side, 200 where more than 10 are asked for; these are read from
    the store and ranked by their own cosines, which on a CPU are those of `query_influence` to the
    last bit. So a row may be missing, but none has a wrong score or place among those found. Where
    the rows are too few for lists, or these do not reach the recall, the answer is the exact one,
    and says so.

    Args:
        checkpoints: of one checkpoint.
        target_row: row of the target set.
        target: which of the target sets, counted from 0.
        top: how many rows to name on each side, at most 100.
        recall: share of the true best rows to find, above 0 and below 1, as measured on held-out
            training rows and on rows of the target set; a single answer may find more or fewer.
        cache_dir: the store's `index_folder`, where lists are kept.
        lists: those of the train rows' generation, by `InvertedLists.build`, for who asks often;
            None opens them.

    Raises:
        BadInput: several checkpoints, a recall out of range, more than 100 rows, or as for
            `query_influence` and `InvertedLists.build`.
        ProvenanceMismatch: as for `query_influence`.
    """
    one = one_row(checkpoints, target_row, target)
    expect_whole(top, "top")
    _check(checkpoints, target, recall)
    (pair,) = checkpoints
    train: Any = pair.train
    (query,) = weighted_queries(checkpoints, [one], COSINE, torch.device("cpu"))
    found = InvertedLists.build(train, cache_dir) if lists is None else lists
    curve = None if found is None else found.curve(pair.targets[target])
    wide = None if curve is None else width(curve, top, recall)
    if found is None or curve is None or wide is None:
        answer = query_influence(checkpoints, target_row, target=target, top=top)
        return Approximate(answer, 1.0, 0, 0, _why_exact(train, curve, recall))
    measured, nearest = wide
    rows = found.search(np.concatenate([query, -query]), WIDER * nearest, measured.nprobe)
    answer = _among(pair, np.unique(rows[rows >= 0]), one, top)
    share = measured.recall[NEAREST.index(nearest)]
    says = (
        f"recall {share:.2f} of the best {nearest} at nprobe {measured.nprobe} of {found.lists} "
        f"lists, measured on {curve.rows} rows"
    )
    return Approximate(answer, share, measured.nprobe, found.lists, says)


def _check(checkpoints: Sequence[CheckpointFeatures], target: int, recall: object) -> None:
    """Refuse what lists can't answer, before they are made (BadInput)."""
    if isinstance(recall, bool) or not isinstance(recall, int | float) or not 0 < recall < 1:
        raise BadInput(f"recall is {recall!r}; give a number above 0 and below 1, or ask exactly.")
    if len(checkpoints) != 1:
        raise BadInput(
            f"lists hold the rows of one checkpoint, {len(checkpoints)} are asked; take the last "
            "alone, or ask for the exact answer"
        )
    (pair,) = checkpoints
    if not (
        hasattr(pair.train, "commit_sha") and getattr(pair.targets[target], "commit_sha", None)
    ):
        raise BadInput("lists are made of committed generations, not of arrays; ask exactly.")


def _why_exact(train: FeatureSource, curve: Curve | None, recall: float) -> str:
    if curve is None:
        least = next(n for n in itertools.count(1) if lists_for(n))
        usable = int(np.sum(train.usable))
        return f"exact: {usable} usable rows are too few for lists, which need {least}"
    best = min(curve.points[-1].recall)
    return f"exact: the lists find {best:.3f} of the best rows at most, asked {recall:g}"


def _among(
    pair: CheckpointFeatures, rows: npt.NDArray[np.int64], one: Subtask, top: int
) -> RowInfluence:
    """Rank some rows by their stored features."""
    values = np.full(pair.train.rows, np.nan, dtype=np.float32)

    def keep(start: int, stop: int, cosines: npt.NDArray[np.float32]) -> None:
        values[rows[start:stop]] = cosines[:, 0]

    some = CheckpointFeatures(SomeRows(pair.train, rows), pair.targets, pair.weight)
    combine([some], [one], keep, torch.device("cpu"), CHUNK_ROWS)
    count = min(top, int((~np.isnan(values)).sum()))
    every = start_codes([pair.train])
    helped, hurt = select_top(values, count), select_top(-values, count)
    return RowInfluence(values, every == RowStatus.OK, helped, hurt, count_skipped(every))
