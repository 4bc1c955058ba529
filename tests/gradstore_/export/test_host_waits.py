"""A backward that is taken apart into rows' features never waits for the host, nor copies to it.

On a GPU each such wait empties the queue of launches, of which a small model's pass consists. Here
a CPU stands in: an operation that would wait there is one that reads a number out of a tensor.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec
from torch.utils._python_dispatch import TorchDispatchMode

from gradstore.capture.losses import BatchStats
from gradstore.export import joined, projected
from gradstore.export.features import FeatureSpec
from gradstore.export.projected import export_features, finished_rows
from gradstore.format.layout import RowStatus

aten = torch.ops.aten
#: Operations whose result, or its size, the host has to know before it can go on.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default,
         aten.masked_select.default, aten.unique_dim.default, aten._unique2.default,
         aten.is_nonzero.default}  # fmt: skip


class Watched(TorchDispatchMode):
    """Notes what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.done = self.taken = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.done += 1
        if func in WAITS:
            self.waits[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """What backwards do, from their start to their return; copies to the host among the waits."""
    watched, plain, copy = Watched(), torch.Tensor.backward, torch.Tensor.cpu
    inside: list[bool] = []

    def taken_apart(self: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        inside.append(True)
        watched.taken += 1
        try:
            with watched:
                plain(self, *args, **kwargs)
        finally:
            inside.pop()

    def counted(self: torch.Tensor, *args: Any) -> torch.Tensor:
        if inside:
            watched.waits["cpu"] += 1
        return copy(self, *args)

    monkeypatch.setattr(torch.Tensor, "backward", taken_apart)
    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    return watched


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
@pytest.mark.parametrize("kind", ["adam_marginal", "adam", "sgd", "sign"])
def test_an_exports_backward_reads_no_number(
    llama: Any, kind: Any, method: Any, fused: bool, backward: Watched,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if fused:  # as on a GPU, with plain torch in the kernels' place
        monkeypatch.setattr(projected, "FUSED", ("cpu",))
        monkeypatch.setattr(joined, "RUN_PARAMETERS", 500)
    model, rows = llama.model(), llama.rows(6)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])  # of a row without a target, too
    p = sum(x.numel() for x in model.parameters() if x.requires_grad)
    parts = list(
        export_features(
            model, llama.batches(rows, 3), features=FeatureSpec(kind),
            moments=llama.moments(model), projection=ProjectionSpec(method, p=p, d=64),
        )
    )  # fmt: skip
    assert sum(len(part.rows) for part in parts) == 6
    assert backward.done > 100, "the backwards were seen"
    # The loss looks at the number that it is multiplied with, on a CPU alone.
    assert backward.waits == {"aten._local_scalar_dense.default": backward.taken}


def test_a_number_that_is_read_is_seen(backward: Watched) -> None:
    """So that the tests above can fail."""
    x, read = torch.ones(3, requires_grad=True), list[Any]()
    y = (2 * x).clone()
    y.register_hook(lambda g: read.extend((float(g.sum()), g.cpu(), g.nonzero())))
    y.sum().backward()
    assert backward.waits == {
        "aten._local_scalar_dense.default": backward.waits["aten._local_scalar_dense.default"],
        "aten.nonzero.default": backward.waits["aten.nonzero.default"],
        "cpu": 1,
    }
    assert all(backward.waits.values())


def test_what_is_known_of_a_batch_comes_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self) or copy(self))
    tokens = torch.tensor([3, 0, 16_000_001, 5, 7])
    loss = torch.tensor([0.5, torch.nan, 2.0, 1.0, torch.inf])
    values = torch.arange(20, dtype=torch.float32).reshape(5, 4)
    values[3, 1] = torch.inf
    squares = torch.tensor([4.0, 1.0, 9.0, 1.0, 0.0], dtype=torch.float64)
    rows = np.array([4, 8, 1, 0, 2])
    found = finished_rows(rows, values.clone(), squares, BatchStats(loss, tokens))
    assert len(copies) == 1
    assert found.tokens.tolist() == tokens.tolist()
    assert found.tokens.dtype == np.int32
    assert found.status.dtype == np.uint8
    assert found.status.tolist() == [RowStatus.OK, RowStatus.MASKED, RowStatus.OK,
                                     RowStatus.NON_FINITE, RowStatus.ZERO_NORM]  # fmt: skip
    np.testing.assert_array_equal(found.norm, np.float32([2, 1, 3, 1, 0]))
    np.testing.assert_array_equal(found.loss, loss.numpy())
    usable = found.status == RowStatus.OK
    np.testing.assert_array_equal(found.features[usable], values.numpy()[usable])
    assert np.isnan(found.features[~usable]).all()
