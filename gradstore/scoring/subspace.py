"""The target rows' own subspace: the main directions of their stored features.

Letters: t target rows, d projected dimensions, k dimensions kept, m queries.

The idea is GIST's (Min et al. 2026, arXiv 2602.18584): what target gradients share spans few
directions, and the rest of a target gradient is its own noise. Nothing is exported again and the
scan costs what it costs without: a training row's product with a projected query is that of both
rows projected, so training rows are left as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.scan import FeatureSource, exact_float32
from gradstore.scoring.subtasks import unit_blocks, usable_everywhere

#: Share of the squared singular values of the target rows that a subspace keeps.
KEPT = 0.9
#: Fewer target rows share nothing that could be told from what is each one's own.
FEWEST_TARGETS = 2

#: Squared singular values are equal, and kept or left out together, up to this relative difference.
_TIE = 1e-6


class Subspace:
    """The span of the first k right singular vectors of the (t, d) unit target rows.

    Attributes:
        rows: t.
    """

    def __init__(self, basis: Tensor, rows: int) -> None:
        """Keep what `of` computed.

        Args:
            basis: (k, d) float64, orthonormal rows.
            rows: t.
        """
        self._basis, self.rows = basis, rows

    @classmethod
    def of(
        cls,
        targets: Sequence[FeatureSource],
        usable: Sequence[npt.NDArray[np.bool_]],
        *,
        kept: float = KEPT,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Find it from all usable rows of all target sets, each at length 1.

        k is the least number of squared singular values that add up to `kept` of all, and those
        equal to the last one: so neither the order of rows nor a rotation of the features can
        change the subspace. With t > 2d rows are folded to d with the same singular values and
        right vectors (the R of a QR factorisation): 8 t d bytes are held, 16 d^2 at most, and up to
        five times that while they are decomposed.

        Args:
            targets: a checkpoint's target sets.
            usable: per target set, (rows,) bool.
            kept: share of the squared singular values.
            device: where it is computed.

        Raises:
            BadInput: fewer than 2 usable rows, or a row marked usable that has no direction.
        """
        check_targets(usable)
        dim = targets[0].dim
        held = torch.empty(0, dim, dtype=torch.float64, device=device)
        with exact_float32():
            for source, mask in zip(targets, usable, strict=True):
                for _, rows in unit_blocks(source, mask, 0, source.rows):
                    held = torch.cat([held, torch.from_numpy(rows).to(device)])
                    if len(held) > 2 * dim:
                        held = torch.linalg.qr(held, mode="r").R
            _, values, basis = torch.linalg.svd(held, full_matrices=False)
        energy = (values**2).cpu().numpy()
        last = energy[least_count(energy, kept) - 1]
        count = int((energy >= last * (1 - _TIE)).sum())
        return cls(basis[:count].contiguous(), sum(int(mask.sum()) for mask in usable))

    @property
    def dims(self) -> int:
        """k, the dimensions kept."""
        return len(self._basis)

    def project(self, queries: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return the orthogonal projection of (m, d) queries."""
        given = torch.from_numpy(np.ascontiguousarray(queries)).to(self._basis.device)
        return np.asarray((given @ self._basis.T @ self._basis).cpu().numpy())


def least_count(energy: npt.NDArray[np.float64], kept: float) -> int:
    """Count the first of (r,) falling numbers that add up to a share of their sum, at least 1.

    Examples:
        >>> least_count(np.array([6.0, 3.0, 1.0]), 0.9)
        2
    """
    share = np.cumsum(energy) / energy.sum()
    return int(np.searchsorted(share, kept - 1e-12).clip(0, len(energy) - 1)) + 1


def subspace_told(
    checkpoints: Sequence[CheckpointFeatures], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Tell what is kept at each checkpoint: the share, t, and k of each checkpoint.

    Raises:
        BadInput: as for `Subspace.of`.
    """
    usable = usable_targets_of(checkpoints)
    found = [Subspace.of(each.targets, usable, device=device) for each in checkpoints]
    return {"kept": KEPT, "rows": found[0].rows, "dims": [each.dims for each in found]}


def usable_targets_of(checkpoints: Sequence[CheckpointFeatures]) -> list[npt.NDArray[np.bool_]]:
    """Return for each target set which rows, (rows,) bool, are usable at every checkpoint."""
    sets = zip(*(checkpoint.targets for checkpoint in checkpoints), strict=True)
    return [usable_everywhere(one_set) for one_set in sets]


def check_targets(usable: Sequence[npt.NDArray[np.bool_]]) -> None:
    """Refuse fewer usable target rows than a subspace can be found from.

    Args:
        usable: per target set, (rows,) bool.

    Raises:
        BadInput: fewer than `FEWEST_TARGETS`.
    """
    count = sum(int(np.count_nonzero(mask)) for mask in usable)
    if count < FEWEST_TARGETS:
        raise BadInput(
            f"{count} of {sum(len(mask) for mask in usable)} target rows can be used, and "
            f"preconditioner: subspace needs {FEWEST_TARGETS} or more, since it keeps what they "
            "share; give it rows with target tokens and finite, non-zero gradients, or use "
            "preconditioner: none."
        )
