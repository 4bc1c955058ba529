"""Schedule of data changes: a pure function of (step, W, U, T, budget), in optimizer steps.

A *stage* is W warm-up steps followed by T intervals of U steps; it repeats until the budget is
spent. With T <= 0 there is one unbounded stage. Nothing here knows a trainer, a model or a clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from gradstore.errors import BadInput


class EventKind(StrEnum):
    """Kind of event before the first step of an interval."""

    WARMUP = "warmup"
    UPDATE = "update"


@dataclass(frozen=True)
class Interval:
    """A run of optimizer steps that train on one set of rows.

    Attributes:
        kind: whether the rows are a warm-up draw or a component's answer.
        start: first step of the interval.
        stop: one past its last step (half-open); may lie beyond the budget.
        update: counter c of updates within the stage, 1-based; 0 for a warm-up.
        stage: index of the stage, 0-based.
    """

    kind: EventKind
    start: int
    stop: int
    update: int
    stage: int

    @property
    def steps(self) -> int:
        """Steps of data to draw: W for a warm-up, U for an update."""
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """W = `warmup_step`, U = `update_step`, T = `update_times`, all in optimizer steps."""

    warmup_step: int
    update_step: int
    update_times: int
    budget: int

    def __post_init__(self) -> None:
        """Reject what would never ask the component (upstream's U = 0 default did)."""
        if self.update_step <= 0:
            raise BadInput(
                f"update_step is {self.update_step}, but a dynamic train_type needs at least 1: "
                "the component is called every update_step optimizer steps. Set update_step."
            )
        if self.warmup_step < 0:
            raise BadInput(f"warmup_step is {self.warmup_step}; it must be 0 or more.")
        if self.budget <= 0:
            raise BadInput(
                f"the run has {self.budget} optimizer steps. Set train_step, or num_train_epochs "
                "and update_times so that their product is positive."
            )

    @property
    def bounded(self) -> bool:
        """True if stages end and start again with a warm-up."""
        return self.update_times > 0

    @property
    def stage_steps(self) -> int:
        """Length of a bounded stage, W + U * T steps."""
        return self.warmup_step + self.update_step * self.update_times

    @property
    def updates_per_stage(self) -> int:
        """T for the component: its own count, or what fits into the budget of an unbounded run."""
        if self.bounded:
            return self.update_times
        return max(1, math.ceil((self.budget - self.warmup_step) / self.update_step))

    def interval(self, step: int) -> Interval:
        """Return the interval that contains optimizer step `step` (0-based: steps done so far)."""
        if step < 0:
            raise ValueError(f"step is {step}; it must be 0 or more")
        stage, s = divmod(step, self.stage_steps) if self.bounded else (0, step)
        stage_start = step - s
        if s < self.warmup_step:
            stop = stage_start + self.warmup_step
            return Interval(EventKind.WARMUP, stage_start, stop, 0, stage)
        done = (s - self.warmup_step) // self.update_step
        start = stage_start + self.warmup_step + done * self.update_step
        return Interval(EventKind.UPDATE, start, start + self.update_step, done + 1, stage)

    def intervals(self) -> list[Interval]:
        """List every interval that starts within the budget, in order."""
        found, step = [], 0
        while step < self.budget:
            found.append(self.interval(step))
            step = found[-1].stop
        return found

    def told(self) -> str:
        """Tell in a line how long the run is and what it is made of.

        >>> Schedule(100, 100, 4, budget=1500).told()
        '1,500 steps, 12 updates: 3 stages of 100 + 4 x 100 steps'
        >>> Schedule(10, 10, 0, budget=20).told()
        '20 steps, 1 update'
        """
        updates = sum(interval.update > 0 for interval in self.intervals())
        text = f"{_counted(self.budget, 'step')}, {_counted(updates, 'update')}"
        if not self.bounded:
            return text
        stages = _counted(math.ceil(self.budget / self.stage_steps), "stage")
        shape = f"{self.warmup_step} + {self.update_times} x {self.update_step} steps"
        return f"{text}: {stages} of {shape}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def select_budget(
    *,
    train_step: int,
    epochs: float,
    warmup_step: int,
    update_step: int,
    update_times: int,
    rows: int,
    global_batch: int,
) -> int:
    """Compute the optimizer steps of a select, reorder or lego run.

    `train_step` if positive; else `epochs` stages where T > 0; else `epochs` passes over `rows`.
    """
    if train_step > 0:
        return train_step
    if update_times > 0:
        return math.ceil(epochs * max(1, warmup_step + update_step * update_times))
    return math.ceil(epochs * math.ceil(rows / global_batch))


def mix_budget(
    *,
    train_step: int,
    epochs: float,
    warmup_step: int,
    update_step: int,
    update_times: int,
    static_mix: bool,
    rows: int,
    global_batch: int,
) -> int:
    """Compute the optimizer steps of a mix run (ALGORITHMS 0.2).

    `train_step` if positive; else `epochs` passes over all `rows` with `static_mix` or T < 0; else
    one opening and T updates, whatever `epochs` says.
    """
    if train_step > 0:
        return train_step
    if static_mix or update_times < 0:
        return int(epochs * max(1, rows // global_batch))
    return warmup_step + update_step * update_times
