"""A training run as replay needs it: where it starts, its loss, its batches in order, its rule.

Letters: p numbers that are trained, b rows of a micro-batch, n rows of the training set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect, expect_whole

Parameters = Mapping[str, Tensor]
#: loss(parameters, inputs, weights (b,)) -> scalar: a micro-batch's part of its step's loss, in
#: which each row's part is multiplied with its weight. What the trainer divides by (target tokens
#: of the step, or micro-batches) does not change with the weights.
WeightedLoss = Callable[[Parameters, Any, Tensor], Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of the run.

    Attributes:
        rows: (b,) positions of its rows in the training set.
        inputs: whatever the run's loss takes.
    """

    rows: npt.NDArray[np.int64]
    inputs: Any


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        batches: micro-batches whose gradients add up.
        learning_rate: that of this step, by the run's schedule.
    """

    batches: Sequence[MicroBatch]
    learning_rate: float


@dataclass(frozen=True)
class AdamW:
    """AdamW as torch computes it: bias correction, decoupled weight decay (1711.05101).

    Attributes:
        betas: decay of the first and the second moment.
        eps: added to the root of the corrected second moment.
        weight_decay: of the parameters that are not in `undecayed`.
        undecayed: names of parameters without decay.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    undecayed: frozenset[str] = frozenset()

    #: Vectors (p,) that the rule keeps from one step to the next.
    moments = 2

    def update(
        self, state: tuple[Tensor, ...], gradient: Tensor, rate: float, number: int, decay: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute parameters and moments, each (p,), after step `number` (from 1); `decay` (p,)."""
        value, first, second = state
        beta1, beta2 = self.betas
        # Operations and order are those of torch's AdamW, so that its rounding is repeated too.
        first = torch.lerp(first, gradient, 1 - beta1)
        second = torch.addcmul(second * beta2, gradient, gradient, value=1 - beta2)
        # Where it is 0, all gradients so far were, and the first moment is 0 too: the quotient then
        # has no slope by the second moment, whose root alone has an infinite one.
        seen = second > 0
        root = torch.where(seen, torch.where(seen, second, 1.0).sqrt(), 0.0)
        scale = root / math.sqrt(1 - beta2**number) + self.eps
        value = value * (1 - rate * decay)
        value = torch.addcdiv(value, first, scale, value=-rate / (1 - beta1**number))
        return value, first, second


@dataclass(frozen=True)
class Moments:
    """Adam's moments from before the first step, where the run goes on from an earlier one.

    Attributes:
        first: first moment by parameter name, in the parameter's shape and type.
        second: second moment by parameter name.
        steps: that the optimizer has taken; its bias correction counts them.
    """

    first: Parameters
    second: Parameters
    steps: int


@dataclass(frozen=True)
class Sgd:
    """Plain gradient descent: no momentum, no decay."""

    weight_decay = 0.0
    undecayed: frozenset[str] = frozenset()
    moments = 0

    def update(
        self, state: tuple[Tensor, ...], gradient: Tensor, rate: float, number: int, decay: Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the parameters (p,) after a step."""
        return (state[0] - rate * gradient,)


@dataclass(frozen=True)
class TrainingRun:
    """A short, deterministic training run.

    Attributes:
        parameters: trained parameters by name, as they were before the first step.
        loss: see `WeightedLoss`.
        steps: every optimizer step, in order.
        row_count: n.
        optimizer: the rule of a step.
        max_grad_norm: gradients of a step are scaled down to this global norm, as by
            `torch.nn.utils.clip_grad_norm_`; 0 for no clipping.
        moments: of an optimizer that has stepped before; None for one that has not.
        ended: parameters that the real run ended with; a replay that ends elsewhere is refused.

    Raises:
        BadInput: nothing to train, no steps, rows outside the training set, parameters of several
            types or devices, moments or an end of other parameters, a rate or a constant that no
            optimizer has.
    """

    parameters: Parameters
    loss: WeightedLoss
    steps: Sequence[Step]
    row_count: int
    optimizer: AdamW | Sgd = field(default_factory=AdamW)
    max_grad_norm: float = 0.0
    moments: Moments | None = None
    ended: Parameters | None = None

    def __post_init__(self) -> None:
        values = list(self.parameters.values())
        expect(len(values) > 0, "parameters", len(values), "at least one tensor by name")
        kinds = {(value.dtype, value.device) for value in values}
        if len(kinds) > 1 or not values[0].is_floating_point():
            raise BadInput(
                f"parameters have {len(kinds)} kinds of numbers ({values[0].dtype} on "
                f"{values[0].device} first); replay one floating-point type on one device."
            )
        expect_whole(self.row_count, "row_count")
        expect(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "0 or more")
        unknown = self.optimizer.undecayed - set(self.parameters)
        expect(not unknown, "undecayed", ", ".join(sorted(unknown)), "names of parameters")
        if isinstance(self.optimizer, AdamW):
            fits = all(0 <= beta < 1 for beta in self.optimizer.betas) and self.optimizer.eps > 0
            expect(fits, "optimizer", str(self.optimizer), "betas in [0, 1) and eps above 0")
        self._check_state()
        expect(len(self.steps) > 0, "steps", len(self.steps), "at least one step")
        for number, step in enumerate(self.steps, 1):
            self._check_step(number, step)

    def _check_state(self) -> None:
        """Check that moments and end are of the parameters that are trained."""
        held: list[tuple[str, Parameters | None]] = [("ended", self.ended)]
        if self.moments is not None:
            expect(isinstance(self.optimizer, AdamW), "moments", str(self.optimizer), "none to Sgd")
            expect_whole(self.moments.steps, "moments.steps")
            held += [("moments.first", self.moments.first), ("moments.second", self.moments.second)]
        for what, given in held:
            if given is None:
                continue
            found = {name: (value.shape, value.dtype) for name, value in given.items()}
            wanted = {name: (value.shape, value.dtype) for name, value in self.parameters.items()}
            differing = sorted(n for n in found.keys() | wanted if found.get(n) != wanted.get(n))
            expect(not differing, what, ", ".join(differing[:3]), "a tensor like each parameter")

    def _check_step(self, number: int, step: Step) -> None:
        rate = step.learning_rate
        fits = math.isfinite(rate) and rate >= 0
        expect(fits, f"learning_rate of step {number}", rate, "a finite rate of 0 or more")
        expect(len(step.batches) > 0, f"batches of step {number}", 0, "at least one micro-batch")
        for batch in step.batches:
            rows = np.asarray(batch.rows)
            expect(
                rows.ndim == 1 and len(rows) > 0 and rows.dtype.kind in "iu",
                f"rows of step {number}",
                f"{rows.dtype} {rows.shape}",
                "(b,) whole numbers",
            )
            if rows.min() < 0 or rows.max() >= self.row_count:
                raise BadInput(
                    f"step {number} trains on row {rows.max() if rows.min() >= 0 else rows.min()}, "
                    f"but row_count is {self.row_count}; give positions in the training set."
                )
