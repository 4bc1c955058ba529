"""Subset rules inside a run: which of the scored rows an update takes, and quotas on data sets.

Letters: n training rows, t target rows, m rows of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RunData
from dataflex.run.context import UpdateContext
from dataflex.run.log import progress
from dataflex.selectors.row_scores import RowScores
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from gradstore.scoring.best_rows import TargetTable
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.products import InnerProduct
    from gradstore.scoring.quotas import Limits
    from gradstore.scoring.rules import Rule


@dataclass(frozen=True)
class SubsetRule:
    """The rule that turns scores into the rows of an update.

    Attributes:
        subset: one of `gradstore.scoring.rules.SUBSETS`.
        neighbours: K of knn_uniform; None finds it.
        params: constants of the rule, as of `gradstore.scoring.rules.Rule`.
        quotas: the most rows that an update takes of a data set, or a share of them.

    Raises:
        ValueError: a quota that is no number of rows and no share, neighbours or constants of
            another rule.
    """

    subset: str = "top"
    neighbours: int | None = None
    quotas: Mapping[str, int | float] = field(default_factory=dict)
    params: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check what needs no data."""
        from gradstore.scoring.choose import check_quotas
        from gradstore.scoring.rules import Rule

        if self.neighbours is not None and self.subset != "knn_uniform":
            raise ValueError(
                f"neighbours is {self.neighbours}, but only subset: knn_uniform has neighbours, not"
                f" {self.subset}; leave it out"
            )
        try:
            Rule(self.subset, self.neighbours, self.params)
        except BadInput as error:
            raise ValueError(str(error)) from error
        try:
            check_quotas(self.quotas)
        except BadInput as error:
            raise ValueError(f"quotas: {error}") from error

    @property
    def rule(self) -> Rule:
        """The rule alone."""
        from gradstore.scoring.rules import Rule

        return Rule(self.subset, self.neighbours, self.params)

    @property
    def plain(self) -> bool:
        """The best scores are taken, from any data set."""
        return self.subset == "top" and not self.quotas

    @property
    def per_target(self) -> bool:
        """The rule looks at each target row alone."""
        return self.rule.per_target

    def check_count(self, count: int, data: RunData, *, unique: bool) -> None:
        """Refuse, before the model is loaded, a number of rows that the rule can't choose.

        Raises:
            BadInput: fewer rows than target rows under round_robin, more than facility_location
                takes, a quota of a data set that is not trained on, or quotas that leave fewer.
        """
        from gradstore.scoring.quotas import check_room

        if self.plain:
            return
        targets = sum(int((rows.target_tokens > 0).sum()) for rows in data.targets)
        try:
            self.rule.check(count, targets)
            candidates = np.flatnonzero(data.train.target_tokens > 0)
            if unique:
                candidates = data.train.first_of_copies(candidates)
            usable = np.zeros(len(data.train), dtype=np.bool_)
            usable[candidates] = True
            check_room(count, usable, self.limits(data, count))
        except BadInput as error:
            key = f"quotas {dict(self.quotas)}" if self.quotas else f"subset: {self.subset}"
            raise BadInput(f"component_params, {key}, {count} rows an update: {error}") from error

    def limits(self, data: RunData, count: int) -> Limits | None:
        """Read the quotas of an update of `count` rows; None where there are none."""
        from gradstore.scoring.choose import rows_of_quotas
        from gradstore.scoring.quotas import Limits

        if not self.quotas:
            return None
        if data.train.sources is None:
            raise BadInput("the training rows do not say which data set they are from.")
        names = [name for name, _ in data.train.sources]
        return Limits.of(names, rows_of_quotas(self.quotas, count))

    def rows(
        self,
        count: int,
        scores: npt.NDArray[np.floating[Any]],
        candidates: npt.NDArray[np.bool_],
        table: TargetTable | None,
        data: RunData,
    ) -> npt.NDArray[np.int64]:
        """Choose the rows of an update, first the first choice.

        drop_harmful answers fewer than `count` where fewer help: training repeats them.

        Args:
            count: m.
            scores: (n,) of the rows for the whole target.
            candidates: (n,) bool, rows that may be chosen.
            table: similarities with each target row, where `per_target`.
            data: the run's rows.
        """
        from gradstore.scoring.subset import drop_harmful

        limits = self.limits(data, count)
        if self.subset == "drop_harmful":
            return drop_harmful(scores, usable=candidates, limits=limits)[:count]
        return self.rule.choose(count, scores, table, usable=candidates, limits=limits)

    def stored_rows(
        self,
        count: int,
        scores: RowScores,
        candidates: npt.NDArray[np.bool_],
        checkpoints: Sequence[CheckpointFeatures],
        context: UpdateContext,
        product: InnerProduct | None = None,
    ) -> npt.NDArray[np.int64]:
        """Choose as `rows` does; a rule by target rows reads the stored features once more.

        Its products are the scores' own (None stands for cosines), or those of the scores' table.
        """
        from gradstore.scoring.best_rows import StoredTable
        from gradstore.scoring.products import InnerProduct

        data = context.run.data
        if not self.per_target or scores.table is not None:
            return self.rows(count, scores.values, candidates, scores.table, data)
        what = f"comparison with each target row at step {context.step}"
        with progress(what, len(scores.values), shown=context.run.shows_progress) as advance:
            table = StoredTable(checkpoints, on_rows=advance, product=product or InnerProduct())
            return self.rows(count, scores.values, candidates, table, data)

    def told(self) -> dict[str, Any]:
        """Return all that decides, for a selection's manifest; {} for the best of any data set.

        Names are those of the parameters; one that is left out is the rule's own.
        """
        if self.plain:
            return {}
        told = {"subset": self.subset, "neighbours": self.neighbours,
                "subset_params": dict(self.params), "quotas": dict(self.quotas)}  # fmt: skip
        return {name: value for name, value in told.items() if value}


def rule_of(
    subset: str | None,
    neighbours: int | None,
    quotas: Mapping[str, int | float] | None,
    subset_params: Mapping[str, float] | None,
    *,
    own: str,
) -> SubsetRule | None:
    """Make the rule that a user names in the place of a selector's own; None where none is named.

    Args:
        subset: name of the rule, or None.
        neighbours: as of `SubsetRule`.
        quotas: as of `SubsetRule`.
        subset_params: `params` of `SubsetRule`.
        own: says what the selector does without a rule, for the message.

    Raises:
        ValueError: something is said of a rule, and none is named.
    """
    if subset is not None:
        return SubsetRule(subset, neighbours, quotas or {}, subset_params or {})
    for key, value in {"neighbours": neighbours, "quotas": quotas,
                       "subset_params": subset_params}.items():  # fmt: skip
        if value:
            raise ValueError(
                f"{key} is {value!r}, but {own}; choose a subset such as round_robin, or leave it "
                "out"
            )
    return None
