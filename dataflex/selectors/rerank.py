"""A second ranking of a selector's best rows, by whole gradients.

Letters: n training rows, c candidates, q sub-tasks of the target, m rows of an update.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from annotated_types import Gt, Le, Lt

from dataflex.config.parameters import Count, Positive, checked
from dataflex.config.registry import grouped
from dataflex.data.rows import RunData
from dataflex.run.context import RunContext, UpdateContext

if TYPE_CHECKING:
    from dataflex.features.newton import Curvature
    from dataflex.features.settings import FeatureSettings
    from dataflex.run.forecast import Forecast
    from dataflex.selectors.row_scores import RowScores
    from dataflex.selectors.subset_rule import SubsetRule

_log = logging.getLogger(__name__)

#: Settings that only conjugate gradients have.
SOLVER = ("curvature_rows", "damping", "iterations", "tolerance")


@checked
@dataclass(frozen=True)
class Rerank:
    """Settings of the second ranking.

    Args:
        top: share of the rows that may be chosen, the best by the store, that are ranked again;
            never fewer rows than an update takes.
        by: exact, products of whole gradients; or cg, those in the metric of the training rows'
            Gauss-Newton matrix, which conjugate gradients solve for.
        curvature_rows: training rows that the matrix of cg is made of, at most.
        damping: of cg, what is added to the matrix's diagonal as a multiple of its curvature along
            the target's gradient.
        iterations: of cg, products with the matrix at most.
        tolerance: of cg, of the residual relative to the target's gradient.
    """

    top: Annotated[float, Gt(0), Le(1)] = 0.1
    by: Literal["exact", "cg"] = "exact"
    curvature_rows: Count = 256
    damping: Positive = 0.1
    iterations: Count = 100
    tolerance: Annotated[float, Gt(0), Lt(1)] = 1e-3

    def candidates(self, usable: int, count: int) -> int:
        """Return c of so many rows that may be chosen, where an update takes `count`."""
        from gradstore.scoring.selection import rows_for_fraction

        return min(max(rows_for_fraction(self.top, usable), count), usable)

    def best(self, scores: RowScores, count: int, context: UpdateContext) -> npt.NDArray[np.int64]:
        """Return the candidates, (c,) rising rows: the best scores, or the rule's own choice."""
        from gradstore.scoring.selection import select_top

        if scores.again is not None:
            return scores.again
        usable = context.among_candidates(scores.usable)
        taken = self.candidates(int(usable.sum()), count)
        return np.sort(select_top(scores.values, taken, usable=usable))

    @property
    def curvature(self) -> Curvature | None:
        """The solver's settings; None where nothing is solved."""
        from dataflex.features.newton import Curvature

        if self.by == "exact":
            return None
        return Curvature(self.curvature_rows, self.damping, self.iterations, self.tolerance)

    def features(self, settings: FeatureSettings) -> FeatureSettings:
        """Return the settings of the second ranking's features.

        The Gauss-Newton matrix takes the place of Adam's scaling: of `cg` they are plain gradients.
        """
        return settings if self.by == "exact" else replace(settings, gradient_type="sgd")

    def forecasts(
        self,
        run: RunContext,
        settings: FeatureSettings,
        gradients: Sequence[Forecast],
        subtask_sizes: Sequence[int] | None,
    ) -> list[Forecast]:
        """Forecast the passes of the second ranking.

        Whole gradients take as long as projected ones, but for the projection, which is the smaller
        part.

        Args:
            run: with its rows and model.
            settings: of the features.
            gradients: forecasts of the store's passes, of each target set and last of training
                rows.
            subtask_sizes: rows of each sub-task where the only target set is split; None if not.
        """
        *targets, train = gradients
        usable = int((run.data.train.target_tokens > 0).sum())
        count = self.candidates(usable, 0)
        share = count / train.rows
        again = [replace(each, what=f"whole {each.what}", stored_bytes=0, shared=False)
                 for each in targets]  # fmt: skip
        seconds = None if train.seconds is None else train.seconds * share
        found = [*again, replace(train, what=f"whole gradients of the best {self.top:.3g} of rows",
                                 rows=count, tokens=round(train.tokens * share), seconds=seconds,
                                 stored_bytes=0)]  # fmt: skip
        if (curvature := self.curvature) is not None:
            from dataflex.features.newton import newton_forecast

            q = len(run.data.targets) if subtask_sizes is None else len(subtask_sizes)
            found.append(newton_forecast(run, settings, curvature, train.times, q))
        return found

    def check_count(self, count: int, data: RunData, *, rule: SubsetRule, unique: bool) -> None:
        """Warn, before the model is loaded, of a share of no more rows than an update takes.

        Raises:
            BadInput: more candidates than the rule can choose.
        """
        usable = np.flatnonzero(data.train.target_tokens > 0)
        if unique:
            usable = data.train.first_of_copies(usable)
        if rule.per_target:
            rule.check_count(self.candidates(len(usable), count), data, unique=unique)
        if self.candidates(len(usable), 0) > count:
            return
        share = count / len(usable)
        way = "Leave out rerank, or let an update take fewer rows: it takes %.2g of them."
        if share < 0.5:
            way = "Raise rerank.top to a few times the share that an update takes, %.2g."
        _log.warning(
            "rerank.top is %g, %d of the %d rows that may be chosen, and an update takes %d. So "
            "many are ranked again and all of them are chosen, as without rerank, in another "
            f"order. {way}",
            self.top, self.candidates(len(usable), 0), len(usable), count, share,
        )  # fmt: skip


def rerank_of(
    given: Mapping[str, Any] | None, *, scoring: str, preconditioner: str
) -> Rerank | None:
    """Read what stands under `rerank`, and check it against a selector's other parameters.

    Raises:
        ValueError: a value that is refused, or that has no meaning beside the others.
    """
    from gradstore.export.gauss_newton import SINGULAR

    if given is None:
        return None
    if given.get("damping") == 0:
        raise ValueError(f"rerank.damping is 0: {SINGULAR}")
    found = grouped(Rerank, "rerank", given)
    if found.by == "exact" and (extra := [name for name in SOLVER if name in given]):
        raise ValueError(
            f"rerank.{extra[0]} belongs to rerank.by: cg, and rerank.by is exact; leave it out, or "
            "set by: cg"
        )
    if scoring == "direct":
        raise ValueError(
            "rerank ranks again by whole gradients what a store has ranked, and scoring: direct "
            "ranks by whole gradients at once; leave out one of them"
        )
    if preconditioner != "none" and found.by == "exact":
        raise ValueError(
            f"rerank.by is exact, whose products are plain, and preconditioner is "
            f"{preconditioner}; leave out one of them, or set by: cg"
        )
    return found


def lora_alone(scoring: str, settings: FeatureSettings, rerank: Rerank | None) -> str:
    """Say why a selector's gradients can be those of LoRA alone; "" where they can be any.

    Args:
        scoring: projected or direct.
        settings: of the features.
        rerank: the second ranking, if any.
    """
    whole = "several gradients as long as the model in memory: supported are LoRA gradients"
    if scoring == "direct":
        return f"keeps with scoring: direct {whole}"
    if rerank is not None:
        return f"keeps with rerank {whole}"
    if settings.curvature is not None:
        return (
            f"fits with preconditioner: {settings.curvature.kind} factors of matrices, which are "
            "small for LoRA gradients alone"
        )
    return ""


def check_rule(rerank: Rerank | None, rule: SubsetRule) -> None:
    """Refuse a second ranking beside a subset rule that it can't serve.

    Raises:
        ValueError: quotas, `drop_harmful`, or a rule by target rows beside `cg`.
    """
    if rerank is None or rule.plain:
        return
    if rule.quotas or not rule.per_target:
        check_alone(rerank, f"subset is {rule.subset} and quotas are {dict(rule.quotas)}")
    if rerank.by == "cg":
        raise ValueError(
            f"rerank.by is cg, which solves a system for each sub-task, and subset is {rule.subset}"
            ", which would need one for each target row; set by: exact, or subset: top"
        )


def check_alone(rerank: Rerank | None, rule: str) -> None:
    """Refuse a second ranking beside a rule that does not take the best rows of a ranking.

    Args:
        rerank: None passes.
        rule: how the selector turns scores into rows, for the message.

    Raises:
        ValueError: there is one.
    """
    if rerank is not None:
        raise ValueError(
            f"rerank gives the best rows another order, of which the first are taken, but {rule}; "
            "leave out one of them"
        )
