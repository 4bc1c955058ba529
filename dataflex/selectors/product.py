"""The product behind an influence selector's scores, checked against its other parameters."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gradstore.scoring.products import InnerProduct, Normalize, Preconditioner


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
    if scoring == "direct" and (normalize, preconditioner) != ("cosine", "none"):
        raise ValueError(
            f"scoring: direct computes plain cosines, not normalize: {normalize} with "
            f"preconditioner: {preconditioner}; use scoring: projected"
        )
    if preconditioner != "none" and gradient_type not in ("sgd", "sign"):
        raise ValueError(
            f"preconditioner: {preconditioner} needs training and target rows of one kind of "
            f"feature, and gradient_type: {gradient_type} makes two; set gradient_type: sgd"
        )
    return InnerProduct(normalize, preconditioner, float(damping))


def product_told(product: InnerProduct) -> dict[str, Any]:
    """Return the product for a selection's manifest; {} for plain cosines."""
    return {} if product == InnerProduct() else asdict(product)
