"""Influence by replay: differentiate a query's loss after training by every row's weight.

Source: reverse-mode differentiation of training, with the states recomputed segment by segment
(MAGIC, 2504.16430). The derivative is exact up to rounding: what a first-order estimate of
influence is judged by, and what two trainings with a row's weight at 1 + e and 1 - e converge to.

Letters: T steps, s steps of a segment, p numbers that are trained, q queries, n training rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect
from gradstore.replay.kept import Backwards, Kept, Nothing
from gradstore.replay.price import Limits, forecast, refuse_above, segment_steps
from gradstore.replay.run import Parameters, TrainingRun
from gradstore.replay.steps import Replayer, State, Vectors, differentiable_twice

#: Relative difference between a doubling of weights and its derivative: rounding, in float32.
_AFFINE_ERROR = 1e-2
#: Distance from the real run's end, by its way there: rounding that Adam amplifies.
_END_ERROR = 1e-3
#: query_loss(parameters) -> a scalar, or (q,) losses of several queries.
QueryLoss = Callable[[Parameters], Tensor]


def replay_influence(
    run: TrainingRun,
    query_loss: QueryLoss,
    *,
    segment: int | None = None,
    limits: Limits | None = None,
    tell: Callable[[int], object] = lambda steps: None,
    kept: Kept | None = None,
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
        kept: of an earlier call for this very run, segment and queries, which goes on from its
            last finished segment, to the same result; what is finished here is kept in it.

    Returns:
        (n,) float64, or (q, n) where `query_loss` gives (q,).

    Raises:
        BadInput: the run would take more than the limits; it is not deterministic; its loss has no
            second derivative, or is not a sum of rows' parts times weights; the parameters or the
            query's loss are not finite after training; it ends elsewhere than `run.ended`.
    """
    segment = segment_steps(run, segment)
    limits = Limits() if limits is None else limits
    engine = Replayer(run, tell)
    with differentiable_twice():
        _check_run(engine)
        queries = _query_values(engine, engine.start(), query_loss).numel()
        refuse_above(limits, forecast(run, queries=queries, segment=segment), run)
        kept = Nothing() if kept is None else kept
        boundaries, end = _forwards(engine, segment, kept)
        _check_end(engine, end)
        losses = _query_values(engine, end, query_loss)
        if (done := kept.backwards()) is None:
            cotangents = _query_cotangents(engine, end, query_loss)
            done = Backwards(len(boundaries), cotangents, np.zeros((queries, run.row_count)))
        found = _back(engine, boundaries, end, segment, done, kept)
    return found if losses.dim() else found[0]


def replay_forwards(run: TrainingRun) -> dict[str, Tensor]:
    """Train again; return the parameters after the last step, by name.

    Whoever describes a run compares them with those that the real run ended with.

    Raises:
        BadInput: it ends elsewhere than `run.ended`, or nowhere.
    """
    engine = Replayer(run)
    with differentiable_twice():
        _, end = _forwards(engine, len(run.steps), Nothing())
    _check_end(engine, end)
    return engine.named(end.vectors[0])


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


def _forwards(engine: Replayer, segment: int, kept: Kept) -> tuple[list[State], State]:
    """Train; return the state at the start of each segment, and the last."""
    states, steps = [engine.start()], engine.run.steps
    for first in range(0, len(steps), segment):
        last = min(first + segment, len(steps))
        state = kept.state(len(states))
        if state is None:
            state = states[-1]
            for index in range(first, last):
                gradient = engine.gradient(state.vectors[0], steps[index].batches)
                state = engine.advance(state, gradient, index)
                engine.tell(1)
            kept.keep_state(len(states), state)
        else:
            engine.tell(last - first)
        states.append(state)
    if not bool(torch.isfinite(states[-1].vectors[0]).all()):
        raise BadInput(
            f"the run's parameters are not finite after {len(steps)} steps; replay a "
            "run that converges: a lower learning rate, or clipping by max_grad_norm."
        )
    return states[:-1], states[-1]


def _back(
    engine: Replayer,
    boundaries: list[State],
    end: State,
    segment: int,
    done: Backwards,
    kept: Kept,
) -> npt.NDArray[np.float64]:
    """Go backwards through the segments that are left; return (q, n) derivatives by weights."""
    while len(boundaries) > done.segments:  # an earlier call went back through these
        first = (len(boundaries) - 1) * segment
        passed = min(segment, len(engine.run.steps) - first)
        engine.tell(passed * (1 + len(done.cotangents)))
        end = boundaries.pop()
    cotangents, found = done.cotangents, done.found
    while boundaries:
        first = (len(boundaries) - 1) * segment
        start = boundaries.pop()
        cotangents, by_weight = _segment_back(engine, start, end, first, segment, cotangents)
        found = found + by_weight
        kept.keep_backwards(Backwards(len(boundaries), cotangents, found))
        end = start
    return found


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
