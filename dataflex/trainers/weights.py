"""Statistics of the samples of a forward pass, and their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.data.rows import Domains
from dataflex.run.context import DomainLosses
from dataflex.run.ranks import Ranks
from dataflex.weighters.base import FloatArray, LossContributor, MeasuredBatch
from gradstore.capture.losses import Targets
from gradstore.errors import BadInput


@dataclass
class SampleStats:
    """Statistics of one rank's n samples of some micro-batches.

    Attributes:
        loss_sums: (n,) float64, summed token losses.
        tokens: (n,) int64, target tokens.
        measured: one (n, m) float64 per contributor that measures.
    """

    loss_sums: FloatArray
    tokens: npt.NDArray[np.int64]
    measured: list[FloatArray]

    @staticmethod
    def joined(parts: Sequence[SampleStats]) -> SampleStats:
        """Join the samples of several parts, end to end."""
        columns = zip(*(part.measured for part in parts), strict=True)
        return SampleStats(
            np.concatenate([part.loss_sums for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            [np.concatenate(column) for column in columns],
        )

    @property
    def losses(self) -> FloatArray:
        """(n,) mean token losses; NaN where a sample has no target token."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.loss_sums / self.tokens)


def statistics(
    inputs: Mapping[str, torch.Tensor],
    outputs: Any,  # noqa: ANN401
    targets: Targets,
    token_losses: torch.Tensor,
    contributors: Sequence[LossContributor],
) -> SampleStats:
    """Take statistics of a forward pass's samples; nothing that carries a gradient."""
    sums = torch.zeros(targets.grid[0], dtype=torch.float64, device=token_losses.device)
    sums.index_add_(0, targets.rows, token_losses.double())
    measured = []
    for contributor in contributors:
        if contributor.measures:
            layer = contributor.hidden_layer
            hidden = None if layer is None else outputs.hidden_states[layer].detach()
            batch = MeasuredBatch(inputs, targets, token_losses, hidden)
            with torch.no_grad():
                measured.append(np.asarray(contributor.measure(batch), dtype=np.float64))
    return SampleStats(sums.cpu().numpy(), targets.counts.cpu().numpy(), measured)


def hidden_option(contributors: Sequence[LossContributor]) -> dict[str, bool]:
    """Ask the model for hidden states only where somebody reads them."""
    wanted = any(c.measures and c.hidden_layer is not None for c in contributors)
    return {"output_hidden_states": True} if wanted else {}


def rows_of(
    inputs: Mapping[str, torch.Tensor], chosen: npt.NDArray[np.bool_]
) -> dict[str, torch.Tensor] | None:
    """Take the `chosen` (b,) rows of a batch; None if there are none, or it can't be cut."""
    if not chosen.any() or any(len(value) != len(chosen) for value in inputs.values()):
        return None
    return {key: value[torch.as_tensor(chosen)] for key, value in inputs.items()}


def check_weights(answer: object, losses: FloatArray, name: str) -> FloatArray:
    """Check weights (n,) as answered; 0 where a sample has no finite loss.

    Raises:
        BadInput: another shape, or a weight that is negative or not finite.
    """
    weights = np.asarray(answer, dtype=np.float64)
    if weights.shape != losses.shape:
        raise BadInput(
            f"{name}.weights answered shape {weights.shape}; expected one weight for each of "
            f"{len(losses)} samples."
        )
    weights = np.where(np.isfinite(losses), weights, 0.0)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        worst = weights[~(np.isfinite(weights) & (weights >= 0))][0]
        raise BadInput(f"{name}.weights answered {worst}; weights are finite and 0 or more.")
    return weights


def losses_by_domain(
    step: int, seen: SampleStats, rows: npt.NDArray[np.int64], domains: Domains, ranks: Ranks
) -> DomainLosses:
    """Sum a step's losses by domain over all ranks; collective.

    Args:
        step: g, optimizer steps finished before it.
        seen: this rank's n samples.
        rows: (n,) their positions.
        domains: whose rows they are.
        ranks: this process among the others.
    """
    domain, k = domains.of_row[rows], len(domains.names)
    own = [np.bincount(domain, weights, minlength=k)
           for weights in (seen.loss_sums, seen.tokens, np.ones(len(rows)))]  # fmt: skip
    loss_sums, tokens, count = ranks.summed(np.stack(own))
    return DomainLosses(step, loss_sums, tokens, count)


def multipliers(
    weights: FloatArray, tokens: npt.NDArray[np.int64], *, relative: bool
) -> FloatArray:
    """Scale weights to how many times each sample counts; 1 as in the plain trainer.

    Args:
        weights: (n,) finite, >= 0.
        tokens: (n,) target tokens.
        relative: only ratios of weights count: the samples together keep the share of the step
            that the plain trainer gives them. Else a weight is the answer.

    Returns:
        (n,) float64; all zero where no weight is positive. The step's loss is the sum over its
        samples of multiplier times summed token losses, divided by the step's target tokens.

    Examples:
        Two micro-batches with sample losses [1, 3] and [5], weights 1: 3.0 (E4).

        >>> tokens = np.array([2, 2, 2])
        >>> each = multipliers(np.ones(3), tokens, relative=True)
        >>> float((each * tokens * np.array([1.0, 3.0, 5.0])).sum() / tokens.sum())
        3.0
    """
    if not relative:
        return weights
    weights = np.where(tokens > 0, weights, 0.0)
    if not (weights > 0).any():
        return weights
    weights = weights / weights.max()  # a sum of tiny ones would overflow its reciprocal
    return np.asarray(weights * (tokens.sum() / (weights * tokens).sum()), dtype=np.float64)


def summary(each: FloatArray) -> dict[str, float]:
    """Summarise multipliers (n,): smallest, mean, largest, and the share of samples that count.

    The effective share is (sum w)^2 / (n * sum w^2): 1 where all are equal, 1 / n where one has
    everything, 0 where all are 0.
    """
    if not len(each):
        return {}
    squares = float((each**2).sum())
    return {
        "weight_min": float(each.min()),
        "weight_mean": float(each.mean()),
        "weight_max": float(each.max()),
        "effective_share": float(each.sum()) ** 2 / (len(each) * squares) if squares else 0.0,
    }
