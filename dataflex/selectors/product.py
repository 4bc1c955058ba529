"""The product behind an influence selector's scores, checked against its other parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from dataflex.data.rows import RunData
from gradstore.errors import BadInput
from gradstore.scoring.products import InnerProduct, Normalize, Preconditioner
from gradstore.scoring.subspace import check_targets, subspace_told

if TYPE_CHECKING:
    from gradstore.scoring.comparable import CheckpointFeatures


def product_of(
    normalize: Normalize,
    preconditioner: Preconditioner,
    damping: float,
    *,
    scoring: str,
    gradient_type: str,
) -> InnerProduct:
    """Join the three parameters.

    Raises:
        ValueError: `scoring` or `gradient_type` leave no such product.
    """
    if scoring == "direct" and preconditioner != "none":
        raise ValueError(
            f"preconditioner: {preconditioner} is taken of stored features, and scoring: direct "
            "stores none; use scoring: projected"
        )
    if preconditioner == "fisher" and gradient_type not in ("sgd", "sign"):
        raise ValueError(
            f"preconditioner: {preconditioner} needs training and target rows of one kind of "
            f"feature, and gradient_type: {gradient_type} makes two; set gradient_type: sgd"
        )
    return InnerProduct(normalize, preconditioner, float(damping))


def check_product(product: InnerProduct, data: RunData) -> None:
    """Refuse, before the model is loaded, target rows that the product can't be taken of.

    Raises:
        BadInput: fewer than 2 of them have a target token, and their subspace is asked for.
    """
    if product.preconditioner != "subspace":
        return
    try:
        check_targets([np.asarray(rows.target_tokens > 0) for rows in data.targets])
    except BadInput as error:
        raise BadInput(f"component_params: {error}") from error


def product_told(
    product: InnerProduct, checkpoints: Sequence[CheckpointFeatures]
) -> dict[str, Any]:
    """Return the product for a selection's manifest; {} for plain cosines.

    Args:
        product: of the selection.
        checkpoints: that were scored; a subspace says how many dimensions it has at each.
    """
    if product == InnerProduct():
        return {}
    told = asdict(product)
    if product.preconditioner == "subspace":
        del told["damping"]  # of fisher alone
        told["subspace"] = subspace_told(checkpoints)
    return told
