"""The contract of selectors: the rows of the next interval."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RunData
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.strategy import Strategy
from gradstore.errors import BadInput

__all__ = ["RunContext", "Selection", "Selector", "StoreSelector", "UpdateContext", "ask"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Selection:
    """A selector's answer.

    Attributes:
        indices: (m,) int64, positions in the training set, distinct unless rows ran short.
        scores: (m,) in the order of `indices`, or None where the strategy has no score.
        target_rows: target rows used.
        tokens: tokens of the passes that were made.
        export_seconds: time in forward and backward passes.
        score_seconds: time in turning their results into scores.
        select_seconds: time in choosing rows from the scores.
        skipped: rows that could not be scored, by status.
        numbers: what the Trainer's log gets beside the scores' range, name -> value.
        manifest: what the scores depend on, for `selections/step_<g>.json`.
    """

    indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating[Any]] | None = None
    target_rows: int = 0
    tokens: int = 0
    export_seconds: float = 0.0
    score_seconds: float = 0.0
    select_seconds: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


def ask(
    selector: Selector, count: int, context: UpdateContext, name: str, *, exact: bool
) -> Selection:
    """Ask a selector on every rank, so that passes are shared, and return rank 0's answer.

    Args:
        selector: the strategy.
        count: rows asked for.
        context: what it may look at.
        name: what the user calls it, for messages.
        exact: whether rows are trained on as answered; another number of them is warned of then.

    Raises:
        BadInput: the answer is no `Selection`.
    """
    ranks = context.run.ranks
    if selector.unique is True:
        first = context.run.data.train.first_of_copies(context.candidates)
        context = replace(context, pool=first)
    answer = ranks.gather(lambda: selector.select(count, context))[0]
    if not isinstance(answer, Selection):
        raise BadInput(
            f"{name} answered a {type(answer).__name__}; expected a dataflex.api.Selection."
        )
    answered = len(answer.indices)
    if exact and answered != count and ranks.leads:
        what = "they are repeated" if answered < count else "some of them are not used for training"
        _log.warning("%s returned %d rows, %d were requested: %s", name, answered, count, what)
    return answer


class Selector(Strategy):
    """Base of all selectors; a user's own class may subclass it or just look like it."""

    required = "select"
    #: Never answers a row twice: asked for more rows than are usable, a run is refused.
    distinct: bool = False
    #: Of rows that are copies of one another, only the first may be chosen.
    unique: bool = False
    #: Meant for an update at every step: its records and lines on the screen come as often as the
    #: Trainer's log lines, not with every answer.
    every_step: bool = False

    def check_count(self, count: int, data: RunData) -> None:
        """Refuse, before the model is loaded, more rows an update than can be answered."""
        from gradstore.scoring.selection import check_k

        if not self.distinct:
            return
        usable = np.flatnonzero(data.train.target_tokens > 0)
        check_k(count, len(usable), len(data.train))
        if self.unique is True and count > (left := len(data.train.first_of_copies(usable))):
            raise BadInput(
                f"{count} rows an update are requested, but only {left} of {len(usable)} usable "
                "rows are no copies of another. Lower update_step, or set component_params.unique: "
                "false."
            )

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Choose `count` rows of `context.candidates` for the next interval.

        Of more rows some are not trained on, fewer are repeated; either is warned of.
        Called on every rank; rank 0's answer counts.
        """
        raise TypeError(f"{type(self).__name__} does not implement select(count, context)")


class StoreSelector(Selector):
    """Base of the selectors that keep a store open, by a service, from `start` to `finish`."""

    _service: Any = None

    def finish(self) -> None:
        """Release the store."""
        if self._service is not None:
            self._service.close()
            self._service = None
