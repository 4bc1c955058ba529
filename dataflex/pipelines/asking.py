"""One stage asked: its answer checked, and turned into the rows that it hands on.

The strategy is asked on every rank, so that passes are shared; rank 0's answer is everyone's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dataflex.data.mixture import domains_of, mixers_answer, opening_proportions
from dataflex.pipelines.planning import (
    FloatArray,
    IntArray,
    draw_mixture,
    fit,
    kept_by_filter,
    target_of_mixture,
)
from dataflex.pipelines.stages import Stage
from dataflex.reorders.base import Ordering
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.base import ask as ask_selector
from gradstore.errors import BadInput

#: A stage's answer: rows with scores, (k,) proportions, or rows in order.
Answer = Selection | FloatArray | Ordering


@dataclass(frozen=True)
class Part:
    """The part of one stage in a plan.

    Attributes:
        stage: the stage.
        fired: whether it was called; otherwise it passes on its previous rows.
        pool: how many rows it got.
        rows: (m,) positions it passed on.
        answer: what it answered; None where it did not fire.
    """

    stage: Stage
    fired: bool
    pool: int
    rows: IntArray
    answer: Answer | None = None


def ask(
    stage: Stage, count: int, context: UpdateContext, seed: int, *, last: bool
) -> tuple[IntArray, Answer]:
    """Ask a stage; return the rows of `context.pool` it hands on, and its answer.

    Args:
        stage: one that decides about rows.
        count: rows of the interval.
        context: what its strategy may look at.
        seed: of draws, combined with the step.
        last: whether no other stage comes after it.

    Raises:
        BadInput: the answer is none; names the stage.
    """
    generator = np.random.default_rng([seed, context.step])
    if stage.spec.family == "selector":
        return _select(stage, count, context)
    if stage.spec.family == "mixer":
        return _mix(stage, count, context, generator, last=last)
    strategy = stage.strategy
    answer = context.run.ranks.gather(lambda: strategy.order(count, context))[0]
    return _ordered(answer, context.candidates, stage), answer


def open_with(
    mixer: Stage | None, reorder: Stage | None, count: int, context: UpdateContext, seed: list[int]
) -> IntArray:
    """Draw rows to train on before the first update of a stage of the schedule.

    Args:
        mixer: has them opened in the opening mixture, if it is there.
        reorder: begins its order with them, if it is there; else they are in random order.
        count: rows of the warm-up.
        context: of its first step.
        seed: of draws.
    """
    run, pool = context.run, context.candidates
    generator = np.random.default_rng(seed)
    if mixer is not None:
        of_row, proportions = domains_of(run.data).of_row, opening_proportions(run.config, run.data)
        draw = draw_mixture if reorder is None else largest_mixture
        pool = draw(pool, of_row, proportions, count, generator)
    if reorder is None:
        return fit(pool, count, arranged=False, generator=generator)
    strategy, own = reorder.strategy, replace(context, pool=pool)
    answer = run.ranks.gather(lambda: strategy.warmup(count, own))[0]
    return fit(_ordered(answer, pool, reorder), count, arranged=True, generator=generator)


def _select(stage: Stage, count: int, context: UpdateContext) -> tuple[IntArray, Selection]:
    strategy, pool = stage.strategy, context.candidates
    draws = stage.spec.mode == "draw"
    wanted = count if draws else kept_by_filter(len(pool), stage.spec.keep_ratio)
    answer = ask_selector(strategy, wanted, context, stage.spec.name, exact=draws)
    rows = _within(answer.indices, np.arange(len(context.run.data.train)), stage)
    return (rows if draws else np.unique(rows)), answer


def _mix(
    stage: Stage, count: int, context: UpdateContext, generator: np.random.Generator, *, last: bool
) -> tuple[IntArray, FloatArray]:
    """Draw rows of the interval, or the largest mixture of the pool for a reorder that follows."""
    strategy, pool, domains = stage.strategy, context.candidates, domains_of(context.run.data)
    answer = context.run.ranks.gather(lambda: strategy.mix(context))[0]
    proportions = mixers_answer(answer, domains.names, stage.spec.component)
    if last:
        rows = draw_mixture(pool, domains.of_row, proportions, count, generator,
                            replacement=stage.spec.allow_replacement)  # fmt: skip
        return rows, proportions
    return largest_mixture(pool, domains.of_row, proportions, count, generator), proportions


def largest_mixture(
    pool: IntArray,
    of_row: IntArray,
    proportions: FloatArray,
    count: int,
    generator: np.random.Generator,
) -> IntArray:
    """Draw the largest mixture that a pool holds, of `count` rows at least; rising positions."""
    sizes = np.bincount(of_row[pool], minlength=len(proportions))
    target = target_of_mixture(sizes, proportions, count)
    return np.sort(draw_mixture(pool, of_row, proportions, target, generator))


def _ordered(answer: object, pool: IntArray, stage: Stage) -> IntArray:
    if not isinstance(answer, Ordering):
        raise BadInput(
            f"{stage.spec.name} answered a {type(answer).__name__}; expected a "
            "dataflex.api.Ordering."
        )
    return _within(answer.rows, pool, stage)


def _within(answer: object, pool: IntArray, stage: Stage) -> IntArray:
    """Check that an answer's positions are of the pool (m,).

    Raises:
        BadInput: one is not, or there is none; names the stage.
    """
    rows = np.asarray(answer, dtype=np.int64)
    if rows.ndim != 1 or len(rows) == 0 or not np.isin(rows, pool).all():
        unknown = np.setdiff1d(rows, pool)[:3].tolist()
        raise BadInput(
            f"{stage.spec.name} answered {rows.shape} rows"
            + (f", among them {', '.join(map(str, unknown))}" if unknown else "")
            + f"; expected a list of some of the {len(pool)} rows of context.pool."
        )
    return rows
