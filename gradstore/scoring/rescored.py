"""Ranking again: candidates of one store by the more exact rows of another.

Letters: n train rows, k rows taken, m candidates.

A store of few bits a coordinate ranks all rows cheaply; rows near the cut are then told apart by a
second store of the same rows at the same checkpoints, of which the candidates alone are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.provenance import compare
from gradstore.scoring.choose import Choice, TrainRows
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import Aggregation, Scores, influence_scores
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.quotas import Limits
from gradstore.scoring.selection import select_top
from gradstore.scoring.some_rows import SomeRows
from gradstore.store.generation import Generation

#: Candidates for each row taken.
FACTOR = 1.5
_SHOWN = 20


@dataclass(frozen=True)
class Reranked:
    """Rows taken by the second store's scores.

    Attributes:
        rows: (k,) int64, best first by the second store; ties go to the lower row.
        values: (n,) float32, the second store's score of each candidate; nan elsewhere.
        candidates: (m,) int64, ascending.
        moved: how many of `rows` the first store alone would not have taken.
    """

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    candidates: npt.NDArray[np.int64]
    moved: int


def check_factor(factor: object) -> float:
    """Return a number of candidates for each row taken.

    Raises:
        BadInput: it is no finite number of at least 1.
    """
    number = isinstance(factor, Real) and not isinstance(factor, bool)
    if not number or not math.isfinite(float(factor)) or float(factor) < 1:  # type: ignore[arg-type]
        raise BadInput(f"rerank factor is {factor!r}; give a number of at least 1, such as 1.5.")
    return float(factor)  # type: ignore[arg-type]


def check_rerank(choice: Choice, product: InnerProduct = COSINE) -> None:
    """Refuse a choice that needs more than the candidates of the second store.

    Raises:
        BadInput: another rule than `top`, a correction for length, or the preconditioner `fisher`.
    """
    if choice.rule.name != "top":
        raise BadInput(
            f"rerank needs the subset 'top', not {choice.rule.name!r}, which looks at more than "
            "the best scores; leave the subset out, or take it from the second store alone."
        )
    if choice.length != "none":
        raise BadInput(
            f"length correction {choice.length!r} is fitted to the scores of all rows, of which a "
            "rerank has only the candidates' exactly; leave one of them out."
        )
    if product.metric.of_train_rows:
        raise BadInput(
            f"preconditioner: {product.preconditioner} is made of all rows of a store, so a rerank "
            "would read the second store whole; score that one alone."
        )


def check_same_rows(
    first: Sequence[CheckpointFeatures], second: Sequence[CheckpointFeatures]
) -> None:
    """Check that two stores hold the same rows of the same run, in whatever dtype.

    Args:
        first: generations of the store that ranks all rows.
        second: those of the other, of the same sets at the same checkpoints.

    Raises:
        ProvenanceMismatch: steps, sets, row hashes, projection, model, kind of feature or any other
            field of the provenance but the dtype differ; the message lists every difference.
    """
    lines = list(_differences(first, second))
    if lines:
        shown = lines[:_SHOWN]
        if len(lines) > _SHOWN:
            shown.append(f"... and {len(lines) - _SHOWN:,} more differences")
        raise ProvenanceMismatch(
            "\n  ".join(["the second store can't rank these rows again:", *shown])
            + "\nGive a store of the same run and rows, exported with another dtype alone.",
            lines,
        )


def _differences(
    first: Sequence[CheckpointFeatures], second: Sequence[CheckpointFeatures]
) -> Iterator[str]:
    steps = [[pair.train.step for pair in pairs] for pairs in (first, second)]  # type: ignore[attr-defined]
    if steps[0] != steps[1]:
        yield f"checkpoints differ: steps {steps[0]} and {steps[1]}"
        return
    for mine, theirs in zip(first, second, strict=True):
        pairs = zip((mine.train, *mine.targets), (theirs.train, *theirs.targets), strict=True)
        for one, other in pairs:
            yield from _of_generation(one, other)  # type: ignore[arg-type]


def _of_generation(mine: Generation, theirs: Generation) -> Iterator[str]:
    """Describe what two generations, of any dtypes, differ in."""
    told = [
        {
            "dim": each.dim,
            "space": each.space,
            "learning_rate": each.record.learning_rate,
            "provenance": {k: v for k, v in each.provenance.items() if k != "dtype"},
            **each.record.identity(),
        }
        for each in (mine, theirs)
    ]
    for one in compare(*told):
        yield one.note or (
            f"{mine.name}: {one.field} differs: {one.stored!r} and {one.current!r} in the second"
        )
    if mine.rows != theirs.rows:
        yield f"{mine.name}: rows differ: {mine.rows:,} and {theirs.rows:,} in the second"
        return
    other = np.flatnonzero((mine.row_hash != theirs.row_hash).any(axis=1))
    if other.size:
        yield (
            f"{mine.name}: {other.size:,} of {mine.rows:,} rows are others in the second, the "
            f"first of them row {other[0]}"
        )


def _candidates(
    own: npt.NDArray[np.int64],
    choice: Choice,
    scores: npt.NDArray[np.floating],
    train: TrainRows,
    *,
    usable: npt.NDArray[np.bool_],
    factor: float,
) -> npt.NDArray[np.int64]:
    """Find the rows to rank again: the choice's own, and those of a budget `factor` times as large.

    Quotas are as many times as large too. Of a token budget the last candidate is the one that
    reaches it.

    Returns:
        (m,) int64 rows, ascending.
    """
    allowed = usable & ~np.isnan(scores)
    order = select_top(scores, int(allowed.sum()), usable=allowed)
    limits = choice.limits(train, choice.most_rows(usable, train))
    if limits is not None:
        wider = np.ceil(limits.most * factor).astype(np.int64)
        order = Limits(limits.of_row, wider).within(order)
    if choice.tokens is None:
        count = math.ceil(factor * len(own))
    else:
        total = np.cumsum(train.tokens[order], dtype=np.int64)
        count = int(np.searchsorted(total, factor * choice.tokens)) + 1
    return np.union1d(own, order[:count])


def rerank(
    choice: Choice,
    scores: Scores,
    second: Sequence[CheckpointFeatures],
    *,
    factor: float = FACTOR,
    subtask_sizes: Sequence[int] | None = None,
    aggregation: Aggregation = "max",
    product: InnerProduct = COSINE,
    on_rows: Callable[[int], None] | None = None,
) -> Reranked:
    """Take rows by a second store's scores of the first one's best.

    A candidate's score is the one that `influence_scores(second)` gives it, on a CPU to the last
    bit: the same sum over checkpoints and the same aggregation over sub-tasks. A row that the first
    store does not place among the candidates is not found, whatever the second would say of it.

    Args:
        choice: budget and quotas, with the rule `top`.
        scores: of all rows, by the first store.
        second: the same rows and sets at the same checkpoints (`check_same_rows`).
        factor: candidates for each row taken, at least 1.
        subtask_sizes: as for `influence_scores`.
        aggregation: as for `influence_scores`.
        product: as for `influence_scores`, without `fisher`.
        on_rows: called with the number of candidates just scored.

    Raises:
        BadInput: what `check_rerank` refuses, a factor below 1, scores of other rows, or a choice
            that the rows usable in both stores can't give.
        DamagedData: a chunk that holds a candidate is not the committed one.
    """
    check_rerank(choice, product)
    factor = check_factor(factor)
    train: Generation = second[-1].train  # type: ignore[assignment]
    if len(scores.values) != train.rows:
        raise BadInput(f"{len(scores.values)} scores are given for {train.rows} rows; give both of "
                       "the same rows.")  # fmt: skip
    usable = np.logical_and.reduce([scores.usable, *(pair.train.usable for pair in second)])
    if choice.fraction is not None:
        choice = replace(choice, fraction=None, count=choice.most_rows(usable, train))
    own = choice.rows(scores.values, None, train, usable=usable)
    rows = _candidates(own, choice, scores.values, train, usable=usable, factor=factor)
    again = influence_scores(
        [CheckpointFeatures(SomeRows(pair.train, rows), pair.targets, pair.weight)
         for pair in second],
        subtask_sizes=subtask_sizes, aggregation=aggregation, on_rows=on_rows, product=product,
    )  # fmt: skip
    values = np.full(train.rows, np.nan, dtype=np.float32)
    values[rows] = again.values
    taken = choice.rows(values, None, train, usable=~np.isnan(values))
    return Reranked(taken, values, rows, len(np.setdiff1d(taken, own)))
