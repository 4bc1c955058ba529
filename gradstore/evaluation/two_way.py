"""Intervals over queries and retrained models together: each resample draws both anew.

`estimate` draws queries as if each told something of its own, and takes the retrained models as
given. Queries of one skill are alike, and all of them share the models, so that an interval over
queries alone is too narrow for what is to be said of other models. Here every resample draws groups
of queries and models with replacement, independently (Owen 2007, The pigeonhole bootstrap,
arXiv 0712.1111). Metrics of one `Resamples` may be subtracted: a difference is paired in both.

Letters: n training rows, q queries, s retrained models, b resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect_whole
from gradstore.evaluation.estimates import Estimate, Floats, Numbers, check_confidence, numbers
from gradstore.evaluation.retraining import lds, query_loss_difference, subset_sums

#: Resamples; a bound's own noise is then about a twentieth of the interval's width.
RESAMPLES = 2000


@dataclass(frozen=True)
class Resamples:
    """Counts of every query and of every model in each resample.

    Attributes:
        queries: (b, q) float64 counts.
        models: (b, s) float64 counts; each row adds up to s.
    """

    queries: Floats
    models: Floats

    @staticmethod
    def draw(
        queries: int,
        models: int,
        *,
        groups: npt.ArrayLike | None = None,
        count: int = RESAMPLES,
        seed: int = 0,
    ) -> Resamples:
        """Draw queries and models with replacement, of more than two models two or more at least.

        Args:
            queries: q.
            models: s.
            groups: (q,) labels; queries of one label are drawn together, as those of one skill.
                None draws each alone. With one group, or one query, only the models vary.
            count: b.
            seed: the same arguments give the same resamples.

        Raises:
            BadInput: a count below 1, or groups of another shape.
        """
        q, s, b = (expect_whole(value, name) for value, name in (
            (queries, "queries"), (models, "models"), (count, "count")))  # fmt: skip
        labels = np.arange(q) if groups is None else np.asarray(groups)
        if labels.shape != (q,):
            raise BadInput(f"groups has shape {labels.shape}; give one label per query: ({q},).")
        distinct, of = np.unique(labels, return_inverse=True)
        generator = np.random.default_rng(expect_whole(seed, "seed", 0))

        def draw(size: int, times: int) -> Floats:
            return generator.multinomial(size, np.full(size, 1 / size), times).astype(np.float64)

        drawn, held = draw(len(distinct), b), draw(s, b)
        # A model alone has no order: as an LDS of 0 it would widen an interval of three models.
        while s > 2 and (alone := (held > 0).sum(axis=1) < 2).any():
            held[alone] = draw(s, int(alone.sum()))
        return Resamples(drawn[:, of], held)

    def mean(self, values: Floats) -> Floats:
        """Compute the mean over queries in each resample, (b,), of (b, q) or (q,) values."""
        return np.asarray((self.queries * values).sum(axis=1) / self.queries.sum(axis=1))


@dataclass(frozen=True)
class Resampled:
    """A metric with its mean in each resample; a difference of two, of the same resamples.

    Attributes:
        values: (q,) float64 the metric of each query, of all models.
        means: (b,) float64 its mean over the queries of each resample, with its models.
    """

    values: Floats
    means: Floats

    def __sub__(self, other: Resampled) -> Resampled:
        """Pair two metrics by query and by model."""
        return Resampled(self.values - other.values, self.means - other.means)

    def estimate(self, confidence: float = 0.95) -> Estimate:
        """Return the mean over queries with the percentile interval of the resamples' means.

        Raises:
            BadInput: a confidence outside (0, 1).
        """
        check_confidence(confidence)
        low, high = np.quantile(self.means, [(1 - confidence) / 2, (1 + confidence) / 2])
        mean = float(self.values.mean())
        return Estimate(
            mean, float(low), float(high), float(confidence), tuple(self.values.tolist())
        )


def resampled(values: Numbers, drawn: Resamples) -> Resampled:
    """Resample a metric that retrained models have no part in: only queries are drawn anew.

    Args:
        values: (q,) the metric of each query.
        drawn: of q queries.

    Raises:
        BadInput: values of another shape, or not finite.
    """
    found = numbers(values, "values", 1, "one number per query")
    _check_size(drawn.queries, len(found), "queries")
    return Resampled(found, drawn.mean(found))


def resampled_lds(
    scores: Numbers, losses: Numbers, subsets: npt.ArrayLike, drawn: Resamples
) -> Resampled:
    """Resample `lds`: in each resample a query's rank correlation is over the models drawn.

    Args:
        scores: as of `lds`, and so the next two.
        losses: (s, q).
        subsets: (s, n) bool.
        drawn: of q queries and s models.

    Raises:
        BadInput: as `lds`, or resamples of other counts.

    Examples:
        >>> subsets = np.random.default_rng(0).random((20, 6)) < 0.5
        >>> effects = np.random.default_rng(1).normal(size=(4, 6))
        >>> losses, drawn = -(subsets @ effects.T), Resamples.draw(4, 20)
        >>> print(resampled_lds(effects, losses, subsets, drawn).estimate())
        1.000 [1.000, 1.000] (4 queries)
    """
    values = np.array(lds(scores, losses, subsets).values)
    sums, measured = subset_sums(scores, losses, subsets)
    _check_size(drawn.queries, sums.shape[1], "queries")
    _check_size(drawn.models, len(sums), "models")
    correlations = [
        _rank_correlations(predicted, -loss, drawn.models)
        for predicted, loss in zip(sums.T, measured.T, strict=True)
    ]
    return Resampled(values, drawn.mean(np.stack(correlations, axis=1)))


def resampled_qld(without_top: Numbers, without_random: Numbers, drawn: Resamples) -> Resampled:
    """Resample `query_loss_difference`: in each resample the mean is over the controls drawn.

    Args:
        without_top: (q,), as there.
        without_random: (c, q), as there.
        drawn: of q queries and c models, the controls.

    Raises:
        BadInput: as there, or resamples of other counts.
    """
    values = np.array(query_loss_difference(without_top, without_random).values)
    removed = numbers(without_top, "without_top", 1, "one loss per query")
    controls = numbers(without_random, "without_random", 2, "losses (c controls, q queries)")
    _check_size(drawn.queries, len(removed), "queries")
    _check_size(drawn.models, len(controls), "models")
    beside = drawn.models @ controls / drawn.models.sum(axis=1, keepdims=True)
    return Resampled(values, drawn.mean(removed - beside))


def _check_size(counts: Floats, size: int, what: str) -> None:
    if counts.shape[1] != size:
        raise BadInput(
            f"drawn is of {counts.shape[1]} {what}, but there are {size}; draw it of as many"
        )


def _rank_correlations(one: Floats, other: Floats, counts: Floats) -> Floats:
    """Compute Spearman's correlation in each resample, (b,), of (s,) and (s,); 0 of a constant."""
    x, y = _ranks(one, counts), _ranks(other, counts)
    norm = np.sqrt((counts * x * x).sum(axis=1) * (counts * y * y).sum(axis=1))
    products = (counts * x * y).sum(axis=1)
    return np.asarray(np.divide(products, norm, out=np.zeros_like(norm), where=norm > 0))


def _ranks(values: Floats, counts: Floats) -> Floats:
    """Rank (s,) values that each resample holds `counts` (b, s) times, less the mean rank."""
    order = np.argsort(values, kind="stable")
    _, first, place = np.unique(values[order], return_index=True, return_inverse=True)
    held = np.add.reduceat(counts[:, order], first, axis=1)
    ranks = np.cumsum(held, axis=1) - held / 2 - counts.sum(axis=1, keepdims=True) / 2
    found = np.empty_like(counts)
    found[:, order] = ranks[:, place]
    return found
