"""Price of a replay: the time and memory that it takes, known before it starts.

Letters: T steps, s steps of a segment, q queries.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect_whole
from gradstore.pace import duration, size
from gradstore.replay.run import MicroBatch, TrainingRun
from gradstore.replay.steps import Replayer, differentiable_twice


@dataclass(frozen=True)
class Limits:
    """Most that a replay may take.

    Attributes:
        seconds: by the measured micro-batches.
        state_bytes: of kept states, gradients and cotangents; activations are not in it.
    """

    seconds: float = 3600.0
    state_bytes: int = 8 << 30


@dataclass(frozen=True)
class ReplayCost:
    """Price of a replay, known before it starts.

    Attributes:
        segment: s.
        kept_states: most states alive at once: ceil(T / s) + s + 1.
        state_bytes: of kept states, a segment's gradients and the queries' cotangents.
        seconds: estimated from the first, the middle and the last micro-batch; the optimizer's own
            arithmetic, little beside a model, is not in it.
        training_seconds: of training once, a part of them.
    """

    segment: int
    kept_states: int
    state_bytes: int
    seconds: float
    training_seconds: float


def forecast(run: TrainingRun, *, queries: int = 1, segment: int | None = None) -> ReplayCost:
    """Measure three micro-batches and estimate what a replay takes.

    Args:
        run: what would be replayed.
        queries: q.
        segment: s; None for about the root of T.
    """
    segment = segment_steps(run, segment)
    engine = Replayer(run)
    start = engine.start()
    every = [batch for step in run.steps for batch in step.batches]
    probes = [every[0], every[len(every) // 2], every[-1]]
    with differentiable_twice():
        seconds = [_seconds(engine, start.vectors[0], batch, queries) for batch in probes]
    forwards, backwards = len(every) * np.mean(seconds, axis=0)
    vector = start.vectors[0].numel() * start.vectors[0].element_size()
    state = len(start.vectors) * vector
    states = math.ceil(len(run.steps) / segment) + segment + 1
    held = states * state + segment * vector + 2 * queries * (state + vector)
    total = float(2 * forwards + backwards)
    return ReplayCost(segment, states, held, total, float(forwards))


def step_passes(run: TrainingRun, *, queries: int = 1) -> int:
    """Count the passes over a step: two forwards, and one backwards for each query."""
    return (2 + queries) * len(run.steps)


def refuse_above(limits: Limits, cost: ReplayCost, run: TrainingRun) -> None:
    """Raise BadInput, which says what a replay would take, above the limits."""
    if cost.seconds <= limits.seconds and cost.state_bytes <= limits.state_bytes:
        return
    raise BadInput(
        f"replay of {len(run.steps)} steps would take about {duration(cost.seconds)} (limit "
        f"{duration(limits.seconds)}) and {size(cost.state_bytes)} for {cost.kept_states} states "
        f"(limit {size(limits.state_bytes)}), without activations; replay fewer steps, train fewer "
        "parameters, or raise the limits."
    )


def segment_steps(run: TrainingRun, segment: int | None) -> int:
    """Return s: as given, at most T; about the root of T for None, which keeps the fewest states.

    Raises:
        BadInput: it is no whole number above 0.
    """
    if segment is None:
        return math.ceil(math.sqrt(len(run.steps)))
    return min(expect_whole(segment, "segment"), len(run.steps))


def _seconds(
    engine: Replayer, flat: Tensor, batch: MicroBatch, queries: int
) -> tuple[float, float]:
    """Time a micro-batch's part of a pass of the run forwards, and of the one backwards."""
    direction = torch.ones_like(flat)
    engine.second(batch, flat, [direction])  # what only the first call pays
    _wait(flat)
    begin = time.perf_counter()
    engine.gradient(flat, [batch])
    _wait(flat)
    middle = time.perf_counter()
    engine.second(batch, flat, [direction] * queries)
    _wait(flat)
    return middle - begin, time.perf_counter() - middle


def _wait(flat: Tensor) -> None:
    if flat.is_cuda:
        torch.cuda.synchronize(flat.device)
