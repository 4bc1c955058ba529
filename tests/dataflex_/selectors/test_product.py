"""The product of influence selectors: what can't be computed is refused before training."""

from __future__ import annotations

from typing import Any

import pytest

from dataflex.selectors.less import LessSelector
from gradstore.scoring.products import InnerProduct


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preconditioner": "fisher"}, "gradient_type: adam_marginal makes two"),
        ({"preconditioner": "fisher", "gradient_type": "adam"}, "set gradient_type: sgd"),
        (
            {"preconditioner": "fisher", "gradient_type": "sgd", "scoring": "direct"},
            "scoring: direct computes plain cosines",
        ),
        ({"normalize": "none", "scoring": "direct"}, "use scoring: projected"),
    ],
)
def test_a_product_that_cannot_be_taken_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LessSelector(**given)


def test_the_product_is_the_one_asked_for() -> None:
    assert LessSelector().product == InnerProduct()
    asked = LessSelector(
        normalize="target", preconditioner="fisher", damping=0.5, gradient_type="sign"
    )
    assert asked.product == InnerProduct("target", "fisher", 0.5)
