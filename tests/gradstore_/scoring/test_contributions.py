"""Contributions of modules and tokens against autograd that takes one token's loss at a time."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.capture.slots import trainable_slots
from gradstore.errors import BadInput
from gradstore.export.features import FeatureMap, FeatureSpec, Kind
from gradstore.export.kronecker_fit import fit_factors
from gradstore.export.share import StepShare
from gradstore.scoring.contributions import Contributions, contributions

SGD = FeatureSpec("sgd")

#: Relative to the size of what is added up.
ROUNDING = 2e-6


def token_gradients(model: Any, row: dict[str, list[int]]) -> dict[int, torch.Tensor]:
    """Position of each target token -> (p,) float64 gradient of that token's loss alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    found = {}
    for position, label in enumerate(row["labels"]):
        if position == 0 or label == -100:
            continue
        logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        loss = F.cross_entropy(logits[position - 1], torch.tensor(label))
        gradient = torch.autograd.grad(loss, parameters)
        found[position] = torch.cat([part.reshape(-1) for part in gradient]).double()
    return found


def spec_of(kind: Kind) -> FeatureSpec:
    return FeatureSpec(kind, share=StepShare(4, 1.0, 9.0, 2.0) if kind == "adam_share" else None)


def feature_of(
    model: Any, gradient: torch.Tensor, spec: FeatureSpec, moments: Any, tokens: int
) -> torch.Tensor:
    """(p,) float64 feature of a whole gradient of a row of so many target tokens."""
    if spec.share is not None:  # by hand
        gradient, spec = gradient * 0.5 * tokens / (tokens + 3 * 9), FeatureSpec("adam_marginal")
    slots = list(trainable_slots(model))
    apply = FeatureMap(spec, slots, moments).apply_
    blocks = [apply(s, gradient[None, s.start : s.start + s.numel].float().clone()) for s in slots]
    return torch.cat(blocks, dim=1)[0].double()


def ask(
    llama: Any, row: dict[str, list[int]], query: dict[str, list[int]], **options: Any
) -> Contributions:
    model = llama.model()
    options = {"features": SGD, "query_features": SGD, **options}
    return contributions(model, llama.collate([row]), llama.collate([query]), **options)


def assert_adds_up(found: Contributions) -> None:
    """Every way to cut the inner product gives the inner product, relative to its parts' size."""
    for parts, rest in (
        (np.array(list(found.parameters.values())), 0.0),
        (np.array(list(found.modules.values())), 0.0),
        (found.row_tokens, found.row_rest),
        (found.query_tokens, found.query_rest),
    ):
        size = np.abs(parts).sum() + abs(rest)
        assert abs(parts.sum() + rest - found.inner) <= 1e-5 * size


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("target", ["sgd", "sign"])
def test_each_token_has_the_part_that_autograd_gives_its_loss(
    llama: Any, kind: Kind, target: str
) -> None:
    row, query = llama.rows(2, seed=8)
    model, spec, query_spec = llama.model(), spec_of(kind), FeatureSpec(target)  # type: ignore[arg-type]
    moments = llama.moments(model)
    found = ask(llama, row, query, features=spec, query_features=query_spec, moments=moments)
    sides = []
    for one, how in ((row, spec), (query, query_spec)):
        tokens = token_gradients(model, one)
        gradient = torch.stack(list(tokens.values())).mean(0)
        feature = feature_of(model, gradient, how, moments, len(tokens))
        rest = feature_of(model, torch.zeros_like(gradient), how, moments, len(tokens))
        sides.append((tokens, gradient, feature, rest))
    for (tokens, gradient, feature, rest), (_, _, other, _), parts, told in (
        (sides[0], sides[1], found.row_tokens, found.row_rest),
        (sides[1], sides[0], found.query_tokens, found.query_rest),
    ):
        secant = torch.where(gradient == 0, 0.0, (feature - rest) / gradient)
        # A gradient is a sum that is rounded. A sign's secant is 1 over it: where tokens' gradients
        # cancel out, as uncertain as their size over the sum's.
        size = torch.stack(list(tokens.values())).abs().mean(0)
        unsure = torch.where(gradient == 0, 0.0, ROUNDING * size / gradient.abs())
        expected, allowed = np.zeros((2, len(parts)))
        for position, own in tokens.items():
            each = secant * own * other / len(tokens)
            expected[position], allowed[position] = each.sum(), (each.abs() * unsure).sum()
        # A difference of features, as the reference takes it, is rounded too.
        loose = 1e-5 if kind in ("sgd", "adam_marginal", "sign") else 2e-3
        miss = np.abs(parts - expected)
        assert (miss <= loose * np.abs(expected).sum() + allowed).all()
        assert told == pytest.approx(float(rest @ other), rel=1e-4, abs=1e-12)
    assert found.inner == pytest.approx(float(sides[0][2] @ sides[1][2]), rel=1e-4)
    assert_adds_up(found)


def test_modules_join_the_matrices_of_an_adapter_and_are_sorted(llama: Any) -> None:
    found = ask(llama, *llama.rows(2, seed=8))
    assert len(found.modules) == 14, "7 linear layers in each of 2 blocks"
    assert len(found.parameters) == 28
    values = list(found.modules.values())
    assert values == sorted(values, reverse=True)
    assert "model.layers.0.self_attn.q_proj" in found.modules


def test_a_row_asked_about_itself_has_cosine_one(llama: Any) -> None:
    row = llama.rows(1, seed=3)[0]
    found = ask(llama, row, row)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert found.scaled(1 / found.inner).inner == pytest.approx(1.0)
    np.testing.assert_allclose(found.row_tokens, found.query_tokens)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(get_args(Kind)),
    token_budget=st.integers(1, 200),
)
def test_parts_add_up_whatever_the_rows_and_the_budget(
    llama: Any, seed: int, kind: Kind, token_budget: int
) -> None:
    row, query = llama.rows(2, seed=seed)
    moments = llama.moments(llama.model())
    found = ask(
        llama, row, query, features=spec_of(kind), moments=moments, token_budget=token_budget
    )
    assert_adds_up(found)
    labels = np.array(row["labels"])
    assert not found.row_tokens[labels == -100].any(), "a prompt is no target"


def test_parameters_that_hooks_do_not_cover_have_their_part(llama: Any) -> None:
    """A norm in training goes through the row-by-row pass."""
    model = llama.model()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.requires_grad = True
    row, query = (llama.collate([one]) for one in llama.rows(2, seed=8))
    found = contributions(model, row, query, features=SGD, query_features=SGD)
    assert any(name.endswith("layernorm") for name in found.modules)
    assert_adds_up(found)


def test_rows_without_a_gradient_are_refused(llama: Any) -> None:
    row = llama.rows(1)[0]
    masked = {**row, "labels": [-100] * len(row["labels"])}
    with pytest.raises(BadInput, match="the query has no target token"):
        ask(llama, row, masked)
    model = llama.model()
    with pytest.raises(BadInput, match="training row is a batch of 2 rows"):
        contributions(model, llama.collate(llama.rows(2)), llama.collate([row]),
                      features=SGD, query_features=SGD)  # fmt: skip
    broken = {**row, "input_ids": [llama.broken_token, *row["input_ids"][1:]]}
    with pytest.raises(BadInput, match="the gradient of the training row has values"):
        contributions(llama.model(broken=True), llama.collate([broken]), llama.collate([row]),
                      features=SGD, query_features=SGD)  # fmt: skip


def test_tokens_of_rows_in_a_metric_add_up_to_products_in_it(llama: Any) -> None:
    """Part of a token = its own gradient's product with H^-1 times the other row's gradient."""
    model, rows = llama.model(), llama.rows(12)
    row, query = rows[0], rows[1]
    factors = fit_factors(model, llama.batches(rows, 6))
    slots = list(trainable_slots(model))

    def solved(gradient: torch.Tensor) -> torch.Tensor:
        for _ in range(2):  # the root, and again
            blocks = [gradient[None, s.start : s.start + s.numel].float().clone() for s in slots]
            rooted = [factors.root_(s, b) for s, b in zip(slots, blocks, strict=True)]
            gradient = torch.cat(rooted, dim=1)[0]
        return gradient.double()

    of_row, of_query = token_gradients(model, row), token_gradients(model, query)
    mean = torch.stack(list(of_query.values())).mean(dim=0)
    spec = FeatureSpec("sgd", curvature=factors)
    found = ask(llama, row, query, features=spec, query_features=spec)
    expected = np.zeros(len(row["input_ids"]))
    for position, gradient in of_row.items():
        expected[position] = float(gradient @ solved(mean)) / len(of_row)
    np.testing.assert_allclose(found.row_tokens, expected, rtol=1e-3,
                               atol=1e-3 * np.abs(expected).max())  # fmt: skip
    assert found.row_tokens.sum() == pytest.approx(found.inner, rel=1e-3)
    assert found.query_tokens.sum() == pytest.approx(found.inner, rel=1e-3)
    assert sum(found.parameters.values()) == pytest.approx(found.inner, rel=1e-4)
