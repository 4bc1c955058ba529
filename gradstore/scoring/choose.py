"""A choice of rows: one rule, one budget, quotas; the one door that every caller goes through.

Letters: n train rows, t target rows, k chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect_whole
from gradstore.scoring.best_rows import StoredTable, TargetTable, usable_targets
from gradstore.scoring.comparable import CheckpointFeatures, check_checkpoints
from gradstore.scoring.influence import Aggregation, influence_scores
from gradstore.scoring.length_bias import check_correction, without_length
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.quotas import Limits, check_room, most_rows_within, within_tokens
from gradstore.scoring.rules import Rule, Subset
from gradstore.scoring.selection import check_k, rows_for_fraction
from gradstore.scoring.subset import drop_harmful


class TrainRows(Protocol):
    """Facts of the train rows that a budget needs; a store's `Generation` is one."""

    @property
    def rows(self) -> int:
        """Number of rows, n."""

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) bool, rows that may be compared."""

    @property
    def tokens(self) -> npt.NDArray[np.integer[Any]]:
        """(n,) target tokens."""

    @property
    def sources(self) -> Sequence[tuple[str, int]] | None:
        """Data set and row number of each row."""


@dataclass(frozen=True)
class Choice:
    """A rule within one of three budgets and quotas; `drop_harmful` may do without a budget.

    Attributes:
        rule: how rows are chosen.
        count: rows to take.
        fraction: share of the usable rows.
        tokens: target tokens of all rows taken.
        quotas: the most rows of a data set by name, or a share of the rows taken, between 0 and 1.
        length: correction of the scores for the rows' lengths, one of `CORRECTIONS`; with `top`.

    Raises:
        BadInput: no budget or several, one that no store could keep, or a correction that does not
            go with the rule.
    """

    rule: Rule
    count: int | None = None
    fraction: float | None = None
    tokens: int | None = None
    quotas: Mapping[str, int | float] = field(default_factory=dict)
    length: str = "none"

    def __post_init__(self) -> None:
        """Check everything that can be checked before rows are scored."""
        check_correction(self.length)
        if self.length != "none" and self.rule.name != "top":
            raise BadInput(
                f"length correction is {self.length!r}, but the subset is {self.rule.name!r}: only "
                "'top' ranks by one score a row that can be corrected; leave one of them out."
            )
        budgets = 3 - [self.count, self.fraction, self.tokens].count(None)
        if budgets > 1 or (budgets == 0 and self.rule.name != "drop_harmful"):
            raise BadInput(f"{budgets} budgets are given; give one of count, fraction, tokens.")
        if self.fraction is not None:
            rows_for_fraction(self.fraction, 1)
        if self.tokens is not None:
            expect_whole(self.tokens, "tokens")
        check_quotas(self.quotas, shares=self.count is not None or self.fraction is not None)

    def check(self, train: TrainRows, targets: int) -> None:
        """Raise BadInput for a choice that the rows cannot give, before anything is scored.

        Args:
            train: the train rows.
            targets: t, the usable target rows.
        """
        if (self.tokens is not None or self.length != "none") and not hasattr(train, "tokens"):
            raise BadInput("a token budget and a length correction need the target tokens of each "
                           "row, and these rows have none.")  # fmt: skip
        k = self.most_rows(train.usable, train)
        if self.count is not None or self.fraction is not None:
            check_k(k, int(train.usable.sum()), train.rows)
            self.rule.check(k, targets)
            check_room(k, train.usable, self.limits(train, k))
        elif self.rule.name == "round_robin":  # k is the most that the tokens can be
            self.rule.check(k, targets)
        self.limits(train, k)

    def rows(
        self,
        scores: npt.NDArray[np.floating[Any]],
        table: TargetTable | None,
        train: TrainRows,
        *,
        usable: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int64]:
        """Choose rows, first the first choice; the rules `PER_TARGET` read the table once.

        Args:
            scores: (n,) of the rows for the whole target.
            table: similarities with each target row; needed by the rules `PER_TARGET` alone.
            train: the train rows.
            usable: (n,) bool, rows that may be chosen.

        Raises:
            BadInput: as `Rule.choose`, quotas without the rows' data sets, a token budget below
                the first row's tokens, or one that does not serve every target row in turn.
        """
        if self.length != "none":
            scores = without_length(scores, train.tokens, self.length, usable=usable)
        k = self.most_rows(usable, train)
        limits = self.limits(train, k)
        if self.count is not None or self.fraction is not None:
            return self.rule.choose(k, scores, table, usable=usable, limits=limits)
        if self.rule.name == "drop_harmful":
            rows = drop_harmful(scores, usable=usable, limits=limits)
        else:
            k = k if limits is None else min(k, limits.room(usable))
            rows = self.rule.choose(
                min(k, self.rule.most), scores, table, usable=usable, limits=limits
            )
        if self.tokens is None:
            return rows
        rows = within_tokens(rows, train.tokens, self.tokens)
        if len(rows) == self.rule.most < k:
            self.rule.check(k, 1)
        if table is not None:
            self.rule.check(len(rows), table.targets)
        return rows

    def limits(self, train: TrainRows, k: int) -> Limits | None:
        """Read the quotas of a choice of k rows; None where there are none."""
        if not self.quotas:
            return None
        sources: Sequence[tuple[str, int]] | None = getattr(train, "sources", None)
        if sources is None:
            raise BadInput("quotas need the data set of each row, and these rows have none.")
        return Limits.of([name for name, _ in sources], rows_of_quotas(self.quotas, k))

    def most_rows(self, usable: npt.NDArray[np.bool_], train: TrainRows) -> int:
        """Count the rows that the budget may hold."""
        if self.count is not None:
            return self.count
        if self.fraction is not None:
            return rows_for_fraction(self.fraction, int(usable.sum()))
        if self.tokens is None:
            return int(usable.sum())
        return max(1, most_rows_within(train.tokens[usable], self.tokens))


def check_quotas(quotas: Mapping[str, int | float], *, shares: bool = True) -> None:
    """Raise BadInput for a quota that is no number of rows and no share between 0 and 1."""
    for name, most in quotas.items():
        if isinstance(most, float) and 0 < most < 1:
            if not shares:
                raise BadInput(
                    f"quota of {name!r} is {most}, a share of the rows taken, but their number is "
                    "not given; give a number of rows as the quota."
                )
        else:
            expect_whole(most, f"quota of {name!r}")


def rows_of_quotas(quotas: Mapping[str, int | float], k: int) -> dict[str, int]:
    """Turn shares of k rows into numbers of rows: rounded down, but at least 1."""
    return {
        name: most if isinstance(most, int) else rows_for_fraction(most, k)
        for name, most in quotas.items()
    }


class ChoiceOptions(TypedDict, total=False):
    """The rest of a choice by name, as the options of `gradstore select` have it; all may be None.

    Attributes:
        fraction: share of the usable rows to take, in the place of k.
        token_budget: target tokens of all rows taken, in the place of k.
        quotas: the most rows of a data set, or a share of k between 0 and 1.
        neighbours: rows that a target row names, of knn_uniform; None finds them.
        subset_params: constants of the rule, as of `Rule`.
        length_correction: none, regression or bins: takes the rows' length out of the scores of
            top.
    """

    fraction: float | None
    token_budget: int | None
    quotas: Mapping[str, int | float] | None
    neighbours: int | None
    subset_params: Mapping[str, float] | None
    length_correction: str | None


def select_subset(
    checkpoints: Sequence[CheckpointFeatures],
    k: int | None = None,
    subset: Subset = "top",
    *,
    subtask_sizes: Sequence[int] | None = None,
    aggregation: Aggregation = "max",
    product: InnerProduct = COSINE,
    device: str | torch.device = "cpu",
    on_rows: Callable[[int], None] | None = None,
    **asked: Unpack[ChoiceOptions],
) -> npt.NDArray[np.int64]:
    """Choose train rows by a subset rule: `gradstore select` on features in hand.

    Args:
        checkpoints: features of the same train and target rows at one or more checkpoints.
        k: how many rows; None where another budget is given, or none with `drop_harmful`.
        subset: the rule; those that look at each target row alone read the features twice.
        subtask_sizes: as for `influence_scores`; for the rules that use the aggregated score.
        aggregation: as for `influence_scores`.
        product: of a train row and a target row, in the scores and in the rules by target rows.
        device: where the products are computed.
        on_rows: called with the number of rows just compared, in each pass.
        asked: fraction or token_budget, quotas, neighbours, subset_params and length_correction,
            as of `ChoiceOptions`.

    Returns:
        (k,) int64 distinct rows, in the order of choice.

    Raises:
        BadInput: what `influence_scores` or the rule cannot work with, no budget or several, quotas
            or tokens of rows whose data sets or tokens are not known.
        ProvenanceMismatch: the checkpoints hold different rows, or dims differ.

    Examples:
        >>> from gradstore import CheckpointFeatures, select_subset
        >>> train = np.array([[1, 0.1], [1, 0], [0, 1], [0.1, 1]])
        >>> pair = CheckpointFeatures(train, np.array([[1.0, 0], [0.5, 1]]))
        >>> select_subset([pair], 2).tolist(), select_subset([pair], 2, "round_robin").tolist()
        ([0, 1], [1, 3])
        >>> select_subset([pair], subset="knn_uniform", fraction=0.5, neighbours=1).tolist()
        [1, 3]
    """
    check_checkpoints(checkpoints)
    choice = _choice_of(k, subset, **asked)
    train: Any = checkpoints[-1].train
    choice.check(train, len(usable_targets(checkpoints)))
    table = (
        StoredTable(checkpoints, device=device, on_rows=on_rows, product=product)
        if choice.rule.per_target
        else None
    )
    scores = influence_scores(
        checkpoints, subtask_sizes=subtask_sizes, aggregation=aggregation, device=device,
        on_rows=on_rows, product=product,
    )  # fmt: skip
    return choice.rows(scores.values, table, train, usable=scores.usable)


def _choice_of(
    k: int | None,
    subset: str,
    *,
    fraction: float | None = None,
    token_budget: int | None = None,
    quotas: Mapping[str, int | float] | None = None,
    neighbours: int | None = None,
    subset_params: Mapping[str, float] | None = None,
    length_correction: str | None = None,
) -> Choice:
    """Join what `select_subset` was asked to a choice."""
    rule = Rule(subset, neighbours, subset_params or {})
    return Choice(rule, k, fraction, token_budget, quotas or {}, length_correction or "none")
