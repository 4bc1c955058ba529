"""Choice of the rows of one step together: towards a target, away from each other.

Letters: n candidate rows, k chosen.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradstore.errors import expect, expect_whole

Floats = npt.NDArray[np.float64]


def relative_products(
    dots: Floats, gram: Floats, direction_norm: float, *, cosine: bool = False
) -> tuple[Floats, Floats]:
    """Free products of gradients of their scale, which changes while a model trains.

    Args:
        dots: (n,) products of the rows' gradients with the target direction.
        gram: (n, n) products with each other.
        direction_norm: length of the target direction.
        cosine: divide each gradient by its own length; else all by their root mean square length,
            so that long gradients count for more.

    Returns:
        (n,) products with the unit direction, nan where a row's gradient is not finite; (n, n)
        products with each other, whose diagonal is 1 (cosine), or 1 on average. Zeros where a
        gradient or the direction is zero.

    Examples:
        >>> s, g = relative_products(np.array([8.0, 0.0]), np.diag([4.0, 16.0]), 4.0, cosine=True)
        >>> s.tolist(), g.tolist()
        ([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0]])
    """
    squares = np.diagonal(gram)
    sound = np.isfinite(dots) & np.isfinite(squares)
    lengths = np.sqrt(np.where(sound, squares, 0.0))
    if not cosine:
        mean = np.sqrt((lengths**2).sum() / max(1, int(sound.sum())))
        lengths = np.full(len(dots), mean)
    scale = np.divide(1.0, lengths, out=np.zeros(len(dots)), where=lengths > 0)
    towards = dots * scale / direction_norm if direction_norm > 0 else np.zeros(len(dots))
    pairs = np.ix_(sound, sound)
    among = np.zeros_like(gram)
    among[pairs] = (gram * np.outer(scale, scale))[pairs]
    return np.where(sound, towards, np.nan), among


def choose_jointly(
    towards: Floats, among: Floats, k: int, redundancy: float, noise: Floats | None = None
) -> npt.NDArray[np.int64]:
    """Choose k rows one by one, each the one that raises the value of the step most.

    The value of rows S is s(S) - redundancy / 2 * |g(S)|^2, where s(S) is the mean of their
    products with the target direction and g(S) the mean of their gradients, k of them: what a step
    gains in first order, less what it loses by curvature that is alike in all directions (GREATS,
    NeurIPS 2024). With redundancy 1 and relative products it is largest where the mean
    gradient is nearest to the unit direction. Rows that are alike make a long mean.

    Args:
        towards: (n,) products with the direction; a nan is never chosen.
        among: (n, n) products with each other.
        k: how many; fewer are answered where fewer can be chosen.
        redundancy: weight of the second term, 0 or more.
        noise: (n,) added to what each row gains, k times over. Gumbel noise times T makes the
            choice a draw without replacement: at redundancy 0 with probabilities softmax(s / T).

    Returns:
        (up to k,) int64, in the order of choice; ties go to the lower row.

    Raises:
        BadInput: k below 1, or a redundancy below 0 or not finite.

    Examples:
        Row 1 repeats row 0, which is best; row 2 is another way to the target.

        >>> s = np.array([0.8, 0.8, 0.6])
        >>> g = np.array([[1, 1, 0], [1, 1, 0], [0, 0, 1.0]])
        >>> choose_jointly(s, g, 2, 0.0).tolist(), choose_jointly(s, g, 2, 1.0).tolist()
        ([0, 1], [0, 2])
    """
    k = expect_whole(k, "k")
    expect(0 <= redundancy < np.inf, "redundancy", redundancy, "a number of 0 or more")
    free = ~np.isnan(towards)
    alone = towards if noise is None else towards + noise
    alone = alone - redundancy / k * np.diagonal(among) / 2
    beside = np.zeros(len(towards))  # products with the chosen rows, summed
    chosen: list[int] = []
    for _ in range(min(k, int(free.sum()))):
        gains = np.where(free, alone - redundancy / k * beside, -np.inf)
        best = int(gains.argmax())
        chosen.append(best)
        free[best] = False
        beside += among[:, best]
    return np.array(chosen, dtype=np.int64)
