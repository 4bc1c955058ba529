"""Features against the worked examples E9, E10, E34, E35 and a float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from gradkernels import ProjectionSpec, features
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput
from gradstore.export.features import FeatureMap, FeatureSpec, Kind, Recipe
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments

CONSTANTS = AdamConstants(beta1=0.9, beta2=0.999, eps=1e-8, step=10)


def feature(
    gradients: Any, m: Any, v: Any, spec: FeatureSpec, constants: AdamConstants = CONSTANTS
) -> Tensor:
    grad = torch.as_tensor(gradients, dtype=torch.float32).clone()
    grad = grad[None] if grad.dim() == 1 else grad
    m, v = (torch.as_tensor(x, dtype=torch.float32) for x in (m, v))
    slot = ParameterSlot("w", tuple(m.shape), 0, m.numel())
    moments = AdamMoments({"w": ParameterMoments(m, v, constants)})
    out = FeatureMap(spec, [slot], moments).apply_(slot, grad)
    assert out is grad
    return out


def oracle(
    grad: Tensor, m: Tensor, v: Tensor, spec: FeatureSpec, constants: AdamConstants
) -> Tensor:
    """The formulas of ALGORITHMS.md 1.4 as they stand, in float64."""
    g, m, v = grad.double(), m.double(), v.double()

    def step(g: Tensor) -> Tensor:
        first = constants.beta1 * m + (1 - constants.beta1) * g
        second = constants.beta2 * v + (1 - constants.beta2) * g * g
        if spec.bias_correction:
            first = first / (1 - constants.beta1 ** (constants.step + 1))
            second = second / (1 - constants.beta2 ** (constants.step + 1))
        if spec.adam_eps_mode == "inside":
            return first / (second + constants.eps).sqrt()
        return first / (second.sqrt() + constants.eps)

    return step(g) - step(torch.zeros_like(g)) if spec.kind == "adam_marginal" else step(g)


E9 = ([0.1, -0.2], [0.05, 0.02], [0.01, 1e-4])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (FeatureSpec("adam", "outside"), (0.55, -0.169091)),
        (FeatureSpec("adam", "inside"), (0.55, -0.169085)),
        (FeatureSpec("adam", "outside", bias_correction=True), (0.083855, -0.025780)),
        (FeatureSpec("adam_marginal", "outside"), (0.099775, -1.969990)),
        (FeatureSpec("adam_marginal", "inside"), (0.099775, -1.969896)),
        (FeatureSpec("sgd"), (0.1, -0.2)),
        (FeatureSpec("sign"), (1.0, -1.0)),
    ],
)
def test_features_equal_examples_e9_and_e34(
    spec: FeatureSpec, expected: tuple[float, float]
) -> None:
    found = feature(*E9, spec)[0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_bias_correction_scales_the_step_as_in_e9() -> None:
    plain = feature(*E9, FeatureSpec("adam", "outside"))
    corrected = feature(*E9, FeatureSpec("adam", "outside", bias_correction=True))
    torch.testing.assert_close(corrected / plain, torch.full((1, 2), 0.152464), atol=1e-5, rtol=0)


def test_eps_placement_matters_as_in_e10() -> None:
    for kind in ("adam", "adam_marginal"):
        outside = feature([1e-5], [0.0], [0.0], FeatureSpec(kind, "outside"))
        inside = feature([1e-5], [0.0], [0.0], FeatureSpec(kind, "inside"))
        assert outside.item() == pytest.approx(3.0653, abs=1e-4)
        assert inside.item() == pytest.approx(0.01, abs=1e-5)


def test_the_marginal_step_tells_samples_apart_as_in_e35() -> None:
    samples = torch.tensor([[0.1, 0, 0], [0, 0.1, 0], [0.09, 0.01, 0]])
    moments = ([0.1, 0.1, 0.3], [0.01, 0.01, 0.01])
    target = torch.tensor([[1.0, 0, 0]])
    for kind, expected in (
        ("adam", (0.331349, 0.298364, 0.328096)),
        ("adam_marginal", (1.0, 0.0, 0.993835)),
    ):
        found = feature(samples, *moments, FeatureSpec(kind, "outside"))
        cosines = torch.nn.functional.cosine_similarity(found, target)
        torch.testing.assert_close(cosines, torch.tensor(expected), atol=1e-5, rtol=0)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.sampled_from(["adam", "adam_marginal"]),
    st.sampled_from(["inside", "outside"]),
    st.booleans(),
    st.integers(0, 2**31),
    st.floats(-6, 0),
    st.floats(-7, 1),
)
def test_adam_features_keep_float32_precision_however_small_the_gradient(
    kind: Any, mode: Any, corrected: bool, seed: int, size: float, ratio: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0**size
    m = scale * torch.randn(50, generator=generator)
    v = (scale * torch.randn(50, generator=generator)) ** 2
    grad = scale * 10.0**ratio * torch.randn(3, 50, generator=generator)
    grad[0, :5] = 0.0
    spec = FeatureSpec(kind, mode, corrected)
    constants = AdamConstants(0.9, 0.999, 1e-8, 7)
    found = feature(grad, m, v, spec, constants).double()
    expected = oracle(grad, m, v, spec, constants)
    # The oracle itself cancels: it is good to 1e-16 of Γ(0), so allow that beside 1e-6.
    still = oracle(torch.zeros_like(grad), m, v, FeatureSpec("adam", mode, corrected), constants)
    floor = 1e-13 * still.norm() if kind == "adam_marginal" else 0.0
    assert (found - expected).norm() <= 1e-6 * expected.norm() + floor


def test_the_marginal_step_of_a_zero_gradient_is_exactly_zero() -> None:
    for mode in ("inside", "outside"):
        for v in ([0.3, 0.0], [0.0, 1e-30]):
            found = feature([0.0, 0.0], [0.2, 0.0], v, FeatureSpec("adam_marginal", mode))
            assert found.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("kind", ["adam_marginal", "adam", "sgd", "sign"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_and_stays_alone(kind: Any, bad: float) -> None:
    grad = torch.full((3, 4), 0.5)
    clean = feature(grad, [0.1] * 4, [0.2] * 4, FeatureSpec(kind))
    grad[1, 2] = bad
    found = feature(grad, [0.1] * 4, [0.2] * 4, FeatureSpec(kind))
    assert not torch.isfinite(found[1, 2])
    found[1, 2] = clean[1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("kind", ["adam_marginal", "adam", "sign"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 100), (7, 99), (130, 5)])
def test_cutting_into_blocks_changes_nothing(
    kind: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(shape, generator=generator)
    m, v = torch.randn(shape[1], generator=generator), torch.rand(shape[1], generator=generator)
    whole = feature(grad, m, v, FeatureSpec(kind))
    monkeypatch.setattr(features, "BLOCK_ELEMENTS", 64)
    # The vectorised loops and their scalar tails may round the last bit differently.
    torch.testing.assert_close(feature(grad, m, v, FeatureSpec(kind)), whole, rtol=1e-6, atol=1e-7)


def test_sgd_gives_back_the_gradient_itself() -> None:
    grad = torch.randn(3, 5)
    slot = ParameterSlot("w", (5,), 0, 5)
    assert FeatureMap(FeatureSpec("sgd"), [slot], None).apply_(slot, grad) is grad


def test_constants_may_differ_between_parameters() -> None:
    slots = [ParameterSlot("a", (2,), 0, 2), ParameterSlot("b", (2,), 2, 2)]
    m, v = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    chosen = [AdamConstants(0.9, 0.999, 1e-8, 3), AdamConstants(0.5, 0.9, 1e-3, 8)]
    moments = AdamMoments(
        {
            slot.name: ParameterMoments(m, v, constants)
            for slot, constants in zip(slots, chosen, strict=True)
        }
    )
    spec = FeatureSpec("adam", "outside", bias_correction=True)
    feature_map = FeatureMap(spec, slots, moments)
    grad = torch.tensor([[0.7, -0.1]])
    for slot, constants in zip(slots, chosen, strict=True):
        found = feature_map.apply_(slot, grad.clone())
        expected = oracle(grad, m, v, spec, constants).float()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_recipe_has_one_map_for_each_device_and_layout() -> None:
    slot = ParameterSlot("w", (2,), 0, 2)
    moments = AdamMoments({"w": ParameterMoments(torch.ones(2), torch.ones(2), CONSTANTS)})
    recipe = Recipe(FeatureSpec(), ProjectionSpec("sjlt", p=2, d=64), moments)
    devices = [torch.device(name) for name in ("cpu", "meta", "cpu", "meta")]
    maps = [recipe.map_of((slot,), device) for device in devices]
    assert (maps[0], maps[1]) == (maps[2], maps[3])
    for each, device in zip(maps, devices, strict=True):
        feature = each.of(slot)
        assert feature is not None
        assert feature.base is not None
        assert feature.base.device == device
    moved = ParameterSlot("w", (2,), 3, 2)
    assert recipe.map_of((moved,), devices[0]) is not maps[0]
    assert recipe == replace(recipe)
    assert "_maps" not in repr(recipe)


def test_fault_13_missing_or_misshapen_moments_are_refused_by_name() -> None:
    slot = ParameterSlot("layer.lora_A.default.weight", (2, 3), 0, 6)
    with pytest.raises(BadInput, match="moments"):
        FeatureMap(FeatureSpec(), [slot], None)
    with pytest.raises(BadInput, match=r"layer\.lora_A.*sgd"):
        FeatureMap(FeatureSpec(), [slot], AdamMoments({}))
    other = ParameterMoments(torch.zeros(3, 2), torch.zeros(3, 2), CONSTANTS)
    with pytest.raises(BadInput, match=r"layer\.lora_A.*\(3, 2\).*\(2, 3\)"):
        FeatureMap(FeatureSpec(), [slot], AdamMoments({slot.name: other}))


def test_unknown_names_are_refused_with_those_offered() -> None:
    with pytest.raises(
        BadInput, match=r"'adamw'.*adam_marginal \| adam_share \| adam \| sgd \| sign"
    ):
        FeatureSpec(kind="adamw")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"inside \| outside"):
        FeatureSpec(adam_eps_mode="none")  # type: ignore[arg-type]
    kinds = {kind: FeatureSpec(kind).needs_moments for kind in get_args(Kind)}
    assert [kind for kind, needs in kinds.items() if not needs] == ["sgd", "sign"]
