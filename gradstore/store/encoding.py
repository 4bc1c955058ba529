"""Values of a unit as they are stored, made of what an exporter computed."""

from __future__ import annotations

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.codec import encode, settle_status
from gradstore.format.layout import RowStatus
from gradstore.format.plans import Plan, UnitRange

#: What an exporter may call a row.
_COMPUTED = [code.value for code in RowStatus]


def encoded_unit(
    plan: Plan,
    unit: UnitRange,
    features: np.ndarray,
    norm: np.ndarray,
    status: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Encode the k rows of a unit.

    Args:
        plan: the generation's plan.
        unit: which unit.
        features: (k, d) float32, the unit's rows in the order of the plan.
        norm: (k,) float32, norm of each feature before projection.
        status: (k,) uint8 `RowStatus` as the exporter saw it.
        tokens: (k,) target tokens per row.
        loss: (k,) float32, where the plan keeps losses.

    Returns:
        Array name -> (k, ...) values in the stored dtype.

    Raises:
        BadInput: a shape is wrong, a status unknown, or losses are missing.
    """
    k = unit.stop - unit.start
    features = np.asarray(features, dtype=np.float32)
    norm, status, tokens = np.asarray(norm, np.float32), np.asarray(status), np.asarray(tokens)
    shapes = (features.shape, norm.shape, status.shape, tokens.shape)
    if shapes != ((k, plan.dim), (k,), (k,), (k,)):
        raise BadInput(
            f"unit {unit.index} of {plan.name} needs features ({k}, {plan.dim}) and norm, "
            f"status, tokens ({k},), not {', '.join(map(str, shapes))}"
        )
    if not np.isin(status, _COMPUTED).all():
        raise BadInput(f"status codes are {np.unique(status)}; they must be 0 to 4; use RowStatus")
    settled = settle_status(features, norm, status)
    stored, scale = encode(features, settled == RowStatus.OK, plan.dtype)
    return {
        "features": stored,
        "scale": scale,
        "norm": norm,
        "status": settled,
        "tokens": tokens,
        "row_hash": plan.rows.hashes[unit.start : unit.stop],
        **_losses(plan, unit, loss),
    }


def _losses(plan: Plan, unit: UnitRange, loss: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the array of losses, where the plan keeps them."""
    if not plan.losses:  # also where an earlier release made the plan
        return {}
    k = unit.stop - unit.start
    given = np.empty(0) if loss is None else np.asarray(loss, np.float32)
    if given.shape != (k,):
        raise BadInput(
            f"unit {unit.index} of {plan.name} needs losses ({k},), not {given.shape}; give "
            "them, or begin the generation without losses"
        )
    return {"loss": given}
