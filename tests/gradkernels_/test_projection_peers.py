"""What dattri and bergson ask of a projector in their own tests, asked of ours as properties.

dattri: norms and products within what d outputs allow, rows alone and in batches, gradients by
parameter, orthogonal rows, seeds, half precision, memory given back. bergson: linear, the values of
the matrix, the same in another process and for any batch, products right on average, and gradients
of whole layers projected as they are made. TRAK's are in test_projection_trak.py.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec, project, project_reference
from gradkernels.reference import matrix_rows, scale
from gradkernels.trak import Projector
from torch import Tensor, nn

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot

P = 2011
TYPES = ("normal", "rademacher", "sjlt")
METHODS = ("gaussian", "rademacher", "sjlt")
types = pytest.mark.parametrize("proj_type", TYPES)
methods = pytest.mark.parametrize("method", METHODS)


def projector(proj_type: str, d: int, seed: int = 0) -> Projector:
    return Projector(P, d, seed, proj_type, "cpu")


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, P, generator=torch.Generator().manual_seed(seed))


# ---- dattri ----------------------------------------------------------------------------------


@types
@pytest.mark.parametrize("d", [64, 512, 4096])
def test_norms_and_products_are_kept_within_what_d_outputs_allow(proj_type: str, d: int) -> None:
    """A squared norm's deviation is sqrt(2 / d), a product's at most that: five of them."""
    x = rows(12)
    found = projector(proj_type, d).project(x, 0) / d**0.5
    size = x.norm(dim=1)
    miss = (found @ found.T - x @ x.T) / (size[:, None] * size)
    assert miss.abs().max() < 5 * (2 / d) ** 0.5
    assert miss.abs().max() > 0  # a projection, not the rows themselves


@types
def test_orthogonal_rows_stay_nearly_so_and_opposite_ones_are_opposite(proj_type: str) -> None:
    x, d = torch.linalg.qr(rows(20).T).Q.T.contiguous(), 2048
    found = projector(proj_type, d).project(x, 0) / d**0.5
    assert (found @ found.T - torch.eye(20)).abs().max() < 5 * (2 / d) ** 0.5
    assert torch.equal(projector(proj_type, d).project(-x, 0), -found * d**0.5)


@types
@pytest.mark.parametrize("d", [1, 33, 500])
@pytest.mark.parametrize("count", [1, 8, 65])
def test_a_batch_has_the_rows_that_it_has_one_by_one(proj_type: str, d: int, count: int) -> None:
    x = rows(count)
    if proj_type == "sjlt" and d < 8:  # eight non-zeros a parameter
        with pytest.raises(ValueError, match="s=8 exceeds d=1"):
            projector(proj_type, d)
        return
    found = projector(proj_type, d).project(x, 0)
    assert (found.shape, found.dtype) == ((count, d), torch.float32)
    alone = torch.cat([projector(proj_type, d).project(row[None], 0) for row in x])
    torch.testing.assert_close(
        found, alone, rtol=0, atol=1e-6 * float(x.norm(dim=1).max() * P**0.5)
    )


@types
def test_gradients_by_parameter_in_any_shape_are_the_flat_gradient(proj_type: str) -> None:
    x = rows(5)
    shapes = {"w": (5, 30, 40), "conv": (5, 5, 4, 3, 3), "bias": (5, 631)}
    parts = torch.split(x, [1200, 180, 631], dim=1)
    given = {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    whole = projector(proj_type, 300).project(x, 0)
    near = {"rtol": 0, "atol": 1e-5 * float(whole.abs().max())}
    torch.testing.assert_close(projector(proj_type, 300).project(given, 0), whole, **near)


@types
def test_a_seed_is_a_matrix_and_another_seed_is_an_independent_one(proj_type: str) -> None:
    x, d = rows(1), 4096
    found = [projector(proj_type, d, seed).project(x, 0)[0] for seed in (0, 0, 1, 2**40)]
    assert torch.equal(found[0], found[1])
    for other in (*found[2:], projector(proj_type, d).project(x, 1)[0]):
        assert torch.cosine_similarity(found[0], other, dim=0).abs() < 5 / d**0.5


@types
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_projected_as_their_float32(
    proj_type: str, dtype: torch.dtype
) -> None:
    x = rows(4).to(dtype)
    found = projector(proj_type, 300).project(x, 0)
    assert torch.equal(found, projector(proj_type, 300).project(x.float(), 0))


@types
def test_a_projector_goes_on_after_its_memory_was_given_back(proj_type: str) -> None:
    made = projector(proj_type, 100)
    first = made.project(rows(2), 0)
    made.free_memory()
    assert torch.equal(made.project(rows(2), 0), first)


# ---- bergson ---------------------------------------------------------------------------------


@methods
def test_a_projection_is_linear_and_has_its_matrixs_values(method: Any) -> None:
    x, y = rows(3), rows(3, seed=2)
    spec = ProjectionSpec(method, p=P, d=257, seed=9)
    found = project(0.3 * x - 2 * y, spec)
    combined = 0.3 * project(x, spec) - 2 * project(y, spec)
    near = {"rtol": 0, "atol": 1e-5 * float(found.abs().max())}
    torch.testing.assert_close(found, combined, **near)
    matrix = torch.from_numpy(matrix_rows(spec, np.arange(P)) * scale(spec))
    torch.testing.assert_close(project(x, spec).double(), x.double() @ matrix, **near)


@methods
def test_products_are_right_on_average_over_seeds(method: Any) -> None:
    """Unit rows of cosine .6; 300 matrices of 32 outputs, so a deviation of .0144 at the most."""
    x = torch.linalg.qr(rows(2).T).Q.T
    x = torch.stack([x[0], 0.6 * x[0] + 0.8 * x[1]])
    found = []
    for seed in range(300):
        a, b = project(x, ProjectionSpec(method, p=P, d=32, seed=seed)).double()
        found.append([float(a @ a), float(a @ b)])
    np.testing.assert_allclose(np.mean(found, axis=0), [1, 0.6], atol=5 * 0.0144)


_ELSEWHERE = """
import hashlib, sys, torch
from gradkernels import ProjectionSpec, project
torch.set_num_threads(2)
for method in sys.argv[1:]:
    x = torch.arange(3 * 2011, dtype=torch.float32).reshape(3, 2011).remainder(97) - 48
    unit = torch.nn.functional.normalize(project(x, ProjectionSpec(method, p=2011, d=96, seed=4)))
    print(hashlib.sha256(unit.numpy().tobytes()).hexdigest())
"""


def test_normalised_projections_have_the_same_bits_in_another_process() -> None:
    """With another number of threads; the portable path, as on another device, within rounding."""
    x = torch.arange(3 * P, dtype=torch.float32).reshape(3, P).remainder(97) - 48
    exact = ("rademacher", "sjlt")
    told = subprocess.run([sys.executable, "-c", _ELSEWHERE, *exact], capture_output=True,
                          text=True, check=True).stdout.split()  # fmt: skip
    for method, digest in zip(exact, told, strict=True):
        spec = ProjectionSpec(method, p=P, d=96, seed=4)  # type: ignore[arg-type]
        unit = nn.functional.normalize(project(x, spec))
        assert hashlib.sha256(unit.numpy().tobytes()).hexdigest() == digest
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))
        portable = nn.functional.normalize(project(x, spec, backend="torch"))
        torch.testing.assert_close(portable, unit, rtol=0, atol=1e-6)


class _Net(nn.Module):
    """Token ids (b, t) to logits (b, t, 23) by an embedding and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.head = nn.Embedding(23, 11), nn.Linear(11, 19), nn.Linear(19, 23)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(torch.tanh(self.up(self.embed(input_ids)))))


@methods
@pytest.mark.parametrize("elements", [50, 1 << 20])
def test_outer_products_of_a_layer_are_projected_by_rows_as_the_gradient_they_make(
    method: Any, elements: int
) -> None:
    """Rows of each layer's weight, at most `elements` numbers at once; the gradient by autograd."""
    torch.manual_seed(0)
    net = _Net()
    ids = torch.randint(23, (4, 9))
    whole = []
    for row in ids:
        logits = net(row[None]).logits[0]
        loss = nn.functional.cross_entropy(logits[:-1], row[1:])
        found = torch.autograd.grad(loss, [*net.up.parameters(), *net.head.parameters()])
        whole.append(torch.cat([part.reshape(-1) for part in found]))
    gradients = torch.stack(whole)
    with GradientCapture(net, "linear", elements=elements) as capture:
        spec = ProjectionSpec(method, p=capture.p, d=128, seed=2)
        sums, parts = Accumulator(spec, 4), []

        def add(slot: ParameterSlot, gradient: Tensor) -> None:
            parts.append(gradient.shape[1])
            sums.add(gradient, slot.start)

        capture.capture({"input_ids": ids, "labels": ids}, add)
    exact = project_reference(gradients, spec)
    assert sum(parts) == spec.p == gradients.shape[1]
    assert (len(parts) > 4) is (elements == 50)  # two weights and two biases
    near = {"rtol": 0, "atol": 2e-6 * float(np.abs(exact).max())}
    np.testing.assert_allclose(sums.result(), exact, **near)
