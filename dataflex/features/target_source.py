"""What may stand in for the gradients of the target rows' own answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from gradkernels import ProjectionSpec

    from dataflex.data.rows import Rows
    from dataflex.run.context import RunContext
    from dataflex.run.log import OnRows
    from gradstore.export.direct import TargetDirections
    from gradstore.export.features import FeatureSpec
    from gradstore.export.units import UnitFeatures
    from gradstore.format.plans import UnitRange


class TargetFeatures(Protocol):
    """Another way to the feature of a target row than the gradient of its own answer.

    Attributes:
        options: what the features depend on beside the model, JSON-like; recorded with them.
    """

    @property
    def options(self) -> Mapping[str, Any]: ...  # noqa: D102

    def compute(
        self,
        run: RunContext,
        rows: Rows,
        unit: UnitRange,
        features: FeatureSpec,
        projection: ProjectionSpec,
        token_budget: int,
        advance: OnRows,
    ) -> UnitFeatures:
        """Projected features of one unit of a target set, the same on whatever rank."""

    def directions(
        self,
        run: RunContext,
        subtasks: Sequence[tuple[Rows, npt.NDArray[np.int64]]],
        features: FeatureSpec,
        token_budget: int,
    ) -> TargetDirections:
        """Mean unit feature of each sub-task (set, positions), without a projection."""
