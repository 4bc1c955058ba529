"""Questions to the store: scores of all training rows, once per question and commit.

Letters: n train rows.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.scoring.best_rows import StoredTable, usable_targets
from gradstore.scoring.choose import Choice
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features, parse_which
from gradstore.scoring.query import query_influence
from gradstore.scoring.rules import Rule
from gradstore.scoring.selection import select_top
from gradstore.serve.forms import Budget, Question
from gradstore.serve.jobs import Desk
from gradstore.store.generation import Generation
from gradstore.store.reader import Store


@dataclass(frozen=True)
class RowScores:
    """Scores of all rows of a training generation.

    Attributes:
        key: names question and commits.
        train: the newest generation of the training rows.
        targets: the target generations of the same checkpoint.
        values: (n,) float32; nan where a row is not usable.
        best_subtask: (n,) int32, -1 where there is none.
        skipped: number of unusable rows by reason.
    """

    key: Hashable
    train: Generation
    targets: tuple[Generation, ...]
    values: npt.NDArray[np.float32]
    best_subtask: npt.NDArray[np.int32]
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) bool."""
        return ~np.isnan(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return self.values.nbytes + self.best_subtask.nbytes


def pairs_of(store: Store, question: Question) -> list[CheckpointFeatures]:
    """Pair the generations that a question is about; raises as `checkpoint_features` does."""
    return checkpoint_features(
        store,
        parse_which(question.checkpoints),
        run=question.run,
        targets=question.target or None,
        until=question.step,
    )


def scores_of(store: Store, question: Question, desk: Desk, wait: float) -> RowScores:
    """Return the scores of all training rows, computed or kept.

    Args:
        store: at its newest commit.
        question: what they are asked by.
        desk: where it is computed.
        wait: seconds.

    Raises:
        StillRunning: it takes longer than `wait`.
        TooMany: too many scans wait.
        BadInput: as for `influence_scores` and `query_influence`.
        ProvenanceMismatch: as there.
    """
    pairs = pairs_of(store, question)
    _check_target_row(pairs, question)
    commits = tuple(
        (each.commit_sha, pair.weight)  # type: ignore[attr-defined]
        for pair in pairs
        for each in (pair.train, *pair.targets)
    )
    key = ("score", commits, question.target_row, tuple(question.subtasks), question.aggregation)

    def compute(on_rows: Callable[[int], None]) -> RowScores:
        return _score(key, pairs, question, on_rows)

    return desk.ask(key, "score", pairs[-1].train.rows, compute, wait)


def _check_target_row(pairs: list[CheckpointFeatures], question: Question) -> None:
    """Refuse a target row that there is not before a job is made of it."""
    if question.target_row is None:
        return
    if question.subtasks:
        raise BadInput("target_row and subtasks are both given; ask by one row, or by sub-tasks.")
    first = pairs[-1].targets[0]
    if question.target_row >= first.rows:
        raise BadInput(
            f"target row {question.target_row} requested, the set has rows 0-{first.rows - 1}; "
            "name one of them"
        )


def _score(
    key: Hashable,
    pairs: list[CheckpointFeatures],
    question: Question,
    on_rows: Callable[[int], None],
) -> RowScores:
    train: Any = pairs[-1].train
    targets: Any = pairs[-1].targets
    if question.target_row is not None:
        one = query_influence(pairs, question.target_row, top=1, on_rows=on_rows)
        best = np.where(one.usable, 0, -1).astype(np.int32)
        return RowScores(key, train, targets[:1], one.values, best, one.skipped)
    found = influence_scores(
        pairs,
        subtask_sizes=question.subtasks or None,
        aggregation=question.aggregation,
        on_rows=on_rows,
    )
    return RowScores(key, train, targets, found.values, found.best_subtask, found.skipped)


def sides(scores: RowScores, top: int) -> tuple[list[int], list[int]]:
    """Return the rows that helped most and those that hurt most, at most `top` each."""
    usable = scores.usable
    count = min(top, int(usable.sum()))
    helped = select_top(scores.values, count, usable=usable)
    hurt = select_top(-scores.values, count, usable=usable)
    return helped.tolist(), hurt.tolist()


#: Names of a selection's budget: those of Python, and the first ones of this API.
_BUDGETS = ("k", "count", "fraction", "token_budget", "tokens")


def choice_of(budget: Budget) -> Choice:
    """Return the choice that a form asks for.

    Raises:
        BadInput: not exactly one budget, or parameters that do not go with the rule.
    """
    given = [n for n in _BUDGETS if getattr(budget, n) is not None]
    rule = Rule(budget.subset, budget.neighbours, budget.subset_params)
    if len(given) > 1 or (not given and budget.subset != "drop_harmful"):
        raise BadInput(
            f"the selection has {' and '.join(given) or 'no budget'}; give exactly one of k (or "
            "count), fraction, token_budget (or tokens)."
        )
    if rule.per_target and budget.target_row is not None:
        raise BadInput(
            f"subset is {budget.subset!r}, which asks each target row, but target_row "
            f"{budget.target_row} asks one alone; leave one of them out."
        )
    return Choice(
        rule,
        budget.count if budget.k is None else budget.k,
        budget.fraction,
        budget.tokens if budget.token_budget is None else budget.token_budget,
        budget.quotas,
        budget.length_correction,
    )


def check(store: Store, budget: Budget) -> None:
    """Refuse a selection that cannot be made, before anything is scored (BadInput)."""
    pairs = pairs_of(store, budget)
    train: Any = pairs[-1].train
    choice_of(budget).check(train, len(usable_targets(pairs)))


def chosen(store: Store, scores: RowScores, budget: Budget, desk: Desk, wait: float) -> list[int]:
    """Return the rows of a selection, first the first choice, computed or kept.

    A rule that looks at each target row alone is a job of its own: it reads the store once more.

    Raises:
        StillRunning: it takes longer than `wait`.
        TooMany: too many scans wait.
        BadInput: as for `choice_of`, or a selection that cannot be made.
    """
    choice = choice_of(budget)

    def rows(table: StoredTable | None) -> npt.NDArray[np.int64]:
        return choice.rows(scores.values, table, scores.train, usable=scores.usable)

    if not choice.rule.per_target:
        return [int(row) for row in rows(None)]
    pairs = pairs_of(store, budget)

    def compute(on_rows: Callable[[int], None]) -> npt.NDArray[np.int64]:
        return rows(StoredTable(pairs, on_rows=on_rows))

    key = ("select", scores.key, budget.model_dump_json())
    found = desk.ask(key, "select", scores.train.rows, compute, wait)
    return [int(row) for row in found]


def histogram(scores: RowScores, bins: int) -> dict[str, list[float] | list[int]]:
    """Count the usable rows' scores in equal bins: {"edges": (bins + 1), "counts": (bins)}."""
    counts, edges = np.histogram(scores.values[scores.usable].astype(np.float64), bins=bins)
    return {"edges": edges.tolist(), "counts": counts.tolist()}
