"""On a GPU: the features of a row are those of the CPU, alone or in a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec

from gradstore.capture.per_sample import GradientCapture
from gradstore.export.features import FeatureSpec
from gradstore.export.projected import export_features
from gradstore.format.layout import RowStatus

if TYPE_CHECKING:
    from conftest import LlamaKit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def gradient_length(model: Any) -> int:
    with GradientCapture(model) as capture:
        return int(capture.p)


def exported(
    llama: LlamaKit, device: str, kind: Any, method: Any, size: int, *, broken: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(n, d) features and (n,) statuses of 11 rows, the rows put in order."""
    model = llama.model(broken=broken).to(device)
    rows = llama.rows(11)
    if broken:
        rows[4]["input_ids"][1] = llama.broken_token
    projection = ProjectionSpec(method, p=gradient_length(model), d=256, seed=5)
    parts = list(
        export_features(
            model,
            llama.batches(rows, size),
            features=FeatureSpec(kind),
            projection=projection,
            moments=llama.moments(model) if kind.startswith("adam") else None,
        )
    )
    order = np.argsort(np.concatenate([part.rows for part in parts]))
    found = np.concatenate([part.features for part in parts])[order]
    return found, np.concatenate([part.status for part in parts])[order]


@pytest.mark.parametrize("kind", ["adam_marginal", "adam", "sgd"])
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_features_are_those_of_the_cpu_whatever_the_batch(
    llama: LlamaKit, kind: str, method: str
) -> None:
    expected, _ = exported(llama, "cpu", kind, method, 1)
    for size in (1, 4, 11):
        found, status = exported(llama, "cuda", kind, method, size)
        assert (status == RowStatus.OK).all()
        miss = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert miss.max() <= 1e-4, (size, miss.max())


def test_a_row_that_is_not_finite_leaves_its_batch_alone(llama: LlamaKit) -> None:
    expected, codes = exported(llama, "cpu", "sgd", "sjlt", 1, broken=True)
    found, status = exported(llama, "cuda", "sgd", "sjlt", 11, broken=True)
    np.testing.assert_array_equal(status, codes)
    good = codes == RowStatus.OK
    assert 0 < good.sum() < 11
    miss = np.linalg.norm((found - expected)[good], axis=1)
    assert (miss / np.linalg.norm(expected[good], axis=1)).max() <= 1e-4
