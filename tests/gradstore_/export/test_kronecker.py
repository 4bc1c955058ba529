"""Kronecker factors against explicit matrices, made by plain autograd one row at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gradkernels import ProjectionSpec, project_reference
from torch import nn

from gradstore.capture.slots import ParameterSlot, trainable_slots
from gradstore.errors import BadInput, DamagedData
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.kronecker import BlockFactors, KroneckerFactors
from gradstore.export.kronecker_fit import fit_factors, full_width
from gradstore.export.projected import export_features

Seen = dict[str, list[tuple[np.ndarray, np.ndarray]]]


def tokens_of(model: Any, rows: Sequence[Mapping[str, list[int]]]) -> Seen:
    """Per LoRA weight and row: inputs (t, in) and output gradients (t, out), float64, by hooks."""
    found: Seen = {}

    def watch(name: str) -> Any:
        def hook(_: Any, args: Any, output: torch.Tensor) -> None:
            output.requires_grad_(True) if not output.requires_grad else None
            x = args[0].detach()[0].double().numpy()
            output.register_hook(
                lambda g: found.setdefault(name, []).append((x, g[0].double().numpy()))
            )

        return hook

    handles = [
        module.register_forward_hook(watch(f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" in name
    ]
    model.eval()
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], torch.tensor(row["labels"][1:])).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def moments_of(pairs: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """G (out, out) and A (in, in) by their definition; a row's last token predicts nothing."""
    inputs = np.concatenate([x[:-1] for x, _ in pairs])
    return sum(g.T @ g for _, g in pairs) / len(pairs), inputs.T @ inputs / len(inputs)


def inverse_root(matrix: np.ndarray, damping: float) -> np.ndarray:
    """(H + l I)^-1/2 of a whole matrix."""
    level = damping * np.trace(matrix) / len(matrix)
    values, vectors = np.linalg.eigh(matrix + level * np.eye(len(matrix)))
    return vectors @ np.diag(values**-0.5) @ vectors.T


def explicit(kind: str, pairs: Any, gradients: np.ndarray) -> np.ndarray:
    """H (numel, numel) of one block, whose rows' gradients are (n, numel)."""
    outer, inner = moments_of(pairs)
    if kind == "kfac":
        return np.kron(outer, inner)
    basis = np.kron(np.linalg.eigh(outer)[1], np.linalg.eigh(inner)[1])
    return basis @ np.diag(((gradients @ basis) ** 2).mean(axis=0)) @ basis.T


def spans(model: Any) -> Iterator[tuple[ParameterSlot, slice]]:
    for slot in trainable_slots(model):
        yield slot, slice(slot.start, slot.start + slot.numel)


def rooted(factors: KroneckerFactors, model: Any, gradients: torch.Tensor) -> torch.Tensor:
    """(n, p) features of whole gradients."""
    parts = [factors.root_(slot, gradients[:, at].float()) for slot, at in spans(model)]
    return torch.cat(parts, dim=1)


@pytest.fixture(scope="module")
def fitted(llama: Any) -> Any:
    """A model, 24 rows, their gradients, and what enters and leaves its matrices."""
    model, rows = llama.model(), llama.rows(24)
    return model, rows, llama.gradients(model, rows), tokens_of(model, rows)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_a_feature_is_the_inverse_root_of_the_explicit_kronecker_matrix(
    llama: Any, fitted: Any, kind: Any, damping: float
) -> None:
    model, rows, gradients, seen = fitted
    factors = replace(fit_factors(model, llama.batches(rows, 5), kind), damping=damping)
    found = rooted(factors, model, gradients[:6]).double().numpy()
    assert len(seen) == len(factors.blocks) == 28
    for slot, at in spans(model):
        block = gradients[:, at].numpy()
        expected = block[:6] @ inverse_root(explicit(kind, seen[slot.name], block), damping)
        error = np.linalg.norm(found[:, at] - expected)
        assert error <= 1e-4 * np.linalg.norm(expected), slot.name


def test_eigenvalues_of_ekfac_have_the_trace_of_the_second_moment(llama: Any, fitted: Any) -> None:
    model, rows, gradients, _ = fitted
    factors = fit_factors(model, llama.batches(rows, 24), "ekfac")
    for slot, at in spans(model):
        trace = float(gradients[:, at].square().sum(dim=1).mean())
        assert float(factors.blocks[slot.name].values.sum()) == pytest.approx(trace, rel=1e-4)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_factors_do_not_depend_on_how_rows_are_batched_or_padded(
    llama: Any, fitted: Any, kind: Any
) -> None:
    model, rows, gradients, _ = fitted
    alone, together = (
        rooted(fit_factors(model, llama.batches(rows, size), kind), model, gradients[:4])
        for size in (1, 24)
    )
    torch.testing.assert_close(alone, together, rtol=2e-4, atol=1e-4 * float(alone.abs().max()))


def test_a_fit_leaves_the_model_as_it_was(llama: Any) -> None:
    model = llama.model().train()
    fit_factors(model, llama.batches(llama.rows(3), 3))
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for _, p in model.named_parameters()] == [
        "lora_" in name for name, _ in model.named_parameters()
    ]
    assert all(p.grad is None for p in model.parameters())


class Toy(nn.Module):
    """Logits are one matrix times a token's vector; its name makes it a LoRA matrix."""

    def __init__(self, vectors: torch.Tensor, classes: int, bias: bool = False) -> None:
        super().__init__()
        self.vectors = vectors
        self.lora_A = nn.ModuleDict({"default": nn.Linear(vectors.shape[1], classes, bias=bias)})
        nn.init.zeros_(self.lora_A["default"].weight)
        if bias:
            nn.init.zeros_(self.lora_A["default"].bias)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.lora_A["default"](self.vectors[input_ids])
        return found


VECTORS = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def every_pair(classes: int = 3, inputs: int = 5) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """Rows of one target token each: every input with every label, so that both are independent."""
    pairs = [(i, j) for i in range(inputs) for j in range(classes)]
    ids = torch.tensor([[i, 0] for i, _ in pairs])
    labels = torch.tensor([[-100, j] for _, j in pairs])
    return [(np.arange(len(pairs)), {"input_ids": ids, "labels": labels})]


def toy_gradients(toy: Toy, batch: Mapping[str, torch.Tensor]) -> np.ndarray:
    """(n, numel) by the formula of softmax regression."""
    x = toy.vectors[batch["input_ids"][:, 0]].double()
    logits = x @ toy.lora_A["default"].weight.detach().double().T
    errors = logits.softmax(1) - F.one_hot(batch["labels"][:, 1], logits.shape[1])
    return (errors[:, :, None] * x[:, None, :]).flatten(1).numpy()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_it_is_exact_where_inputs_and_output_gradients_are_independent(kind: Any) -> None:
    """One token a row, a linear model, equal predictions: the second moment is the product."""
    toy = Toy(VECTORS, 3)
    gradients = toy_gradients(toy, every_pair()[0][1])
    exact = gradients.T @ gradients / len(gradients)
    block = fit_factors(toy, every_pair(), kind).blocks["lora_A.default.weight"]
    assert block.outputs is not None
    assert block.inputs is not None
    basis = np.kron(block.outputs.numpy(), block.inputs.numpy())
    found = basis @ np.diag(block.values.flatten().numpy()) @ basis.T
    np.testing.assert_allclose(found, exact, atol=1e-5 * exact.max())


def test_products_do_not_depend_on_the_coordinates_of_the_inputs() -> None:
    """A rotation of what enters a matrix rotates features, and no product notices it."""
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))[0]
    found = []
    for vectors in (VECTORS, VECTORS @ turn):
        toy, batch = Toy(vectors, 3), every_pair()[0][1]
        factors = fit_factors(toy, every_pair())
        slot = next(iter(trainable_slots(toy)))
        features = factors.root_(slot, torch.from_numpy(toy_gradients(toy, batch)).float())
        found.append(features @ features.T)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_what_hooks_do_not_cover_has_the_diagonal_of_its_second_moment(
    llama: Any, kind: Any
) -> None:
    model, rows = llama.model(), llama.rows(6)
    model.base_model.model.model.norm.weight.requires_grad = True
    gradients = llama.gradients(model, rows)
    factors = fit_factors(model, llama.batches(rows, 4), kind)
    slot, at = next(pair for pair in spans(model) if pair[0].name.endswith("model.norm.weight"))
    block = gradients[:, at]
    moment = block.square().mean(dim=0)
    expected = block / (moment + 0.1 * moment.mean()).sqrt()
    found = factors.root_(slot, block.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_side_too_wide_for_the_memory_is_diagonal(llama: Any, fitted: Any) -> None:
    model, rows, gradients, seen = fitted
    slots = list(trainable_slots(model))
    # Of 2 layers: 28 matrices with a side of 4; sides of 16, 32 and 48 beside them.
    widths = {4: 28, 16: 4, 32: 18, 48: 6}
    bytes_up_to = np.cumsum([4 * n * n * count for n, count in widths.items()]).tolist()
    assert [full_width(slots, limit) for limit in bytes_up_to] == list(widths)
    assert [full_width(slots, limit - 1) for limit in bytes_up_to] == [0, 4, 16, 32]
    factors = fit_factors(model, llama.batches(rows, 8), "kfac", most_bytes=bytes_up_to[2])
    slot, at = next(pair for pair in spans(model) if pair[0].shape == (4, 48))
    outer, inner = moments_of(seen[slot.name])
    root = inverse_root(np.kron(outer, np.diag(np.diag(inner))), 0.1)
    found = factors.root_(slot, gradients[:3, at].float()).double().numpy()
    expected = gradients[:3, at].numpy() @ root
    assert factors.blocks[slot.name].inputs is None
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


def test_a_block_without_curvature_has_features_of_zero(llama: Any) -> None:
    """As lora_A has, while lora_B is zero; a row that is not finite stays so."""
    model, rows = llama.model(), llama.rows(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    factors = fit_factors(model, llama.batches(rows, 5))
    gradients = llama.gradients(model, rows)
    found = rooted(factors, model, gradients)
    assert bool(torch.isfinite(found).all())
    for slot, at in spans(model):
        assert bool((found[:, at] == 0).all()) == ("lora_A" in slot.name)
    slot = next(slot for slot, _ in spans(model) if "lora_B" in slot.name)
    broken = torch.ones(2, slot.numel)
    broken[1, 3] = torch.nan
    assert torch.isfinite(factors.root_(slot, broken)).all(dim=1).tolist() == [True, False]


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_a_row_that_is_not_finite_spoils_no_fit(llama: Any, kind: Any) -> None:
    model, rows = llama.model(broken=True), llama.rows(5)
    rows[1]["input_ids"][-2] = llama.broken_token
    factors = fit_factors(model, llama.batches(rows, 5), kind)
    for block in factors.blocks.values():
        assert bool(torch.isfinite(block.values).all())


@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_exported_features_are_projected_roots(llama: Any, fitted: Any, method: Any) -> None:
    model, rows, gradients, _ = fitted
    factors = fit_factors(model, llama.batches(rows, 6))
    expected = rooted(factors, model, gradients[:7])
    spec = ProjectionSpec(method, p=gradients.shape[1], d=64, seed=2)
    parts = list(
        export_features(model, llama.batches(rows[:7], 4), projection=spec,
                        features=FeatureSpec("sgd", curvature=factors))
    )  # fmt: skip
    norm = np.concatenate([part.norm for part in parts])
    np.testing.assert_allclose(norm, expected.norm(dim=1), rtol=1e-4)
    found = np.concatenate([part.features for part in parts])
    oracle = project_reference(expected, spec)
    assert np.linalg.norm(found - oracle) <= 1e-4 * np.linalg.norm(oracle)


def test_factors_come_back_from_their_file_and_damage_is_told(llama: Any, fitted: Any) -> None:
    model, rows, gradients, _ = fitted
    factors = fit_factors(model, llama.batches(rows, 24), most_bytes=100_000)
    content = factors.to_bytes()
    back = KroneckerFactors.from_bytes(content, "here")
    assert (back.kind, back.rows, back.sha256) == (factors.kind, factors.rows, factors.sha256)
    expected = rooted(factors, model, gradients[:2])
    assert torch.equal(rooted(back, model, gradients[:2]), expected)
    for bad in (content[:-1], content[:5], b"", b"{}"):
        with pytest.raises(DamagedData, match="here holds no Kronecker factors"):
            KroneckerFactors.from_bytes(bad, "here")


def test_the_hash_tells_values_and_kind_but_not_damping() -> None:
    def made(value: float, kind: Any = "kfac", damping: float = 0.1) -> KroneckerFactors:
        block = BlockFactors(None, None, torch.full((2, 3), value))
        return KroneckerFactors(kind, {"w": block}, 8, damping)

    one = made(1.0)
    assert one.sha256 == made(1.0, damping=2.0).sha256
    assert len({one.sha256, made(1.5).sha256, made(1.0, "ekfac").sha256}) == 3
    assert FeatureSpec("sgd", curvature=one).options()["curvature"] == {
        "kind": "kfac", "damping": 0.1, "rows": 8, "sample": "", "sha256": one.sha256,
    }  # fmt: skip


def test_what_has_no_factors_is_refused(llama: Any) -> None:
    block = BlockFactors(None, None, torch.ones(2, 3))
    factors = KroneckerFactors("kfac", {"w": block}, 8)
    slot = ParameterSlot("v", (2, 3), 0, 6)
    with pytest.raises(BadInput, match="no Kronecker factors for parameter v"):
        FeatureMap(FeatureSpec("sgd", curvature=factors), [slot], None).apply_(
            slot, torch.ones(1, 6)
        )
    with pytest.raises(BadInput, match=r"not to feature 'adam'; use sgd"):
        FeatureSpec("adam", curvature=factors)
    with pytest.raises(BadInput, match=r"curvature is .*KroneckerFactors"):
        FeatureSpec("sgd", curvature=3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="kind is 'shampoo'"):
        fit_factors(llama.model(), [], "shampoo")  # type: ignore[arg-type]
    masked = [{**row, "labels": [-100] * len(row["labels"])} for row in llama.rows(2)]
    with pytest.raises(BadInput, match="sampled training rows is 0"):
        fit_factors(llama.model(), llama.batches(masked, 2))
