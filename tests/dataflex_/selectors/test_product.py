"""The product of influence selectors: what can't be computed is refused before training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from dataflex.data.rows import Rows
from dataflex.selectors.less import LessSelector
from dataflex.selectors.product import product_told
from gradstore.errors import BadInput
from gradstore.export.kronecker import CurvatureRule
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.products import InnerProduct

KFAC = {"preconditioner": "kfac", "gradient_type": "sgd"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"preconditioner": "fisher"}, "gradient_type: adam_marginal makes two"),
        ({"preconditioner": "fisher", "gradient_type": "adam"}, "set gradient_type: sgd"),
        (
            {"preconditioner": "fisher", "gradient_type": "sgd", "scoring": "direct"},
            "preconditioner: fisher is taken of stored features",
        ),
        ({"preconditioner": "subspace", "scoring": "direct"}, "use scoring: projected"),
        ({"preconditioner": "subspace", "rerank": {}}, "rerank.by is exact"),
        ({"preconditioner": "kfac"}, "gradient_type: adam_marginal makes others; set grad"),
        ({"preconditioner": "ekfac", "gradient_type": "sign"}, "set gradient_type: sgd"),
        ({**KFAC, "damping": 0}, "damping is 0.0, and preconditioner: kfac needs a number above 0"),
        (
            {"preconditioner": "fisher", "gradient_type": "sgd", "damping": 0},
            "damping is 0.0, and preconditioner: fisher needs a number above 0",
        ),
        ({**KFAC, "scoring": "direct"}, "use scoring: projected"),
        ({**KFAC, "rerank": {}}, "preconditioner is kfac; leave out one"),
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
    assert LessSelector(preconditioner="subspace").product == InnerProduct("cosine", "subspace")
    fisher = LessSelector(preconditioner="fisher", gradient_type="sgd")
    assert fisher.product == InnerProduct("cosine", "fisher", 1.0)


def test_kronecker_factors_make_features_and_leave_the_product_of_features_plain() -> None:
    plain, curved = LessSelector(gradient_type="sgd"), LessSelector(**KFAC, normalize="none")
    assert curved.product == InnerProduct("none")
    assert plain.settings.curvature is None
    assert curved.gradient_features is curved.settings
    assert curved.settings.curvature == CurvatureRule("kfac", 0.1)
    assert LessSelector(**KFAC, damping=2, rerank={"by": "cg"}).settings.curvature == (
        CurvatureRule("kfac", 2.0)
    )


def test_a_subspace_of_too_few_target_rows_is_refused_before_training() -> None:
    labels = [[-100, 5], [-100, -100], [-100, 6]]
    dataset = datasets.Dataset.from_dict({"input_ids": [[1, 2]] * 3, "labels": labels})
    rows = Rows("dev", dataset)
    few: Any = SimpleNamespace(train=rows, targets=(Rows("dev", dataset.select([0, 1])),))
    both: Any = SimpleNamespace(train=rows, targets=(rows,))
    selector = LessSelector(preconditioner="subspace")

    selector.check_count(1, both)
    LessSelector().check_count(1, few)
    with pytest.raises(BadInput, match="component_params: 1 of 2 target rows can be used"):
        selector.check_count(1, few)


def test_a_selection_tells_the_product_and_the_dimensions_of_a_subspace() -> None:
    # Three target rows along one axis, one along another: 90% of the squares are in both.
    pairs = [CheckpointFeatures(np.eye(3), np.eye(3)[[0, 0, 0, 1]])]
    assert product_told(InnerProduct("target", "subspace"), pairs) == {
        "normalize": "target",
        "preconditioner": "subspace",
        "subspace": {"kept": 0.9, "rows": 4, "dims": [2]},
    }
    assert product_told(InnerProduct("cosine", "fisher", 0.5), pairs)["damping"] == 0.5
    assert product_told(InnerProduct(), pairs) == {}
    assert product_told(InnerProduct(), ()) == {}, "scores of whole gradients"
    assert product_told(InnerProduct("none"), ())["normalize"] == "none"
