"""Influence by replay: differentiate a query's loss after training by every row's weight.

Source: reverse-mode differentiation of training, with the states recomputed segment by segment
(MAGIC, 2504.16430). The derivative is exact up to rounding: what a first-order estimate of
influence is judged by, and what two trainings with a row's weight at 1 + e and 1 - e converge to.

Letters: T steps, s steps of a segment, p numbers that are trained, q queries, n training rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.pace import duration, size
from gradstore.replay.run import MicroBatch, Parameters, TrainingRun
from gradstore.replay.steps import Replayer, State, Vectors, differentiable_twice

#: Relative difference between a doubling of weights and its derivative: rounding, in float32.
_AFFINE_ERROR = 1e-2
#: Distance from the real run's end, by its way there: rounding that Adam amplifies.
_END_ERROR = 1e-3
#: query_loss(parameters) -> a scalar, or (q,) losses of several queries.
QueryLoss = Callable[[Parameters], Tensor]


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


def replay_influence(
    run: TrainingRun,
    query_loss: QueryLoss,
    *,
    segment: int | None = None,
    limits: Limits | None = None,
    tell: Callable[[int], object] = lambda steps: None,
) -> npt.NDArray[np.float64]:
    """Compute the derivative of a query's loss after training by each row's weight, at weight 1.

    Negative: more of the row would have lowered the loss. A row that was trained on several times
    has the sum; one that was not, 0. It takes the time of some three trainings for one query, and
    of about one more for each further query.

    Args:
        run: a deterministic run.
        query_loss: its value and derivative are taken at the parameters after the last step.
        segment: s; None for about the root of T, which keeps the fewest states.
        limits: refuse above them; None for an hour and 8 GiB.
        tell: given how many of the `step_passes` were made since it was called last.

    Returns:
        (n,) float64, or (q, n) where `query_loss` gives (q,).

    Raises:
        BadInput: the run would take more than the limits; it is not deterministic; its loss has no
            second derivative, or is not a sum of rows' parts times weights; the parameters or the
            query's loss are not finite after training; it ends elsewhere than `run.ended`.
    """
    segment = _segment(run, segment)
    limits = Limits() if limits is None else limits
    engine = Replayer(run, tell)
    with differentiable_twice():
        _check_run(engine)
        queries = _query_values(engine, engine.start(), query_loss).numel()
        refuse_above(limits, forecast(run, queries=queries, segment=segment), run)
        boundaries, end = _forwards(engine, segment)
        _check_end(engine, end)
        losses = _query_values(engine, end, query_loss)
        cotangents = _query_cotangents(engine, end, query_loss)
        found = np.zeros((queries, run.row_count))
        while boundaries:
            first = (len(boundaries) - 1) * segment
            start = boundaries.pop()
            cotangents, by_weight = _segment_back(engine, start, end, first, segment, cotangents)
            found += by_weight
            end = start
    return found if losses.dim() else found[0]


def replay_forwards(run: TrainingRun) -> dict[str, Tensor]:
    """Train again; return the parameters after the last step, by name.

    Whoever describes a run compares them with those that the real run ended with.

    Raises:
        BadInput: it ends elsewhere than `run.ended`, or nowhere.
    """
    engine = Replayer(run)
    with differentiable_twice():
        _, end = _forwards(engine, len(run.steps))
    _check_end(engine, end)
    return engine.named(end.vectors[0])


def forecast(run: TrainingRun, *, queries: int = 1, segment: int | None = None) -> ReplayCost:
    """Measure three micro-batches and estimate what a replay takes.

    Args:
        run: what would be replayed.
        queries: q.
        segment: s; None for about the root of T.
    """
    segment = _segment(run, segment)
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


def _segment(run: TrainingRun, segment: int | None) -> int:
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


def _check_run(engine: Replayer) -> None:
    """Refuse a run whose first micro-batch shows that replay would be wrong."""
    flat, batch = engine.start().vectors[0], engine.run.steps[0].batches[0]
    one, other = (engine.gradient(flat, [batch]) for _ in range(2))
    if not torch.equal(one, other):
        raise _random_run("the first micro-batch's gradient", float((one - other).abs().max()))
    # Weights only multiply, so doubling all of them adds the sum of the derivatives by each. A
    # kernel that autograd cannot see into, or a denominator that holds weights, breaks that.
    added = engine.gradient(flat, [batch], weight=2.0) - one
    ((_, by_row),) = engine.second(batch, flat, [added])
    expected, found = float(added @ added), float(by_row.sum())
    if abs(found - expected) > _AFFINE_ERROR * expected:
        raise BadInput(
            f"doubling the weights of the first micro-batch moves its gradient by {expected:.4g} "
            f"where its second derivative says {found:.4g}: the loss is not a sum of rows' parts "
            "times their weights (divide by what the trainer divides by, never by weights), or a "
            "fused kernel hides its derivative (load the model without liger, unsloth or flash "
            "attention)."
        )


def _random_run(what: str, difference: float) -> BadInput:
    return BadInput(
        f"the run is not deterministic: {what} differs by {difference:.2g} when it is computed "
        "again, or is not finite; set dropout (lora_dropout, neftune_noise_alpha) to 0 and, on a "
        "GPU, torch.use_deterministic_algorithms(True)."
    )


def _check_end(engine: Replayer, end: State) -> None:
    """Refuse a description by which the run ends elsewhere than it did."""
    if engine.run.ended is None:
        return
    start, real = engine.start().vectors[0], engine.flat(engine.run.ended)
    missed = float(torch.linalg.vector_norm(end.vectors[0] - real))
    moved = float(torch.linalg.vector_norm(real - start))
    if missed > _END_ERROR * moved:
        raise BadInput(
            f"the replayed run ends {missed:.2g} away from where the real one did, which moved its "
            f"parameters by {moved:.2g}: it trains otherwise than replay does (another loss, "
            "optimizer or precision), or its rounding has grown: set optim: adamw_torch, whose "
            "rounding is repeated, or replay fewer steps."
        )


def _forwards(engine: Replayer, segment: int) -> tuple[list[State], State]:
    """Train; return the state at the start of each segment, and the last."""
    state, boundaries = engine.start(), []
    for index, step in enumerate(engine.run.steps):
        if index % segment == 0:
            boundaries.append(state)
        state = engine.advance(state, engine.gradient(state.vectors[0], step.batches), index)
        engine.tell(1)
    if not bool(torch.isfinite(state.vectors[0]).all()):
        raise BadInput(
            f"the run's parameters are not finite after {len(engine.run.steps)} steps; replay a "
            "run that converges: a lower learning rate, or clipping by max_grad_norm."
        )
    return boundaries, state


def _segment_back(
    engine: Replayer,
    start: State,
    end: State,
    first: int,
    segment: int,
    cotangents: list[Vectors],
) -> tuple[list[Vectors], npt.NDArray[np.float64]]:
    """Recompute a segment's states from its first, then go backwards through them."""
    kept: list[tuple[State, Tensor]] = []
    state = start
    last = min(first + segment, len(engine.run.steps))
    for index in range(first, last):
        gradient = engine.gradient(state.vectors[0], engine.run.steps[index].batches)
        kept.append((state, gradient))
        state = engine.advance(state, gradient, index)
        engine.tell(1)
    # The state that the segment ends in was computed before: a check of every step, for nothing.
    if not torch.equal(state.vectors[0], end.vectors[0]):
        difference = float((state.vectors[0] - end.vectors[0]).abs().max())
        raise _random_run(f"the state after step {last}", difference)
    found = np.zeros((len(cotangents), engine.run.row_count))
    for index in reversed(range(first, last)):
        state, gradient = kept.pop()
        cotangents, by_weight = engine.pull_back(state, gradient, index, cotangents)
        engine.tell(len(cotangents))
        found += by_weight
    return cotangents, found


def _query_values(engine: Replayer, state: State, query_loss: QueryLoss) -> Tensor:
    with torch.no_grad():
        losses = query_loss(engine.named(state.vectors[0]))
    expect(
        losses.dim() <= 1 and losses.numel() > 0,
        "the query's loss",
        f"of shape {tuple(losses.shape)}",
        "a scalar, or (q,) for several queries",
    )
    if not bool(torch.isfinite(losses).all()):
        raise BadInput(
            f"the query's loss is {losses.tolist()}; give queries with a target token, and a run "
            "whose loss stays finite."
        )
    return losses


def _query_cotangents(engine: Replayer, end: State, query_loss: QueryLoss) -> list[Vectors]:
    """Differentiate each query's loss by the last state; moments have no part in it."""
    flat = end.vectors[0].detach().requires_grad_()
    losses = query_loss(engine.named(flat)).reshape(-1)
    if not losses.requires_grad:
        raise BadInput(
            "the query's loss does not depend on the parameters it is given; compute it with them, "
            "by torch.func.functional_call for one, outside torch.no_grad()."
        )
    rest = tuple(torch.zeros_like(vector) for vector in end.vectors[1:])
    return [(torch.autograd.grad(loss, flat, retain_graph=True)[0], *rest) for loss in losses]
