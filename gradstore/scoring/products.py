"""The inner product that a score is made of: whose norms count, and in which curvature.

Letters: n train rows, d projected dimensions, m target rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.metric import Normalize, Plain, QueryMap
from gradstore.scoring.preconditioners import PRECONDITIONERS, Preconditioner
from gradstore.scoring.scan import FeatureSource
from gradstore.scoring.subspace import usable_targets_of
from gradstore.scoring.subtasks import source_name


@dataclass(frozen=True)
class InnerProduct:
    """The number made of a train row x and a target row t.

    With C = R + l I, s = sqrt(l) C^-1 t / sqrt(t^T C^-1 t), and P the orthogonal projection onto
    the target rows' `Subspace`:

    | normalize | plain | `fisher` | `subspace` |
    |---|---|---|---|
    | cosine | x·t / (norm(x) norm(t)) | x·s / norm(x) | Px·Pt / (norm(x) norm(t)) |
    | target | x·t / norm(t) | x·s | Px·Pt / norm(t) |
    | none | x·t | x·l C^-1 t | Px·Pt |

    R is the second moment of the train rows, unit rows where `cosine`. The factors of l bound the
    first line by 1, and make each line tend to the one without a preconditioner as l grows. Its
    last line is the influence function with the empirical Fisher in the Hessian's place (Koh and
    Liang, arXiv 1703.04730, equation 2), times l.

    Norms are those before any projection, P included: a row is not divided by the norm of Px, which
    would forget how much of it lies outside the targets' subspace. A cosine ignores how far a row
    moves the model; a product with norms predicts what a batch does, but favours rows with long
    gradients: short answers and wrong ones.

    Attributes:
        normalize: whose norms are divided by: both rows', the target row's, or none.
        preconditioner: none | fisher | subspace, the names of `PRECONDITIONERS`.
        damping: l of `fisher`, as a multiple of R's mean eigenvalue, its trace over d; above 0
            there.

    Raises:
        BadInput: an unknown name, damping that is no number >= 0, or 0 of `fisher`.
    """

    normalize: Normalize = "cosine"
    preconditioner: Preconditioner = "none"
    damping: float = 1.0

    def __post_init__(self) -> None:
        """Check names and the number."""
        offered = {"normalize": get_args(Normalize), "preconditioner": tuple(PRECONDITIONERS)}
        for field, names in offered.items():
            if getattr(self, field) not in names:
                raise BadInput(f"{field} is {getattr(self, field)!r}; use " + " | ".join(names))
        given: object = self.damping
        number = isinstance(given, Real) and not isinstance(given, bool)
        if not (number and math.isfinite(self.damping) and self.damping >= 0):
            raise BadInput(f"damping is {self.damping!r}; give a finite number of 0 or more.")
        PRECONDITIONERS[self.preconditioner](self.normalize, self.damping)  # checks the damping

    @property
    def metric(self) -> Plain:
        """The metric that the product is taken in."""
        return PRECONDITIONERS[self.preconditioner](self.normalize, self.damping)

    def check(self, checkpoints: Sequence[CheckpointFeatures]) -> None:
        """Refuse, before a feature is read, rows that this product can't be taken of.

        Raises:
            BadInput: a source without norms where they count, train and target features of
                different kinds where the train rows' curvature is applied to the targets, or
                fewer than 2 usable target rows where their subspace is.
        """
        for checkpoint in checkpoints:
            wanting = {"target": (checkpoint.train,), "none": (checkpoint.train,
                       *checkpoint.targets)}.get(self.normalize, ())  # fmt: skip
            for source in wanting:
                if getattr(source, "norm", None) is None:
                    raise BadInput(
                        f"{source_name(source)} has no norms of its rows, which normalize: "
                        f"{self.normalize} needs; use normalize: cosine."
                    )
            if self.metric.of_one_kind:
                self._check_kinds(checkpoint)
        self.metric.check_targets(usable_targets_of(checkpoints))

    def query_map(
        self,
        checkpoint: CheckpointFeatures,
        usable: Sequence[npt.NDArray[np.bool_]],
        device: torch.device,
    ) -> QueryMap:
        """Return the way from target rows to queries at a checkpoint: that of `Plain.query_map`."""
        return self.metric.query_map(checkpoint, usable, device)

    def scaled(
        self, source: FeatureSource, start: int, products: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """Turn (m, q) products of unit train rows start, start + 1, ... into this one's."""
        if self.normalize == "cosine":
            return products
        norms = np.asarray(_norms(source)[start : start + len(products)], dtype=np.float32)
        return products * norms[:, None]

    def _check_kinds(self, checkpoint: CheckpointFeatures) -> None:
        mine = _kind(checkpoint.train)
        for target in checkpoint.targets:
            theirs = _kind(target)
            if None not in (mine, theirs) and mine != theirs:
                raise BadInput(
                    f"preconditioner: {self.preconditioner} needs training and target rows of one "
                    f"kind of feature, but {source_name(checkpoint.train)} holds {mine} and "
                    f"{source_name(target)} {theirs}. Export with gradient_type: sgd or sign."
                )


COSINE = InnerProduct()


def _norms(source: FeatureSource) -> Any:  # noqa: ANN401 - an array of any float dtype
    return source.norm  # type: ignore[attr-defined]


def _kind(source: FeatureSource) -> str | None:
    record = getattr(source, "record", None)
    return None if record is None else str(record.feature)
