"""LESS: rows whose gradients point where the target's gradients point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Count
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import UpdateContext
from dataflex.selectors.by_influence import InfluenceSelector
from dataflex.selectors.rerank import check_rule
from dataflex.selectors.row_scores import RowScores
from dataflex.selectors.subset_rule import SubsetRule
from gradstore.scoring.influence import Aggregation
from gradstore.scoring.rules import Subset

if TYPE_CHECKING:
    from gradstore.scoring.comparable import CheckpointFeatures


@register("selector", "less")
class LessSelector(InfluenceSelector):
    """Selector of the rows with the largest cosine influence on the target.

    Args:
        aggregation: over sub-tasks of the target, max or mean.
        subset: rule that turns scores into rows, top, round_robin, knn_uniform, transport,
            facility_location or drop_harmful: docs/subset.md.
        neighbours: rows that a target row names, of knn_uniform; null finds them.
        subset_params: constants of the rule by name, in the place of its own: docs/subset.md.
        quotas: the most rows an update takes of a data set, by name, or a share between 0 and 1.
        influence: as for `InfluenceSelector`.
    """

    paper = "Xia et al. 2024, LESS: Selecting Influential Data, arXiv:2402.04333"

    def __init__(
        self,
        aggregation: Aggregation = "max",
        subset: Subset = "top",
        neighbours: Count | None = None,
        subset_params: Mapping[str, float] | None = None,
        quotas: Mapping[str, int | float] | None = None,
        **influence: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**influence)
        self.aggregation = aggregation
        self.rule = SubsetRule(subset, neighbours, quotas or {}, subset_params or {})
        check_rule(self.rerank, self.rule)

    def check_count(self, count: int, data: RunData) -> None:
        """Refuse, before the model is loaded, rows that can't be answered or chosen by the rule."""
        super().check_count(count, data)
        self.rule.check_count(count, data, unique=self.unique)

    def score(
        self, checkpoints: Sequence[CheckpointFeatures], count: int, context: UpdateContext
    ) -> RowScores:
        """Score as `fold` does, without keeping the influence on every sub-task."""
        from gradstore.scoring.influence import influence_scores

        scores = influence_scores(
            checkpoints,
            subtask_sizes=self.subtask_sizes(context.run),
            aggregation=self.aggregation,
            product=self.product,
        )
        best = scores.best_subtask if self.aggregation == "max" else None
        return RowScores(scores.values, scores.usable, scores.skipped, best)

    def best_of(
        self, influence: npt.NDArray[np.floating[Any]]
    ) -> npt.NDArray[np.integer[Any]] | None:
        """Return the sub-task (n,) of the largest influence, where the largest counts."""
        if self.aggregation != "max":
            return None
        return np.asarray(np.nan_to_num(influence, nan=-np.inf).argmax(axis=1))

    def fold(
        self,
        influence: npt.NDArray[np.floating[Any]],
        candidates: npt.NDArray[np.bool_],
        count: int,
    ) -> npt.NDArray[np.floating[Any]]:
        """Reduce (n, q) to (n,): the largest, or the mean, over sub-tasks."""
        over = np.max if self.aggregation == "max" else np.mean
        return np.asarray(over(influence, axis=1))
