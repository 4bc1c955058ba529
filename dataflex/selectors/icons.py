"""ICONS: rows that many tasks would vote for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from annotated_types import MinLen

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Count
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import RunContext
from dataflex.selectors.by_influence import InfluenceSelector
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)


@register("selector", "icons")
class IconsSelector(InfluenceSelector):
    """Take the rows that are among the most influential for the most tasks.

    Each task votes for the rows whose influence on it is in the top share of m of n. Equal votes
    are ordered by the mean over tasks of the row's rank, then by the lower row.

    Args:
        task_boundaries: rows of each task where one target set holds several, in order; null makes
            each of `target_subtasks`, or else each target set, a task.
        influence: as for `InfluenceSelector`.
    """

    paper = (
        "Wu et al. 2025, ICONS: Influence Consensus for Vision-Language Data Selection, "
        "arXiv:2501.00654"
    )

    def __init__(
        self,
        task_boundaries: Annotated[Sequence[Count], MinLen(1)] | None = None,
        **influence: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**influence)
        self.task_boundaries = None if task_boundaries is None else tuple(task_boundaries)

    def check(self, config: RunConfig) -> list[str]:
        """Tasks are named in one way."""
        if self.task_boundaries is None or config.dataflex.target_subtasks is None:
            return []
        return ["task_boundaries and target_subtasks both cut the target set: remove one of them."]

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """The tasks' sizes add up to the one target set."""
        if self.task_boundaries is None:
            if len(data.targets) == 1 and not config.dataflex.target_subtasks:
                _log.warning("icons with a single task chooses as less does; give task_boundaries")
            return
        if len(data.targets) > 1:
            raise BadInput(
                f"task_boundaries cuts one target set, but {len(data.targets)} are named: each is "
                "a task already. Remove task_boundaries."
            )
        rows, total = data.targets[0], sum(self.task_boundaries)
        if total != len(rows):
            raise BadInput(
                f"task_boundaries adds up to {total}, but target set {rows.name!r} has "
                f"{len(rows)} rows."
            )

    def subtask_sizes(self, run: RunContext) -> Sequence[int] | None:
        """The tasks."""
        return self.task_boundaries or super().subtask_sizes(run)

    def fold(
        self,
        influence: npt.NDArray[np.floating[Any]],
        candidates: npt.NDArray[np.bool_],
        count: int,
    ) -> npt.NDArray[np.floating[Any]]:
        """(n, q) -> (n,) votes plus mean rank."""
        scores = np.full(len(influence), np.nan)
        scores[candidates] = consensus(influence[candidates], count)
        return scores


def consensus(influence: npt.NDArray[np.floating[Any]], count: int) -> npt.NDArray[np.float64]:
    """Votes of all tasks, ties parted by rank.

    Args:
        influence: (n, q), finite.
        count: m; a task votes for rows at or above its (1 - m/n) quantile, interpolated linearly.

    Returns:
        (n,) whole votes plus the mean over tasks of the row's rank, from 0 (least) to 1; equal
        influences share a rank. A mean rank of 1 has every vote, so it never passes for one more.
    """
    from scipy.stats import rankdata

    values = np.asarray(influence, dtype=np.float64)
    n = len(values)
    thresholds = np.quantile(values, max(0.0, 1.0 - count / n), axis=0)
    votes = (values >= thresholds).sum(axis=1)
    ranks = rankdata(values, axis=0) - 1
    return np.asarray(votes + ranks.mean(axis=1) / max(n - 1, 1))
