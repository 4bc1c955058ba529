"""Gauss-Newton products against the explicit matrix, conjugate gradients against numpy's solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradstore.errors import BadInput
from gradstore.export.gauss_newton import GaussNewton, conjugate_gradients

Array = np.ndarray


def few_trained(llama: Any) -> Any:
    """A model of which only the adapters of q_proj and down_proj in the first layer are trained."""
    model = llama.model()
    for name, parameter in model.named_parameters():
        wanted = "layers.0" in name and ("q_proj" in name or "down_proj" in name)
        parameter.requires_grad = parameter.requires_grad and wanted
    return model


def explicit(model: Any, rows: list[dict[str, list[int]]]) -> Array:
    """The mean over rows of J^T (diag(p) - p p^T) J / T, (p, p) float64, from whole Jacobians."""
    model.eval()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    total: Any = 0.0
    for row in rows:
        ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        at = (labels[0, 1:] != -100).nonzero()[:, 0]

        def logits(values: Any, ids: Any = ids, at: Any = at) -> Any:
            given = {"input_ids": ids, "use_cache": False}
            return functional_call(model, values, (), given).logits[0, at]

        odds = logits(trained).double().softmax(1).numpy()
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batched backward
            blocks = jacrev(logits)(trained).values()
        jacobian = torch.cat([block.flatten(2) for block in blocks], dim=2).double().numpy()
        for p, j in zip(odds, jacobian, strict=True):
            total = total + j.T @ (np.diag(p) - np.outer(p, p)) @ j / len(at)
    return np.asarray(total / len(rows))


@pytest.fixture(scope="module")
def case(llama: Any) -> dict[str, Any]:
    """Five rows of unequal lengths, one of them without a target token, and their matrix."""
    model = few_trained(llama)
    rows = llama.rows(5)
    masked = {"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}
    return {"model": model, "rows": [*rows[:2], masked, *rows[2:]], "matrix": explicit(model, rows)}


@pytest.mark.parametrize("size", [1, 4, 6])
def test_products_are_those_of_the_explicit_matrix_whatever_the_batches(
    llama: Any, case: dict[str, Any], size: int
) -> None:
    product = GaussNewton(case["model"])
    vectors = torch.randn(2, product.p, generator=torch.Generator().manual_seed(1))
    batches = (batch for _, batch in llama.batches(case["rows"], size))
    found = product.summed(batches, vectors) / 5
    expected = vectors.double().numpy() @ case["matrix"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5 * np.abs(expected).max())


def test_a_target_gradient_is_solved_for_in_the_metric_of_the_rows(
    llama: Any, case: dict[str, Any]
) -> None:
    model, matrix = case["model"], case["matrix"]
    target, product = llama.gradients(model, llama.rows(1, seed=8)), GaussNewton(model)
    batch = llama.collate(case["rows"])
    found = conjugate_gradients(lambda v: product.summed([batch], v) / 5, target,
                                damping=0.1, tolerance=1e-5, iterations=200)  # fmt: skip
    assert found.converged
    gradient = target[0].numpy()
    level = 0.1 * (gradient @ matrix @ gradient) / (gradient @ gradient)
    assert found.level == pytest.approx(level, rel=1e-5)
    expected = np.linalg.solve(matrix + level * np.eye(len(matrix)), gradient)
    error = np.linalg.norm(found.x[0].numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-3


def test_the_model_is_given_back_as_it_was(llama: Any, case: dict[str, Any]) -> None:
    model = case["model"].train()
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    product = GaussNewton(model)
    product.summed([llama.collate(case["rows"][:2])], torch.ones(1, product.p))
    assert model.training
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0]
        assert p.grad is None
        assert torch.equal(p, before[name][1])


def test_a_row_without_a_target_and_a_batch_of_them_add_nothing(
    llama: Any, case: dict[str, Any]
) -> None:
    product = GaussNewton(case["model"])
    masked = llama.collate([case["rows"][2]])
    assert not product.summed([masked], torch.ones(1, product.p)).any()


def test_an_operation_without_a_forward_derivative_is_one_message(
    llama: Any, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return upstream[0]

    model = case["model"]
    layer = model.get_base_model().model.layers[1]
    plain = layer.mlp.forward
    monkeypatch.setattr(layer.mlp, "forward", lambda x: Fused.apply(plain(x)))
    product = GaussNewton(model)
    with pytest.raises(BadInput, match="forward-mode derivatives, which this model does not have"):
        product.summed([llama.collate(case["rows"][:1])], torch.ones(1, product.p))


# -- conjugate gradients --------------------------------------------------------------------------


def of_matrix(matrix: Array) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda vectors: vectors @ torch.from_numpy(matrix)


def low_rank(size: int = 40, rank: int = 12) -> Array:
    """A matrix of G's kind: never negative, and singular."""
    factor = np.random.default_rng(3).normal(size=(size, rank)) * np.geomspace(1, 0.05, rank)
    return np.asarray(factor @ factor.T)


def test_the_solution_is_that_of_a_direct_solve_at_the_stated_damping() -> None:
    matrix = low_rank()
    targets = np.random.default_rng(4).normal(size=(3, 40)) * [[1.0], [1e-3], [50.0]]
    found = conjugate_gradients(
        of_matrix(matrix), torch.from_numpy(targets), damping=0.1, tolerance=1e-9
    )
    along = np.einsum("qi,ij,qj->q", targets, matrix, targets) / (targets**2).sum(1)
    assert found.curvature == pytest.approx(along.mean())
    assert found.level == pytest.approx(0.1 * along.mean())
    expected = np.linalg.solve(matrix + found.level * np.eye(40), targets.T).T
    np.testing.assert_allclose(found.x.numpy(), expected, rtol=1e-6, atol=1e-9)
    assert found.converged
    assert found.residual <= 1e-9
    assert found.iterations <= 18, "12 of them in exact arithmetic, one per eigenvalue above 0"


def test_a_system_cut_short_says_how_far_it_came() -> None:
    matrix, target = low_rank(), torch.ones(1, 40, dtype=torch.float64)
    told: list[int] = []
    found = conjugate_gradients(
        of_matrix(matrix), target, damping=1e-3, tolerance=1e-8, iterations=3, tell=told.append
    )
    assert (found.iterations, sum(told), found.converged) == (3, 3, False)
    rest = target.numpy() - found.x.numpy() @ (matrix + found.level * np.eye(40))
    assert found.residual == pytest.approx(np.linalg.norm(rest) / np.sqrt(40))
    assert found.residual > 1e-8


def test_a_solved_target_asks_for_no_further_product() -> None:
    matrix = np.diag(np.arange(1.0, 21.0))
    targets = torch.zeros(3, 20, dtype=torch.float64)
    targets[0, 4] = 2.0  # an eigenvector: solved by one product
    targets[1] = 1.0
    asked: list[int] = []

    def product(vectors: torch.Tensor) -> torch.Tensor:
        asked.append(len(vectors))
        return vectors @ torch.from_numpy(matrix)

    found = conjugate_gradients(product, targets, damping=0.1, tolerance=1e-6)
    assert asked == [2] + [1] * (found.iterations - 1)
    expected = np.linalg.solve(matrix + found.level * np.eye(20), targets.numpy().T).T
    np.testing.assert_allclose(found.x.numpy(), expected, atol=1e-5)
    assert not found.x[2].any()


@pytest.mark.parametrize(
    ("matrix", "target", "damping", "said"),
    [
        (np.eye(4), np.ones(4), 0.0, "damping is 0.0: the Gauss-Newton matrix of fewer rows"),
        (np.zeros((4, 4)), np.ones(4), 0.1, "curvature along the target is 0"),
        (np.eye(4) * np.nan, np.ones(4), 0.1, "curvature along the target is nan"),
        (np.eye(4), np.zeros(4), 0.1, "zero or not finite"),
        (np.eye(4), np.full(4, np.inf), 0.1, "zero or not finite"),
        (np.diag([9.0, -4, 1, 1]), np.ones(4), 0.01, "broke down at product"),
    ],
)
def test_what_has_no_solution_is_refused(
    matrix: Array, target: Array, damping: float, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        conjugate_gradients(of_matrix(matrix), torch.from_numpy(target[None]), damping=damping)
