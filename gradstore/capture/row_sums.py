"""One call's part of a weight's gradient, made for some rows of the weight when they are asked for.

Letters: b batch, t tokens, s target positions of a batch, h hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from gradstore.capture.hooks import outer_sums
from gradstore.capture.limits import ran_out_of_memory


class RowSum(Protocol):
    """One call's part of a slot's gradient."""

    def rows(self, low: int, high: int) -> Tensor:
        """Make rows [low, high) of the parameter's gradient: (b, high - low, width) float32."""


@dataclass(frozen=True)
class Outer:
    """Sum over tokens of left times right: (b, t, out), (b, t, in)."""

    left: Tensor
    right: Tensor

    def rows(self, low: int, high: int) -> Tensor:
        """Make rows [low, high): (b, high - low, in) float32."""
        flat = outer_sums(self.left[:, :, low:high], self.right)
        return flat.view(len(flat), high - low, -1)


@dataclass(frozen=True)
class Gathered:
    """The same of tokens that stand one behind another, (s, out) and (s, in), `counts` to a row."""

    left: Tensor
    right: Tensor
    counts: list[int]

    def rows(self, low: int, high: int) -> Tensor:
        """Make rows [low, high): (b, high - low, in) float32."""
        left = torch.split(self.left[:, low:high], self.counts)
        pairs = zip(left, torch.split(self.right, self.counts), strict=True)
        flat = torch.cat([outer_sums(out[None], x[None]) for out, x in pairs])
        return flat.view(len(flat), high - low, -1)


@dataclass(frozen=True)
class Scattered:
    """Gradients (b, t, h) added up by token (b, t); those of `padding` are none."""

    tokens: Tensor
    gradient: Tensor
    padding: int | None

    def rows(self, low: int, high: int) -> Tensor:
        """Make rows [low, high): (b, high - low, h) float32."""
        batch, width, count = len(self.tokens), self.gradient.shape[2], high - low
        here = (self.tokens >= low) & (self.tokens < high)
        if self.padding is not None:
            here &= self.tokens != self.padding
        row, column = here.nonzero(as_tuple=True)
        block = torch.zeros(batch * count, width, device=self.gradient.device)
        places = row * count + self.tokens[row, column] - low
        values = self.gradient[row, column].float()
        block.index_put_((places,), values, accumulate=True)  # in a fixed order on a GPU, too
        return block.view(batch, count, width)


@dataclass(frozen=True)
class Whole:
    """A vector's gradient (b, n) float32."""

    block: Tensor

    def rows(self, low: int, high: int) -> Tensor:
        """Cut elements [low, high) out: (b, high - low, 1)."""
        return self.block[:, low:high, None]


def vector_gradients(
    module: nn.Module, names: Iterable[str], x: Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients (b, n) float32 of a module's vectors from one call alone.

    The module is run again on its input, each row by itself.

    Args:
        module: a norm, or another one whose parameters are vectors.
        names: of its parameters.
        x: (b, ..., n), the call's input.
        gradient: (b, ..., n), of its output.
    """
    values = {name: module._parameters[name] for name in names}
    given = {name: value.detach() for name, value in values.items() if value is not None}

    def of_row(row: Tensor, upstream: Tensor) -> dict[str, Tensor]:
        def run(held: dict[str, Tensor]) -> Tensor:
            result: Tensor = functional_call(module, held, (row.unsqueeze(0),))
            return result

        back = vjp(run, given)[1]
        found: dict[str, Tensor] = back(upstream.unsqueeze(0))[0]
        return found

    try:
        each = vmap(of_row)(x, gradient)
    except RuntimeError as error:  # an operation that functorch cannot batch
        if ran_out_of_memory(error):
            raise
        single = [of_row(row, upstream) for row, upstream in zip(x, gradient, strict=True)]
        each = {name: torch.stack([row[name] for row in single]) for name in given}
    return {name: block.detach().float() for name, block in each.items()}
