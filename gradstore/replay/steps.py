"""One optimizer step, forwards, and backwards as a vector-Jacobian product.

A step maps a state (parameters, moments) to the next: the gradient of the weighted batch, clipped,
then the optimizer's rule. Backwards, the rule is differentiated by autograd as it was computed; the
gradient inside it by a second backward through the model, which gives both the Hessian-vector
product, for the state before, and each row's own part, for its weight.

Letters: p numbers that are trained, b rows of a micro-batch, q queries, n training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradstore.errors import BadInput
from gradstore.replay.run import MicroBatch, Parameters, TrainingRun

Vectors = tuple[Tensor, ...]
#: torch.nn.utils.clip_grad_norm_ adds it to the norm.
_CLIP_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class State:
    """Parameters and moments between two steps, each (p,)."""

    vectors: Vectors


@contextmanager
def differentiable_twice() -> Iterator[None]:
    """Explain what torch says of a model that has no second derivative.

    Raises:
        BadInput: in the place of torch's error.
    """
    try:
        with torch.enable_grad():
            yield
    except (RuntimeError, NotImplementedError) as error:
        told = str(error)
        if not any(sign in told for sign in ("twice", "is not implemented", "checkpoint")):
            raise
        raise BadInput(
            f"replay needs second derivatives, which this model does not have: {told}. Load it "
            "with attn_implementation eager (flash_attn: disabled), without gradient checkpointing "
            "and without fused kernels (liger, unsloth)."
        ) from error


class Replayer:
    """The map of a run's steps, and its transpose.

    Args:
        run: what is replayed.
        tell: given how many passes over a step were made since it was called last.
    """

    def __init__(
        self, run: TrainingRun, tell: Callable[[int], object] = lambda steps: None
    ) -> None:
        self.run, self.tell = run, tell
        self._names = list(run.parameters)
        self._shapes = [value.shape for value in run.parameters.values()]
        self._sizes = [value.numel() for value in run.parameters.values()]
        rule = run.optimizer
        self._decay = torch.cat([
            value.new_full((value.numel(),), 0.0 if name in rule.undecayed else rule.weight_decay)
            for name, value in run.parameters.items()
        ]).detach()  # fmt: skip

    def start(self) -> State:
        """Give the state before the first step."""
        flat, moments = self.flat(self.run.parameters), self.run.moments
        if moments is None:
            zeros = (torch.zeros_like(flat) for _ in range(self.run.optimizer.moments))
            return State((flat, *zeros))
        return State((flat, self.flat(moments.first), self.flat(moments.second)))

    def flat(self, named: Parameters) -> Tensor:
        """Join tensors by name to (p,), in the order of the run's parameters."""
        device = self._decay.device
        return torch.cat([named[name].detach().to(device).reshape(-1) for name in self._names])

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut (p,) into parameters by name; a gradient flows back through them."""
        parts = torch.split(flat, self._sizes)
        triples = zip(self._names, self._shapes, parts, strict=True)
        return {name: part.view(shape) for name, shape, part in triples}

    def loss(self, batch: MicroBatch, flat: Tensor, weights: Tensor) -> Tensor:
        """Compute a micro-batch's weighted part of the loss, a scalar."""
        loss = self.run.loss(self.named(flat), batch.inputs, weights)
        if loss.dim() or not loss.requires_grad:
            raise BadInput(
                f"the run's loss gave shape {tuple(loss.shape)}, requires_grad "
                f"{loss.requires_grad}; give a scalar that depends on the parameters it is given."
            )
        return loss

    def gradient(self, flat: Tensor, batches: Sequence[MicroBatch], weight: float = 1.0) -> Tensor:
        """Sum the gradients (p,) of micro-batches at parameters (p,), all weights the same."""
        total = torch.zeros_like(flat)
        for batch in batches:
            at = flat.detach().requires_grad_()
            loss = self.loss(batch, at, flat.new_full((len(batch.rows),), weight))
            total += torch.autograd.grad(loss, at)[0]
        return total

    def advance(self, state: State, gradient: Tensor, index: int) -> State:
        """Compute the state after step `index` (from 0) from the step's gradient (p,)."""
        with torch.no_grad():
            return State(self._update(state.vectors, gradient, index))

    def pull_back(
        self, state: State, gradient: Tensor, index: int, after: Sequence[Vectors]
    ) -> tuple[list[Vectors], npt.NDArray[np.float64]]:
        """Pull cotangents of the state after a step back through it.

        Args:
            state: that before the step.
            gradient: (p,) of the step, before clipping.
            index: of the step, from 0.
            after: q cotangents of the state after the step.

        Returns:
            The q cotangents of the state before; (q, n) derivatives by each row's weight in this
            step.
        """
        leaves = [v.detach().requires_grad_() for v in (*state.vectors, gradient)]
        made = self._update(tuple(leaves[:-1]), leaves[-1], index)
        before: list[list[Tensor]] = [
            list(torch.autograd.grad(made, leaves, given, retain_graph=True, materialize_grads=True,
                                     allow_unused=True))
            for given in after
        ]  # fmt: skip
        by_weight = np.zeros((len(after), self.run.row_count))
        for batch in self.run.steps[index].batches:
            pulled = self.second(batch, state.vectors[0], [parts[-1] for parts in before])
            for query, (by_state, by_row) in enumerate(pulled):
                before[query][0] = before[query][0] + by_state
                np.add.at(by_weight[query], batch.rows, by_row.double().cpu().numpy())
        return [tuple(parts[:-1]) for parts in before], by_weight

    def second(
        self, batch: MicroBatch, flat: Tensor, directions: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Differentiate (direction, gradient of a micro-batch) once more.

        Args:
            batch: a micro-batch.
            flat: (p,) parameters.
            directions: q of (p,).

        Returns:
            For each direction: by the parameters (p,), which is a Hessian-vector product, and by
            the rows' weights (b,).
        """
        at = flat.detach().requires_grad_()
        weights = flat.new_ones(len(batch.rows)).requires_grad_()
        # The fused kernels of torch's attention, which training has, are differentiable once.
        with sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(self.loss(batch, at, weights), at, create_graph=True)
        found: list[tuple[Tensor, Tensor]] = []
        for direction in directions:
            parts: tuple[Any, ...] = (None, None)
            if gradient.requires_grad:
                parts = torch.autograd.grad(
                    gradient, (at, weights), direction, retain_graph=True, allow_unused=True
                )
            if parts[1] is None:
                raise BadInput(
                    "the run's loss, or its gradient, does not depend on the rows' weights; "
                    "multiply each row's part with its weight, and compute it with operations that "
                    "autograd can differentiate twice (no liger, unsloth or flash attention)."
                )
            # A loss that is linear in the parameters has no curvature.
            found.append((torch.zeros_like(flat) if parts[0] is None else parts[0], parts[1]))
        return found

    def _update(self, vectors: Vectors, gradient: Tensor, index: int) -> Vectors:
        limit = self.run.max_grad_norm
        if limit:
            parts = torch.split(gradient, self._sizes)  # as clip_grad_norm_ rounds
            norms = torch.stack([torch.linalg.vector_norm(part) for part in parts])
            norm = torch.linalg.vector_norm(norms)
            gradient = gradient * (limit / (norm + _CLIP_EPS)).clamp(max=1.0)
        rate = self.run.steps[index].learning_rate
        number = index + 1 + (0 if self.run.moments is None else self.run.moments.steps)
        return self.run.optimizer.update(vectors, gradient, rate, number, self._decay)
