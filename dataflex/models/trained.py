"""The model in training after a short training on other rows, as long as a context lasts.

Letters: p trained parameters, m rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from dataflex.data.rows import Rows
from dataflex.models.passes import batches
from dataflex.run.context import RunContext
from dataflex.run.log import OnRows, progress
from gradstore.capture.limits import token_budget
from gradstore.capture.losses import RowLoss, Targets
from gradstore.capture.modelstate import borrowed, random_states_kept
from gradstore.capture.slots import trainable_slots, unwrap
from gradstore.errors import BadInput
from gradstore.export.moments import AdamMoments

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShortTraining:
    """Settings of a short training: AdamW with a constant learning rate, no weight decay.

    Attributes:
        epochs: passes over the rows.
        learning_rate: of every step.
        batch_rows: rows of a step; their mean losses count alike.
        tokens_per_batch: padded tokens of a forward and backward, at most, so that a step may take
            several; None for what suits the device.
        moments: of the optimizer to go on from, with its betas and eps; None for new ones.
        max_grad_norm: to which the gradient of a step is clipped; 0 for none.
    """

    epochs: int
    learning_rate: float
    batch_rows: int
    tokens_per_batch: int | None = None
    moments: AdamMoments | None = None
    max_grad_norm: float = 0.0


@contextmanager
def trained_on(
    run: RunContext,
    rows: Rows,
    positions: Positions,
    training: ShortTraining,
    seed: Sequence[int],
) -> Iterator[tuple[float, float]]:
    """Train the run's model on other rows; in the context it is trained, behind it as before.

    Weights, gradients (None stays None), modes and random states come back to the bit, also after
    an error; the run's optimizer and the gradient hooks of DDP see nothing of it. In eval mode, so
    without dropout and without gradient checkpointing. Every rank makes the same training.

    Memory: a copy of the p trained parameters in RAM; on their device p gradients and 2p moments
    during the training, which are released before the context is entered.

    Args:
        run: with its model; no part of it is sharded.
        rows: of which data set.
        positions: (m,) its rows to train on, each with a target token.
        training: how.
        seed: of the order of rows, another one in each epoch.

    Yields:
        Mean loss of the first and of the last epoch's steps, each before the step.

    Raises:
        BadInput: a loss is not finite.
    """
    model = unwrap(run.model)
    steps = training.epochs * -(-len(positions) // training.batch_rows)
    with weights_kept(model) as parameters:
        with (
            random_states_kept(),
            borrowed(model, freeze=False),
            torch.enable_grad(),
            progress(f"training on {rows.name}", training.epochs * len(positions),
                     shown=run.shows_progress, told=run.ranks.leads) as advance,
        ):  # fmt: skip
            optimizer = _optimizer(model, parameters, training)
            losses = []
            for chosen in orders(positions, training, seed):
                losses.append(_step(run, rows, chosen, training, parameters, advance))
                if not math.isfinite(losses[-1]):
                    raise BadInput(
                        f"the loss of step {len(losses)} of {steps} of the training on "
                        f"{rows.name!r} is {losses[-1]} with learning rate "
                        f"{training.learning_rate:g}. Set a lower component_params.learning_rate, "
                        "or check the model's weights."
                    )
                if training.max_grad_norm:
                    nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            del optimizer
        per_epoch = steps // training.epochs
        yield float(np.mean(losses[:per_epoch])), float(np.mean(losses[-per_epoch:]))


def orders(
    positions: Positions, training: ShortTraining, seed: Sequence[int]
) -> Iterator[Positions]:
    """Yield the rows of each step: every epoch all of them once, in an order of its own."""
    for epoch in range(training.epochs):
        order = np.random.default_rng([*seed, epoch]).permutation(positions)
        for start in range(0, len(order), training.batch_rows):
            yield order[start : start + training.batch_rows]


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Yield the parameters that require grad, without gradients, to be changed at will.

    Their values and their `.grad` are put back to the bit, also after an error.
    """
    held = [
        (parameter, parameter.detach().to("cpu", copy=True), parameter.grad)
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    try:
        for parameter, _, _ in held:
            parameter.grad = None
        yield [parameter for parameter, _, _ in held]
    finally:
        with torch.no_grad():
            for parameter, values, gradient in held:
                parameter.copy_(values)
                parameter.grad = gradient


def _optimizer(
    model: nn.Module, parameters: Sequence[nn.Parameter], training: ShortTraining
) -> torch.optim.AdamW:
    """Build the AdamW of a short training, with the moments that it goes on from."""
    held, rate = training.moments, training.learning_rate
    if held is None:
        return torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    found = [(parameter, held.of(slot)) for slot, parameter in trainable_slots(model).items()]
    groups = [
        {"params": [parameter], "betas": (m.constants.beta1, m.constants.beta2),
         "eps": m.constants.eps}
        for parameter, m in found
    ]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, rate, weight_decay=0.0)
    for parameter, moments in found:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(moments.constants.step)),
            "exp_avg": moments.m.to(parameter, copy=True),
            "exp_avg_sq": moments.v.to(parameter, copy=True),
        }
    return optimizer


def _step(
    run: RunContext,
    rows: Rows,
    chosen: Positions,
    training: ShortTraining,
    parameters: list[nn.Parameter],
    advance: OnRows,
) -> float:
    """Add the gradients of the chosen rows' mean loss to the parameters'; return that loss."""
    loss, budget = 0.0, training.tokens_per_batch or token_budget(run.model)
    model_loss = RowLoss(unwrap(run.model))
    for _, batch in batches(run, rows, chosen, budget, advance):
        total, _ = model_loss(batch, Targets.of(batch))
        # Not `backward`: hooks on the parameters' own gradients, such as DDP's, are to see nothing.
        found = torch.autograd.grad(total / len(chosen), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                held = parameter.grad
                parameter.grad = gradient if held is None else held + gradient
        loss += float(total.detach()) / len(chosen)
    return loss
