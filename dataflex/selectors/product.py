"""The product behind an influence selector's scores, checked against its other parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from dataflex.data.rows import RunData
from dataflex.features.settings import CurvedSettings, FeatureSettings
from gradstore.errors import BadInput
from gradstore.export.kronecker import DAMPING, CurvatureRule, Kind
from gradstore.scoring.metric import Normalize
from gradstore.scoring.preconditioners import PRECONDITIONERS, Preconditioner
from gradstore.scoring.products import InnerProduct

if TYPE_CHECKING:
    from gradstore.scoring.comparable import CheckpointFeatures


#: Preconditioners of stored features, when they are scored, and of gradients, when they are taken.
AnyPreconditioner = Literal[Preconditioner, Kind]


def in_metric(
    preconditioner: AnyPreconditioner, damping: float | None, given: Mapping[str, Any]
) -> FeatureSettings:
    """Return the settings of gradient features, with the metric that they are put into if any.

    Args:
        preconditioner: of the selector.
        damping: of the selector.
        given: a user's parameters of `FeatureSettings`.
    """
    rule = curvature_of(preconditioner, damping)
    return FeatureSettings(**given) if rule is None else CurvedSettings(**given, rule=rule)


def curvature_of(preconditioner: AnyPreconditioner, damping: float | None) -> CurvatureRule | None:
    """Return the metric that gradients are put into when they are taken; None for none."""
    if preconditioner not in get_args(Kind):
        return None
    return CurvatureRule(preconditioner, DAMPING if damping is None else float(damping))  # type: ignore[arg-type]


def product_of(
    normalize: Normalize,
    preconditioner: AnyPreconditioner,
    damping: float | None,
    *,
    scoring: str,
    gradient_type: str,
) -> InnerProduct:
    """Join the three parameters to the product of stored features.

    Raises:
        ValueError: `scoring` or `gradient_type` leave no such product.
    """
    if scoring == "direct" and preconditioner != "none":
        raise ValueError(
            f"preconditioner: {preconditioner} is taken of stored features, and scoring: direct "
            "stores none; use scoring: projected"
        )
    if preconditioner == "kfac" or preconditioner == "ekfac":  # the features are in the metric
        return InnerProduct(normalize)
    of_one_kind = PRECONDITIONERS[preconditioner].of_one_kind
    if of_one_kind and gradient_type not in ("sgd", "sign"):
        raise ValueError(
            f"preconditioner: {preconditioner} needs training and target rows of one kind of "
            f"feature, and gradient_type: {gradient_type} makes two; set gradient_type: sgd"
        )
    try:
        return InnerProduct(normalize, preconditioner, 1.0 if damping is None else float(damping))
    except BadInput as error:
        raise ValueError(str(error)) from error


def check_product(product: InnerProduct, data: RunData) -> None:
    """Refuse, before the model is loaded, target rows that the product can't be taken of.

    Raises:
        BadInput: too few of them have a target token.
    """
    try:
        product.metric.check_targets([np.asarray(rows.target_tokens > 0) for rows in data.targets])
    except BadInput as error:
        raise BadInput(f"component_params: {error}") from error


def product_told(
    product: InnerProduct, checkpoints: Sequence[CheckpointFeatures]
) -> dict[str, Any]:
    """Return the product for a selection's manifest; {} for plain cosines.

    Args:
        product: of the selection.
        checkpoints: that were scored; a subspace says how many dimensions it has at each, features
            in a metric which factors the newest has.
    """
    newest = checkpoints[-1].train if checkpoints else None  # whole gradients have none
    metric = getattr(getattr(newest, "record", None), "curvature", {})
    if metric:
        return {"normalize": product.normalize, "preconditioner": metric["kind"],
                "damping": metric["damping"], "factors": metric["sha256"]}  # fmt: skip
    if product == InnerProduct():
        return {}
    names = {"normalize": product.normalize, "preconditioner": product.preconditioner}
    return {**names, **product.metric.told(checkpoints)}
