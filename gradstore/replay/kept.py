"""Finished segments of a replay, from which a later call goes on.

Letters: p numbers that are trained, q queries, n training rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from gradstore.replay.steps import State, Vectors


@dataclass(frozen=True, eq=False)
class Backwards:
    """A replay on its way back, between two segments.

    Attributes:
        segments: that are left, the first ones of the run.
        cotangents: q derivatives of the queries' losses by the state in which these end.
        found: (q, n) derivatives by the rows' weights, of the segments behind it.
    """

    segments: int
    cotangents: list[Vectors]
    found: npt.NDArray[np.float64]


class Kept(Protocol):
    """A place that keeps a replay's states.

    Whatever it gives must be, to the bit, what was kept in it, of the same run, segment length and
    queries; a replay checks each segment's end, and takes the rest on trust.
    """

    def state(self, number: int) -> State | None:
        """Return the state in which segment `number` (from 1) ends; None where it is not kept."""
        ...

    def keep_state(self, number: int, state: State) -> None:
        """Keep that state."""
        ...

    def backwards(self) -> Backwards | None:
        """Return what was kept last; None where nothing was."""
        ...

    def keep_backwards(self, done: Backwards) -> None:
        """Keep a segment's end in the place of what was kept before."""
        ...


class Nothing:
    """No place: `Kept` that keeps nothing."""

    def state(self, number: int) -> State | None:
        """Return None."""
        return None

    def keep_state(self, number: int, state: State) -> None:
        """Forget it."""

    def backwards(self) -> Backwards | None:
        """Return None."""
        return None

    def keep_backwards(self, done: Backwards) -> None:
        """Forget it."""
