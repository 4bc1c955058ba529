"""Target features made of other gradients than those of the target rows' own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gradstore.export.combined import WeightedRow


class TargetFeatures(Protocol):
    """Another way to the feature of a target row than the gradient of its own answer.

    Attributes:
        options: what the features depend on beside the model, JSON-like; recorded with them.
    """

    @property
    def options(self) -> Mapping[str, Any]: ...  # noqa: D102

    def weighted(self, name: str, positions: Sequence[int]) -> list[WeightedRow]:
        """Give rows of target set `name` as weighted sums of gradients, alike on whatever rank."""
