"""Rows of a mixture: proportions checked, rounded to counts, and read from the domains.

Letters: k domains, in the order of `dataset`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.data.order import RowOrder
from dataflex.data.rows import Domains, RunData
from gradstore.errors import BadInput

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

#: Values of `mixture_sample_rule`; the last two leave nothing for a mixer to decide.
RULES = ("mixture", "stratified", "uniform")
FIXED_RULES = RULES[1:]

#: A mixer's answer may miss 1 by this much: float32 arithmetic does.
SUM_TOLERANCE = 1e-4

#: Ending by which a held-out set names its domain.
HELD_OUT = "_eval"


# -- proportions ----------------------------------------------------------------------------------


def largest_remainder(proportions: FloatArray, total: int) -> IntArray:
    """Round proportions to the closest whole counts (ALGORITHMS 0.8).

    Each domain gets the whole part of its quota; what is left goes to the largest remainders, ties
    to the lower index. Quotas are exact fractions of the numbers as they are written, so that ties
    are ties.

    Args:
        proportions: (k,) >= 0, in any scale, of a positive sum.
        total: rows to share out.

    Returns:
        (k,) int64 of sum `total`; 0 where the proportion is 0.

    Examples:
        >>> largest_remainder(np.array([0.5, 0.3, 0.2]), 7).tolist()
        [4, 2, 1]
        >>> largest_remainder(np.array([1.0, 1.0, 1.0]) / 3, 10).tolist()
        [4, 3, 3]
    """
    written = [Fraction(repr(float(p))) for p in proportions]
    quotas = [p * total / sum(written) for p in written]
    counts = [int(quota) for quota in quotas]
    neediest = sorted(range(len(quotas)), key=lambda d: (counts[d] - quotas[d], d))
    for d in neediest[: total - sum(counts)]:
        counts[d] += 1
    return np.asarray(counts, dtype=np.int64)


def as_proportions(values: object, domains: Sequence[str], what: str) -> FloatArray:
    """Normalize numbers >= 0 in any scale to (k,) float64 proportions that sum to 1.

    Args:
        values: what the user or a mixer gave.
        domains: names of the domains.
        what: what the numbers are, for messages.

    Raises:
        BadInput: not a number for each domain, or negative, not finite, or all zero.
    """
    try:
        given = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise BadInput(f"{what}: expected a list of numbers, got {values!r}.") from None
    shown = np.array2string(given, separator=", ", threshold=20)
    if given.shape != (len(domains),):
        raise BadInput(
            f"{what}: {shown} has shape {given.shape}; expected {len(domains)} numbers, one for "
            f"each data set in the order of `dataset` ({', '.join(domains)})."
        )
    if not np.isfinite(given).all() or (given < 0).any() or not given.any():
        raise BadInput(f"{what}: {shown}; expected finite numbers >= 0 with a positive sum.")
    given = given / given.max()  # a sum of huge ones would overflow
    return np.asarray(given / given.sum())


def mixers_answer(answer: object, domains: Sequence[str], name: str) -> FloatArray:
    """Check and return a mixer's (k,) proportions.

    Raises:
        BadInput: they are no proportions; names the component.
    """
    what = f"component {name!r} answered"
    proportions = as_proportions(answer, domains, what)
    total = float(np.sum(np.asarray(answer, dtype=np.float64)))
    if abs(total - 1.0) > SUM_TOLERANCE:
        raise BadInput(f"{what} proportions that sum to {total:.6g}; they must sum to 1.")
    return proportions


def exponentiated(weights: FloatArray, scores: FloatArray, eta: float, eps: float) -> FloatArray:
    """Apply an exponentiated-gradient step to the weights, and mix in a share of uniform weights.

    Args:
        weights: (k,) on the simplex.
        scores: (k,) finite.
        eta: step size.
        eps: share of the uniform weights in the answer.

    Returns:
        (k,) (1 - eps) * softmax(log weights + eta * scores) + eps / k.
    """
    with np.errstate(divide="ignore"):  # without smoothing a weight may have become 0
        logits = np.log(weights) + eta * scores
    powers = np.exp(logits - logits.max())
    return np.asarray((1.0 - eps) * powers / powers.sum() + eps / len(weights))


def opening_proportions(config: RunConfig, data: RunData) -> FloatArray:
    """Return (k,) proportions used before a mixer is called, or throughout under a fixed rule."""
    ours, domains = config.dataflex, domains_of(data).names
    if ours.mixture_sample_rule == "stratified":
        return as_proportions(usable_sizes(data), domains, "rows of the domains")
    if ours.mixture_sample_rule != "uniform" and ours.init_mixture_proportions is not None:
        return as_proportions(ours.init_mixture_proportions, domains, "init_mixture_proportions")
    return np.full(len(domains), 1.0 / len(domains))


# -- rows -----------------------------------------------------------------------------------------


def domains_of(data: RunData) -> Domains:
    """Return the domains of a run that was loaded by domain."""
    if data.domains is None:
        raise RuntimeError("the rows of this run were loaded without their domains")
    return data.domains


def usable_sizes(data: RunData) -> IntArray:
    """Count the (k,) int64 rows of each domain that have a target token."""
    domains, usable = domains_of(data), data.train.target_tokens > 0
    counts = np.bincount(domains.of_row[usable], minlength=len(domains.names))
    return counts.astype(np.int64)


class Cursors:
    """Read positions in each domain.

    A domain is read in laps, each an order of its own: a row comes a second time only when all
    others of its domain have come. The order is a function of (seed, domain, lap) alone, so the
    rows read so far are the whole state.

    Attributes:
        read: (k,) int64, rows read of each domain since the run began.
    """

    def __init__(self, data: RunData, seed: int) -> None:
        """Start at the first row of each domain.

        Args:
            data: the training rows; those without a target token are never read.
            seed: the run's.
        """
        domains, usable = domains_of(data), data.train.target_tokens > 0
        self._orders = [
            RowOrder(np.flatnonzero(usable & (domains.of_row == d)), (seed, d))
            for d in range(len(domains.names))
        ]
        self.read = np.zeros(len(self._orders), dtype=np.int64)

    @property
    def epochs(self) -> FloatArray:
        """(k,) times each domain was read."""
        sizes = [len(order.rows) for order in self._orders]
        return np.asarray(self.read / np.asarray(sizes, dtype=np.float64))

    def take(self, counts: IntArray) -> IntArray:
        """Take the next `counts` (k,) rows, domain by domain, and advance the cursors."""
        taken = [
            order.window(int(first), int(count))
            for order, first, count in zip(self._orders, self.read, counts, strict=True)
            if count
        ]
        self.read = self.read + counts
        return np.concatenate(taken)


def check_domains(data: RunData) -> None:
    """Raise BadInput unless every domain has a row to train on.

    Raises:
        BadInput: one has none; names it.
    """
    sizes = usable_sizes(data)
    if not sizes.all():
        empty = [name for name, n in zip(domains_of(data).names, sizes, strict=True) if not n]
        raise BadInput(
            f"no row with a target token in {', '.join(map(repr, empty))}: every domain needs one. "
            "Remove it from dataset, give its rows a response, or raise cutoff_len."
        )


# -- configuration --------------------------------------------------------------------------------


def domain_of(held_out: str, domains: Sequence[str]) -> str | None:
    """Return the domain of a held-out set: its own name, or that without `_eval`."""
    return next((n for n in (held_out, held_out.removesuffix(HELD_OUT)) if n in domains), None)
