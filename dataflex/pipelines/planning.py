"""From a pool of rows to the rows of an interval: pure functions of their arguments.

Letters: m rows of a pool, k domains, s stages, b boundaries of a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflex.data.mixture import largest_remainder
from dataflex.run.schedule import EventKind, Schedule

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Quotients of rounded proportions: 30 / 0.3 must not become 99.
ROUNDING = 1e-9


# -- when stages fire -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pace:
    """The times at which a stage wants to fire, in optimizer steps.

    Attributes:
        warmup_step: before this step it passes its pool through.
        every: at least so many steps lie between two firings.
    """

    warmup_step: int = 0
    every: int = 1


@dataclass(frozen=True)
class Timetable:
    """Timetable of a pipeline's stages, known before the run begins.

    Attributes:
        steps: (b,) int64, rising; the boundaries.
        turns: (b, s) int64, how often a stage has fired in the schedule's stage so far, this
            firing included; 0 where it does not fire.
        totals: (b, s) int64, how often it fires in the schedule's stage altogether.
    """

    steps: IntArray
    turns: IntArray
    totals: IntArray

    @classmethod
    def of(cls, schedule: Schedule, paces: Sequence[Pace]) -> Timetable:
        """Walk through a schedule; a stage of it that the budget cuts off counts as a whole."""
        boundaries = np.asarray(_boundaries(schedule), dtype=np.int64).reshape(-1, 2)
        steps, stages = boundaries[:, 0], boundaries[:, 1]
        fired = firings(steps.tolist(), paces)
        turns, totals = np.zeros(fired.shape, np.int64), np.zeros(fired.shape, np.int64)
        for stage in np.unique(stages):
            within = stages == stage
            turns[within] = np.cumsum(fired[within], axis=0) * fired[within]
            totals[within] = fired[within].sum(axis=0)
        return cls(steps, turns, totals)

    def at(self, step: int) -> list[tuple[int, int]]:
        """Look up (turn, total) of each stage at a boundary; turn 0 where it does not fire."""
        (where,) = np.flatnonzero(self.steps == step)
        return list(zip(self.turns[where].tolist(), self.totals[where].tolist(), strict=True))


def firings(steps: Sequence[int], paces: Sequence[Pace]) -> npt.NDArray[np.bool_]:
    """Compute (b, s) at which of the rising boundaries `steps` each stage fires.

    A stage fires where its last firing lies `every` steps back and its warm-up is over; it makes
    all later ones fire too, since they work on what it hands on (ALGORITHMS 5, rule 4).

    Examples:
        >>> firings([0, 5, 10], [Pace(every=10), Pace(5, every=100)]).astype(int).tolist()
        [[1, 0], [0, 1], [1, 1]]
    """
    fired = np.zeros((len(steps), len(paces)), dtype=np.bool_)
    last: list[int | None] = [None] * len(paces)
    for row, step in zip(fired, steps, strict=True):
        for i, pace in enumerate(paces):
            before = last[i]
            due = before is None or step - before >= pace.every
            if step >= pace.warmup_step and (due or row[:i].any()):
                row[i], last[i] = True, step
    return fired


def _boundaries(schedule: Schedule) -> list[tuple[int, int]]:
    """List (step, stage) of every update, to the end of the stage in which the budget ends."""
    end = schedule.budget
    if schedule.bounded:
        end = -(-end // schedule.stage_steps) * schedule.stage_steps
    found, step = [], 0
    while step < end:
        interval = schedule.interval(step)
        if interval.kind is EventKind.UPDATE:
            found.append((step, interval.stage))
        step = interval.stop
    return found


# -- how large pools are --------------------------------------------------------------------------


def kept_by_filter(pool: int, keep_ratio: float) -> int:
    """Count the rows that a filter keeps of a pool (rule 3).

    Examples:
        >>> kept_by_filter(7, 0.5), kept_by_filter(3, 0.1), kept_by_filter(10, 0.3)
        (3, 1, 3)
    """
    return max(1, math.floor(keep_ratio * pool + ROUNDING))


def target_of_mixture(sizes: IntArray, proportions: FloatArray, interval: int) -> int:
    """Count rows of the largest mixture that a pool holds, none taken twice (rule 3).

    A mixture that is put in order afterwards must not shrink to one interval: the order would
    then never reach beyond it. The scarcest domain for its proportion decides.

    Args:
        sizes: (k,) rows of each domain in the pool.
        proportions: (k,) of the domains.
        interval: rows of one interval: the target is no smaller, while the pool has them.

    Examples:
        >>> target_of_mixture(np.array([600, 300, 100]), np.array([0.5, 0.2, 0.3]), 80)
        333
    """
    wanted = proportions > 0
    fits = math.floor(float((sizes[wanted] / proportions[wanted]).min()) * (1 + ROUNDING))
    return min(max(fits, interval), int(sizes.sum()))


# -- which rows -----------------------------------------------------------------------------------


def draw_mixture(
    pool: IntArray,
    of_row: IntArray,
    proportions: FloatArray,
    target: int,
    generator: np.random.Generator,
    *,
    replacement: bool = False,
) -> IntArray:
    """Draw rows of a pool in given proportions of their domains.

    Args:
        pool: (m,) distinct positions.
        of_row: (n,) domain of every row of the training set.
        proportions: (k,) of the domains.
        target: rows to draw.
        generator: source of randomness.
        replacement: repeat the rows of a domain that is too small, each as often as the others.
            Else its rows are drawn once, and what is missing comes from the rest of the pool.

    Returns:
        (target,) positions in random order; fewer only where the pool has fewer and may not
        repeat any.
    """
    taken = []
    for domain, count in enumerate(largest_remainder(proportions, target).tolist()):
        members = generator.permutation(pool[of_row[pool] == domain])
        if count > len(members) > 0 and replacement:
            members = np.resize(members, count)
        taken.append(members[:count])
    rows = np.concatenate(taken)
    if (missing := target - len(rows)) > 0:
        rest = np.setdiff1d(pool, rows)
        rows = np.concatenate([rows, generator.permutation(rest)[:missing]])
    return generator.permutation(rows)


def fit(rows: IntArray, count: int, *, arranged: bool, generator: np.random.Generator) -> IntArray:
    """Serve exactly `count` rows (rule 5): the head of too many, too few again and again.

    Args:
        rows: (m,) positions, m >= 1.
        count: rows of an interval.
        arranged: whether their order is meant; else they are shuffled, so that the head is a
            uniform draw.
        generator: source of randomness.
    """
    return np.resize(rows if arranged else generator.permutation(rows), count)
