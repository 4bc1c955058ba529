"""Metrics that compare scores with what retraining on other rows does to each query's loss.

A score is high where a row is said to lower the query's loss. Letters: n training rows, q queries,
s subsets, c random controls, k rows at the top.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect_whole
from gradstore.evaluation.estimates import (
    Estimate,
    Floats,
    Mask,
    Numbers,
    estimate,
    numbers,
    row_masks,
    score_matrix,
    spearman,
)
from gradstore.scoring.selection import rows_for_fraction, select_top

#: Subsets below which a rank correlation says nothing.
LEAST_SUBSETS = 3


def draw_subsets(rows: int, subsets: int, fraction: float = 0.5, *, seed: int = 0) -> Mask:
    """Draw random subsets of the rows to retrain on, all of one size, without replacement.

    Args:
        rows: n.
        subsets: s.
        fraction: of the rows in each subset, above 0 and at most 1; rounded down, at least 1.
        seed: the same arguments give the same subsets; more subsets begin with the fewer.

    Returns:
        (s, n) bool, True for rows to train on.

    Raises:
        BadInput: a count below 1, or a fraction outside (0, 1].

    Examples:
        >>> draw_subsets(4, 3, 0.5).sum(axis=1).tolist()
        [2, 2, 2]
    """
    count, drawn = expect_whole(rows, "rows"), expect_whole(subsets, "subsets")
    size, start = rows_for_fraction(fraction, count), expect_whole(seed, "seed", 0)
    masks = np.zeros((drawn, count), dtype=bool)
    generator = np.random.default_rng(start)
    for mask in masks:
        mask[generator.permutation(count)[:size]] = True
    return masks


def without_top(scores: Numbers, share: float = 0.01) -> Mask:
    """Return, for each query, the rows that are left without its highest scored share.

    Args:
        scores: (q, n), higher for rows that help; (n,) for one query.
        share: of the rows to remove, above 0 and at most 1; rounded down, at least 1 row.

    Returns:
        (q, n) bool, True for rows to train on.

    Raises:
        BadInput: scores of another shape or not finite, a share outside (0, 1].
    """
    values = score_matrix(scores)
    count = rows_for_fraction(share, values.shape[1])
    kept = np.ones(values.shape, dtype=bool)
    for mask, row in zip(kept, values, strict=True):
        mask[select_top(row, count)] = False
    return kept


def lds(scores: Numbers, losses: Numbers, subsets: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Compute the linear datamodelling score: do summed scores order the retrained models?

    Per query the Spearman correlation over the subsets S of

        sum of scores over the rows of S   and   -(loss after training on S),

    equal values sharing their mean rank; 1 is a perfect order, -1 a reversed one (Park et al.,
    TRAK, 2303.14186, linear datamodeling score). A query whose sums are all equal counts as 0: its
    scores order nothing.

    Args:
        scores: (q, n), higher for rows that lower the query's loss; (n,) for one query.
        losses: (s, q) loss of each query after training on each subset. A measure that rises as a
            model gets better (a margin, a log-probability) is given with its sign changed.
        subsets: (s, n) bool, True for rows that were trained on; s is at least 3.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a number that is not finite, too few subsets, a query
            whose measured losses are all equal.

    Examples:
        >>> subsets = [[True, False, False], [False, True, False], [False, False, True]]
        >>> lds([0.1, 0.2, 0.3], [[0.9], [0.7], [0.8]], subsets).mean
        0.5
    """
    sums, measured = subset_sums(scores, losses, subsets)
    if (flat := np.flatnonzero(np.ptp(measured, axis=0) == 0)).size:
        raise BadInput(
            f"losses of query {flat[0]} are the same after every subset; train longer, or leave "
            "the query out"
        )
    return estimate(
        [spearman(sums[:, query], -measured[:, query]) for query in range(sums.shape[1])],
        seed=seed,
    )


def subset_sums(scores: Numbers, losses: Numbers, subsets: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Sum scores over the rows of each subset, beside what was measured: two (s, q) float64.

    Args:
        scores: as of `lds`, and so the others.
        losses: (s, q).
        subsets: (s, n) bool.

    Raises:
        BadInput: shapes that do not fit, a number that is not finite, too few subsets.
    """
    values = score_matrix(scores)
    queries, rows = values.shape
    measured = numbers(losses, "losses", 2, f"losses (s subsets, {queries} queries)")
    masks = row_masks(subsets, "subsets", rows)
    if measured.shape != (len(masks), queries):
        raise BadInput(
            f"losses are {measured.shape}; give one per subset and query: ({len(masks)}, {queries})"
        )
    if len(masks) < LEAST_SUBSETS:
        raise BadInput(
            f"{len(masks)} subsets have no rank correlation worth the name; retrain on at least "
            f"{LEAST_SUBSETS} (100 is usual)"
        )
    return np.stack([values[:, mask].sum(axis=1) for mask in masks]), measured


def query_loss_difference(
    without_top: Numbers, without_random: Numbers, *, seed: int = 0
) -> Estimate:
    """Compute the loss rise after retraining without the top rows, against random removals.

    Per query (loss without its top share) - (mean loss over the controls that lost as many random
    rows), in nats; above 0 where the score found rows that mattered (bergson's leaderboard: QLD).

    Args:
        without_top: (q,) loss of each query after retraining without the rows that are highest for
            it (`without_top` draws them).
        without_random: (c, q) losses after retraining without as many rows at random.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a loss that is not finite.

    Examples:
        >>> query_loss_difference([2.5, 3.0], [[2.0, 2.5], [2.0, 3.0]]).values
        (0.5, 0.25)
    """
    removed = numbers(without_top, "without_top", 1, "one loss per query")
    wanted = f"losses (c controls, {removed.size} queries)"
    controls = numbers(without_random, "without_random", 2, wanted)
    if controls.shape[1] != removed.size:
        raise BadInput(f"without_random has shape {controls.shape}; give {wanted}.")
    return estimate((removed - controls.mean(axis=0)).tolist(), seed=seed)


def tail_patch(before: Numbers, after: Numbers, *, seed: int = 0) -> Estimate:
    """Compute the rise of the answer's probability after one more step on a row of the top.

    Per query the mean over its k top rows of p(answer after a step on that row alone) - p(answer
    before) (TrackStar 2410.17413, tail-patch score).

    Args:
        before: (q,) probability of each query's answer.
        after: (q, k) the same after one step on each of its top rows, each from the same model.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a number that is not from 0 to 1 (a summed loss L is the
            probability exp(-L)).

    Examples:
        >>> tail_patch([0.25], [[0.5, 0.25]]).mean
        0.125
    """
    first = numbers(before, "before", 1, "one probability per query")
    wanted = f"probabilities ({first.size} queries, k rows)"
    patched = numbers(after, "after", 2, wanted)
    if len(patched) != first.size:
        raise BadInput(f"after has shape {patched.shape}; give {wanted}.")
    for name, found in (("before", first), ("after", patched)):
        if found.min() < 0 or found.max() > 1:
            raise BadInput(
                f"{name} goes from {found.min():g} to {found.max():g}; give probabilities from 0 "
                "to 1 (exp(-loss) of a summed loss)"
            )
    return estimate((patched - first[:, None]).mean(axis=1).tolist(), seed=seed)


def tail_patch_log(before: Numbers, after: Numbers, random: Numbers, *, seed: int = 0) -> Estimate:
    """Compute the rise of the answer's log-probability after a step on a top row, against random.

    Per query mean over its top rows of log p(answer after a step on that row alone) - log p(answer
    before), less the same mean over random rows. `tail_patch` in nats, for answers whose
    probability is too small to rise visibly; above 0 where the top rows help more than any would.

    Args:
        before: (q,) log-probability of each query's answer, the sum over its tokens.
        after: (q, k) the same after one step on each of its top rows, each from the same model.
        random: (q, c) the same after one step on each of c random rows.
        seed: of the interval's bootstrap.

    Raises:
        BadInput: shapes that do not fit, a number that is not finite or above 0.

    Examples:
        >>> tail_patch_log([-3.0], [[-2.0, -2.5]], [[-3.0, -2.5]]).mean
        0.5
    """
    first = numbers(before, "before", 1, "one log-probability per query")
    means = []
    for name, given in (("after", after), ("random", random)):
        wanted = f"log-probabilities ({first.size} queries, rows)"
        found = numbers(given, name, 2, wanted)
        if len(found) != first.size:
            raise BadInput(f"{name} has shape {found.shape}; give {wanted}.")
        if max(found.max(), first.max()) > 0:
            raise BadInput(
                f"{name} and before go up to {max(found.max(), first.max()):g}; a log-probability "
                "is at most 0 (the negative of a summed loss)"
            )
        means.append((found - first[:, None]).mean(axis=1))
    return estimate((means[0] - means[1]).tolist(), seed=seed)
