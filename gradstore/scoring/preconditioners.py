"""Metrics that a product of stored rows may be taken in, by name: `PRECONDITIONERS`.

docs/add-a-preconditioner.md adds one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.curvature import Fisher, check_damping, fisher_told
from gradstore.scoring.metric import Plain, QueryMap
from gradstore.scoring.subspace import Subspace, check_targets, subspace_told

#: The keys of `PRECONDITIONERS`.
Preconditioner = Literal["none", "fisher", "subspace"]


class FisherMetric(Plain):
    """The second moment of the train rows, damped and inverted (`curvature`)."""

    of_one_kind = True
    of_train_rows = True

    def __post_init__(self) -> None:
        """Check the damping."""
        check_damping(self.damping)

    def query_map(
        self,
        checkpoint: CheckpointFeatures,
        usable: Sequence[npt.NDArray[np.bool_]],
        device: torch.device,
    ) -> QueryMap:
        """Fit the matrix; see `Plain.query_map`."""
        fisher = Fisher.of(
            checkpoint.train, unit=self.normalize == "cosine", damping=self.damping, device=device
        )
        if self.normalize == "none":
            return lambda unit, norms: fisher.solve(self.lengthened(unit, norms))
        return lambda unit, norms: fisher.whitened_unit(unit)

    def told(self, checkpoints: Sequence[CheckpointFeatures]) -> dict[str, Any]:
        """Tell the damping's level and the rows of each fit; see `Plain.told`."""
        trains = [checkpoint.train for checkpoint in checkpoints]
        return fisher_told(trains, unit=self.normalize == "cosine", damping=self.damping)


class SubspaceMetric(Plain):
    """The main directions of the target rows (`subspace`)."""

    def check_targets(self, usable: Sequence[npt.NDArray[np.bool_]]) -> None:
        """Refuse fewer target rows than share a direction; see `Plain.check_targets`."""
        check_targets(usable)

    def query_map(
        self,
        checkpoint: CheckpointFeatures,
        usable: Sequence[npt.NDArray[np.bool_]],
        device: torch.device,
    ) -> QueryMap:
        """Find the directions; see `Plain.query_map`."""
        space = Subspace.of(checkpoint.targets, usable, device=device)
        return lambda unit, norms: space.project(self.lengthened(unit, norms))

    def told(self, checkpoints: Sequence[CheckpointFeatures]) -> dict[str, Any]:
        """Tell how many directions are kept; see `Plain.told`."""
        return {"subspace": subspace_told(checkpoints)}


#: Name -> metric: the one place that a new one is entered, beside its name in `Preconditioner`.
PRECONDITIONERS: Mapping[Preconditioner, type[Plain]] = {
    "none": Plain,
    "fisher": FisherMetric,
    "subspace": SubspaceMetric,
}
