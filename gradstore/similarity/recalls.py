"""Recalls of searches of rising width, and the narrowest that is wide enough.

Letters: h rows measured on, k nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput

#: Numbers of nearest rows for which the recall is measured.
NEAREST = (10, 100)
#: As many times these numbers of rows are taken from the lists, to be ranked by stored features.
WIDER = 2


@dataclass(frozen=True)
class Measured:
    """The recall of a search of one width.

    Attributes:
        nprobe: lists that are looked through.
        recall: shares of the true nearest rows that are found, for each of `NEAREST`; the mean over
            the rows measured on, of the nearest and of the farthest rows the smaller one.
    """

    nprobe: int
    recall: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """Recalls of searches of rising width, measured on some rows.

    Attributes:
        rows: how many.
        points: rising nprobe.
    """

    rows: int
    points: list[Measured]

    @classmethod
    def of(cls, kept: Any) -> Self:  # noqa: ANN401 - what JSON gave
        """Read what `asdict` made."""
        return cls(
            int(kept["rows"]),
            [Measured(int(e["nprobe"]), tuple(map(float, e["recall"]))) for e in kept["points"]],
        )


def width(curve: Curve, k: int, recall: float) -> tuple[Measured, int] | None:
    """Find the narrowest search of k rows that reaches a recall; None where none does.

    Returns:
        The measurement, and the number of nearest rows that its recall is of.

    Raises:
        BadInput: k is above the largest number for which the recall is measured.
    """
    if k > NEAREST[-1]:
        raise BadInput(
            f"{k} rows on each side asked of lists whose recall is measured up to {NEAREST[-1]}; "
            f"ask for at most {NEAREST[-1]}, or for the exact answer"
        )
    place = next(i for i, most in enumerate(NEAREST) if k <= most)
    enough = (each for each in curve.points if each.recall[place] >= recall)
    return next(((each, NEAREST[place]) for each in enough), None)


def smaller(one: Curve, other: Curve) -> Curve:
    """Join two curves to that of the smaller recalls; the last of a shorter one stays its recall.

    Examples:
        >>> short, long = [Measured(1, (1.0,))], [Measured(1, (0.5,)), Measured(2, (0.75,))]
        >>> smaller(Curve(3, short), Curve(5, long)).points[1]
        Measured(nprobe=2, recall=(0.75,))
    """
    longer, shorter = sorted((one.points, other.points), key=len, reverse=True)
    filled = shorter + shorter[-1:] * (len(longer) - len(shorter))
    points = [
        Measured(a.nprobe, tuple(map(min, zip(a.recall, b.recall, strict=True))))
        for a, b in zip(longer, filled, strict=True)
    ]
    return Curve(one.rows + other.rows, points)


def probes(most: int) -> list[int]:
    """List the widths that are tried: 1, 2, 3, 4, 6, 8, 12, 16 ... and the most."""
    steps = {2**power for power in range(most.bit_length())}
    steps |= {3 * step // 2 for step in steps if step > 1}
    return sorted({step for step in steps if step < most} | {most})


def share(
    rows: npt.NDArray[np.int64], own: npt.NDArray[np.int64], nearest: npt.NDArray[np.int64]
) -> float:
    """Return the share of the true nearest rows among as many answers as a query would take."""
    k, found = nearest.shape[1], 0
    for answers, row, true in zip(rows, own, nearest, strict=True):
        found += int(np.isin(true, answers[answers != row][: WIDER * k]).sum())
    return found / nearest.size
