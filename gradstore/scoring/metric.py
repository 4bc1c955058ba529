"""Metrics of stored rows, as the products need them: a way from target rows to queries.

Letters: n train rows, d projected dimensions, m target rows.

A metric changes target rows into queries; train rows stay as they are stored, so that a scan costs
what it costs without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch

from gradstore.scoring.comparable import CheckpointFeatures

Normalize = Literal["cosine", "target", "none"]
FloatArray = npt.NDArray[np.float64]

#: (directions (m, d) unit, norms (m,)) -> (m, d) queries.
QueryMap = Callable[[FloatArray, FloatArray], FloatArray]


@dataclass(frozen=True)
class Plain:
    """No metric: the product of rows as they are. Base of the metrics.

    Attributes:
        normalize: whose norms are divided by.
        damping: of metrics that have any.

    Raises:
        BadInput: a damping that the metric can't have.
    """

    normalize: Normalize
    damping: float

    #: Train and target rows must be features of one kind.
    of_one_kind: ClassVar[bool] = False
    #: It is made of train rows, of which a choice among some has too few.
    of_train_rows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the damping, where it counts."""

    def check_targets(self, usable: Sequence[npt.NDArray[np.bool_]]) -> None:
        """Refuse target rows that there is no metric of, before a feature is read.

        Args:
            usable: per target set, (rows,) bool.

        Raises:
            BadInput: too few of them are usable.
        """

    def query_map(
        self,
        checkpoint: CheckpointFeatures,
        usable: Sequence[npt.NDArray[np.bool_]],
        device: torch.device,
    ) -> QueryMap:
        """Return the way from target rows to queries at a checkpoint.

        Args:
            checkpoint: its rows.
            usable: per target set, (rows,) bool: rows usable at every combined checkpoint.
            device: where a matrix lives.

        Raises:
            BadInput: the rows leave no metric.
        """
        return self.lengthened

    def told(self, checkpoints: Sequence[CheckpointFeatures]) -> dict[str, Any]:
        """Tell, beside its name, what a selection's manifest needs to repeat it."""
        return {"damping": self.damping}

    def lengthened(self, unit: FloatArray, norms: FloatArray) -> FloatArray:
        """Return (m, d) target rows of the length that counts."""
        return unit * norms[:, None] if self.normalize == "none" else unit
