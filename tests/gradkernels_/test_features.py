"""Features through the public way in: on a CPU, plain torch makes them, as it always did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gradkernels import Accumulator, Feature, ProjectionSpec, dispatch, project
from gradkernels.features import VECTORS
from gradkernels.gpu import usable

P = 700
kinds = pytest.mark.parametrize("kind", list(VECTORS))


def rows_of(b: int) -> torch.Tensor:
    return torch.randn(b, P, generator=torch.Generator().manual_seed(b))


def feature_of(kind: Any) -> Feature:
    generator = torch.Generator().manual_seed(3)
    base = 1e-4 + torch.rand(P, generator=generator)
    made = {"a": torch.randn(P, generator=generator), "base": base, "still": base.sqrt(),
            "pull": torch.randn(P, generator=generator)}  # fmt: skip
    return Feature(kind, **{name: made[name] for name in VECTORS[kind]}, curve=0.1, outer=0.01)


@kinds
@pytest.mark.parametrize("method", ["sjlt", "rademacher", "gaussian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projection_makes_the_features_that_it_could_be_given(
    kind: str, method: Any, dtype: torch.dtype
) -> None:
    """Cut into two blocks; the gradients stay what they were."""
    spec, x, feature = ProjectionSpec(method, p=P, d=65), rows_of(70).to(dtype), feature_of(kind)
    factors = torch.rand(70, generator=torch.Generator().manual_seed(1))
    before = x.clone()
    sums = Accumulator(spec, 70, squares=True)
    for low, high in ((0, 300), (300, P)):
        sums.add(x[:, low:high], low, feature.part(low, high), factors)
    assert torch.equal(x, before)
    given = feature.apply_(x.float() * factors[:, None])
    expected = project(given, spec)
    torch.testing.assert_close(sums.result(), expected, rtol=0, atol=1e-5 * float(expected.norm()))
    torch.testing.assert_close(sums.squares(), given.double().square().sum(dim=1), rtol=1e-6,
                               atol=0)  # fmt: skip


def test_factors_alone_scale_the_rows() -> None:
    spec, x = ProjectionSpec("sjlt", p=P, d=65), rows_of(3)
    sums = Accumulator(spec, 3)
    sums.add(x, 0, factors=torch.tensor([2.0, 0.5, 0.0]))
    expected = project(x, spec) * torch.tensor([2.0, 0.5, 0.0])[:, None]
    torch.testing.assert_close(sums.result(), expected)


def test_norms_are_there_for_those_who_asked() -> None:
    with pytest.raises(ValueError, match="make the Accumulator with squares=True"):
        Accumulator(ProjectionSpec("sjlt", p=P, d=65), 3).squares()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "lion"}, "kind='lion' is not one of sign, adam, adam_marginal"),
        ({"kind": "adam", "base": torch.ones(3)}, "a is missing: .* takes the vectors a, base"),
        ({"kind": "sign", "a": torch.ones(3)}, "a is given: .* takes the vectors none"),
        ({"kind": "adam", "a": torch.ones(3), "base": torch.ones(2)}, "give one length"),
        ({"kind": "adam", "a": torch.ones(3), "base": torch.ones(3).double()}, "give float32"),
    ],
)
def test_a_feature_that_is_none_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feature(**given)


def test_what_does_not_fit_a_block_is_refused() -> None:
    sums = Accumulator(ProjectionSpec("sjlt", p=P, d=65), 3)
    with pytest.raises(ValueError, match=r"feature is of 700 parameters, the block of 10; .*part"):
        sums.add(rows_of(3)[:, :10], 0, feature_of("adam"))
    with pytest.raises(ValueError, match=r"factors are torch.float32 .* not float32 of the"):
        sums.add(rows_of(3), 0, factors=torch.ones(2))
    away = Feature("adam", a=torch.ones(P, device="meta"), base=torch.ones(P, device="meta"))
    with pytest.raises(ValueError, match=r"feature's vectors are on meta, the block on cpu"):
        sums.add(rows_of(3), 0, away)
    with pytest.raises(ValueError, match=r"factors are on meta, the block on cpu"):
        sums.add(rows_of(3), 0, factors=torch.ones(3, device="meta"))


def test_where_kernels_fail_on_a_feature_plain_torch_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The kernels project then, and what they are given has become features already."""
    seen: list[Any] = []

    class Kernels:
        def add(self, block: torch.Tensor, start: int, feature: Any, factors: Any) -> None:
            seen.append((block, feature, factors))

    def refusal(device: torch.device, method: str, kind: str | None = None) -> str | None:
        return "3 of 4 sums differ" if kind == "adam" else None

    monkeypatch.setattr(dispatch, "choose_backend", lambda *_: "triton")
    monkeypatch.setattr(dispatch, "refusal", refusal)
    monkeypatch.setattr(Accumulator, "_new_sums", lambda *_: Kernels())
    sums, x = Accumulator(ProjectionSpec("sjlt", p=P, d=65), 3), rows_of(3)
    for kind in ("adam", "adam_marginal"):
        sums.add(x, 0, feature_of(kind), torch.ones(3))
    (made, none, nothing), (raw, feature, factors) = seen
    assert (none, nothing) == (None, None)
    assert torch.equal(made, feature_of("adam").apply_(x.clone()))
    assert torch.equal(raw, x)
    assert feature.kind == "adam_marginal"
    assert torch.equal(factors, torch.ones(3))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that there is a CUDA device with Triton; verdicts are forgotten before and after."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    monkeypatch.setattr(usable, "find_spec", lambda name: name)
    pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
    for tested in (usable._tested, usable._rotation_tested):
        tested.cache_clear()
    yield
    for tested in (usable._tested, usable._rotation_tested):
        tested.cache_clear()


@pytest.mark.usefixtures("cuda")
def test_each_kind_is_tested_once_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(usable, "difference", lambda *given: asked.append(given[1:]))
    for kind in ("adam", None, "adam"):
        usable.refusal(torch.device("cuda", 0), "sjlt", kind)  # type: ignore[arg-type]
    expected = [("sjlt", width, kind) for kind in ("adam", None) for width in (16, 64)]
    assert asked == expected


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(
    "full", [torch.OutOfMemoryError("full"), RuntimeError("Triton Error [CUDA]: out of memory")]
)
def test_a_full_memory_is_no_verdict_on_kernels(
    monkeypatch: pytest.MonkeyPatch, full: Exception
) -> None:
    """It is raised, and they are tested when memory is free again; a rotation has another way."""
    answers: list[Any] = []

    def difference(*_: Any) -> None:
        if answers:
            raise answers.pop()

    for name in ("difference", "rotation_difference"):
        monkeypatch.setattr(usable, name, difference)
    device = torch.device("cuda", 0)
    answers.append(full)
    with pytest.raises(type(full), match=r"full|out of memory"):
        usable.refusal(device, "sjlt", "adam")
    assert usable.refusal(device, "sjlt", "adam") is None
    answers.append(full)
    assert usable.rotation_refusal(device, 64) == "memory is full"
    assert usable.rotation_refusal(device, 64) is None


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("why", [None, "3 of 4 sums differ"])
def test_kernels_of_a_feature_are_tested_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, why: str | None
) -> None:
    asked: list[Any] = []

    def difference(_device: Any, method: str, width: int, kind: str | None) -> str | None:
        asked.append(kind)
        return why if kind else None

    monkeypatch.setattr(usable, "difference", difference)
    device, spec = torch.device("cuda", 0), ProjectionSpec("sjlt", p=P, d=65)
    monkeypatch.setattr(usable._log, "disabled", True)
    assert dispatch.fuses(spec, device, None)
    assert dispatch.fuses(spec, device, "adam") == (why is None)
    assert set(asked) == {None, "adam"}
    assert not dispatch.fuses(ProjectionSpec("gaussian", p=P, d=65), device, "adam")
    assert not dispatch.fuses(spec, torch.device("cpu"), "adam")
