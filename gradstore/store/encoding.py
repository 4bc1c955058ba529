"""Values of a unit as they are stored, made of what an exporter computed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.codec import encode, row_maxima, settle_status
from gradstore.format.layout import RowStatus
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.records import NO_HASH

#: What an exporter may call a row.
_COMPUTED = [code.value for code in RowStatus if code != RowStatus.FORGOTTEN]


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
    largest = row_maxima(features)
    settled = settle_status(largest, norm, status)
    stored, scale = encode(features, settled == RowStatus.OK, plan.dtype, largest)
    values = {
        "features": stored,
        "scale": scale,
        "norm": norm,
        "status": settled,
        "tokens": tokens,
        "row_hash": plan.rows.hashes[unit.start : unit.stop],
        **_losses(plan, unit, loss),
    }
    return without_forgotten(plan, unit, values)


def without_forgotten(
    plan: Plan, unit: UnitRange, values: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return stored values of a unit with nothing of the rows that its plan calls forgotten.

    Args:
        plan: of the generation that the values are for.
        unit: which unit.
        values: array name -> (k, ...) stored values; not changed.
    """
    gone = plan.rows.forgotten[unit.start : unit.stop]
    if not gone.any():
        return dict(values)
    nothing = np.zeros((1, plan.dim), np.float32)
    features, scale = encode(nothing, np.zeros(1, dtype=bool), plan.dtype)
    nan = np.float32("nan")
    blank = {"features": features[0], "scale": scale[0], "norm": nan, "loss": nan,
             "status": RowStatus.FORGOTTEN.value, "tokens": 0,
             "row_hash": np.frombuffer(NO_HASH, np.uint8)}  # fmt: skip
    changed = {name: array.copy() for name, array in values.items()}
    for name, array in changed.items():
        array[gone] = blank[name]
    return changed


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
