"""Calls of one input, whose gradients are one product: query, key and value, gate and up.

A LoRA layer's A has few rows, r of them, and a product of so few fills neither a tensor core nor
the registers of a processor; it reads the input again for each layer. What the As of one input are
multiplied with is written side by side instead, into columns of one tensor, so that no copy joins
it. Together are calls that follow one another with the very same tensor, unchanged in between. The
backward comes in the opposite order, so that a group is complete before another one begins. One
that is not, because a call's output is not in the loss, is taken apart: nothing waits for longer.

Letters: n tokens of a batch, r rank, R ranks of a group's calls together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from gradstore.capture.adapters import HookedModule


class Product(NamedTuple):
    """The two sides of a product that makes gradients.

    Attributes:
        x: (..., in), the input.
        gradient: (n, R), of the matrices' outputs, side by side in the matrices' order.
        watched: the matrices.
    """

    x: Tensor
    gradient: Tensor
    watched: list[HookedModule]


@dataclass(eq=False)
class Group:
    """Calls of one input.

    Attributes:
        input: their x, which is not held.
        version: of x, which a change in place raises.
        dtype: that they compute in.
        watched: their matrices, in the order of the calls.
        numbers: (n, R), from the first call that the backward reaches to the last.
        arrived: calls whose columns are filled.
        apart: each call that is yet to come has numbers of its own.
    """

    input: ref[Tensor]
    version: int
    dtype: torch.dtype
    watched: list[HookedModule]
    numbers: Tensor | None = None
    arrived: int = 0
    apart: bool = False

    def takes(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Return whether a call of x that computes in this dtype belongs here."""
        alike = self.version == x._version and self.dtype == dtype
        return self.input() is x and alike and not self.arrived


@dataclass(frozen=True, eq=False)
class Place:
    """One call's columns in the tensor of its group.

    Attributes:
        group: the group.
        watched: the call's matrix.
        start: the first column.
    """

    group: Group
    watched: HookedModule
    start: int

    def room(self, gradient: Tensor) -> Tensor:
        """Return uninitialised memory (n, r) for the gradient of what the matrix gave.

        Args:
            gradient: (n, out), of the layer's output, on its device and in its dtype.
        """
        group, rank = self.group, self.watched.module.out_features
        if group.apart or len(group.watched) == 1:
            return gradient.new_empty(len(gradient), rank)
        if group.numbers is None:
            width = sum(each.module.out_features for each in group.watched)
            group.numbers = gradient.new_empty(len(gradient), width)
        return group.numbers[:, self.start : self.start + rank]


class Siblings:
    """The groups of one forward and backward."""

    def __init__(self) -> None:
        self._latest: Group | None = None
        self._waiting: list[tuple[Place, Product]] = []

    def join(self, watched: HookedModule, x: Tensor, dtype: torch.dtype) -> Place:
        """Put a call with that before it, if both have one input.

        Args:
            watched: the call's matrix.
            x: (..., in), the very tensor that it was called with.
            dtype: that it computes in.
        """
        if self._latest is None or not self._latest.takes(x, dtype):
            self._latest = Group(ref(x), x._version, dtype, [])
        group = self._latest
        start = sum(each.module.out_features for each in group.watched)
        group.watched.append(watched)
        return Place(group, watched, start)

    def arrive(self, place: Place, x: Tensor, gradient: Tensor) -> list[Product]:
        """Note that a call's columns are filled; return what waits for nothing more.

        Args:
            place: the call's.
            x: (..., in), as it was kept for the backward.
            gradient: (n, r), in what `Place.room` gave.
        """
        group, alone = place.group, Product(x, gradient, [place.watched])
        group.arrived += 1
        if group.apart:
            return [alone]
        before = [] if self._waiting and self._waiting[0][0].group is group else self.rest()
        if len(group.watched) == 1:
            return [*before, alone]
        if group.arrived < len(group.watched):
            self._waiting.append((place, alone))
            return before
        assert group.numbers is not None  # room() was asked for the columns
        self._waiting = []
        whole, group.numbers = group.numbers, None
        return [*before, Product(x, whole, group.watched)]

    def rest(self) -> list[Product]:
        """Take the group that waits apart; return what has come, a product for each call."""
        waiting, self._waiting = self._waiting, []
        for place, _ in waiting:
            place.group.apart, place.group.numbers = True, None
        return [product for _, product in waiting]
