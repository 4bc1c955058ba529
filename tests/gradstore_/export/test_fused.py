"""Where a projection makes the features, as on a GPU, an export gives what it gives elsewhere.

A CPU takes that way here, with plain torch in the kernels' place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gradkernels import Accumulator, Feature, ProjectionSpec

from gradstore.export import joined, projected
from gradstore.export.features import FeatureSpec
from gradstore.export.joined import JoiningSink
from gradstore.export.projected import export_features
from gradstore.export.share import StepShare
from gradstore.export.units import FeatureRows
from gradstore.format.layout import RowStatus

SHARE = StepShare(rows=8, max_grad_norm=1.0, tokens=10.0, norm=4.0)
SPECS = {
    "adam_marginal": FeatureSpec("adam_marginal"),
    "adam": FeatureSpec("adam", "outside", bias_correction=True),
    "adam_share": FeatureSpec("adam_share", share=SHARE),
    "sgd": FeatureSpec("sgd"),
    "sign": FeatureSpec("sign"),
}


def exported(llama: Any, model: Any, method: Any, spec: FeatureSpec, size: int) -> FeatureRows:
    rows = llama.rows(11)
    rows[4]["input_ids"][1] = llama.broken_token
    rows[5]["labels"] = [-100] * len(rows[5]["labels"])
    p = sum(x.numel() for x in model.parameters() if x.requires_grad)
    parts = list(
        export_features(
            model, llama.batches(rows, size), features=spec, moments=llama.moments(model),
            projection=ProjectionSpec(method, p=p, d=96, seed=5), buffer_bytes=8 * 4 * p,
        )
    )  # fmt: skip
    names = ("rows", "features", "norm", "status", "tokens", "loss")
    return FeatureRows(*(np.concatenate([getattr(x, name) for x in parts]) for name in names))


@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
@pytest.mark.parametrize("size", [3, 9])
def test_the_projection_makes_the_same_features_norms_and_statuses(
    llama: Any, kind: str, method: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches that a dense projection gathers, and batches too large for its buffer of 8 rows.

    Slots are joined to a few runs.
    """
    model = llama.model(broken=True)
    expected = exported(llama, model, method, SPECS[kind], size)
    made: list[tuple[int, Feature | None]] = []
    add = Accumulator.add

    def watched(
        self: Any, block: Any, start: int, feature: Any = None, factors: Any = None
    ) -> None:
        made.append((start, feature))
        add(self, block, start, feature, factors)

    monkeypatch.setattr(projected, "FUSED", ("cpu",))
    monkeypatch.setattr(joined, "RUN_PARAMETERS", 500)
    monkeypatch.setattr(Accumulator, "add", watched)
    found = exported(llama, model, method, SPECS[kind], size)
    assert all((feature is None) == (kind == "sgd") for _, feature in made)
    slots = [x for x in model.parameters() if x.requires_grad]
    assert 1 < len({start for start, _ in made}) < len(slots) / 2
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.status, expected.status)
    assert {RowStatus.OK, RowStatus.NON_FINITE} < set(expected.status.tolist())
    np.testing.assert_allclose(found.norm, expected.norm, rtol=1e-5)
    near = 1e-5 * np.nanmax(np.abs(expected.features))
    np.testing.assert_allclose(found.features, expected.features, rtol=0, atol=near)


@pytest.mark.parametrize("kind", list(SPECS))
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_kernels_are_tested_before_the_first_batch(
    llama: Any, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at their first use inside its backward, where memory is short; nor of another kind."""
    model, order = llama.model(), list[Any]()
    model.register_forward_pre_hook(lambda *_: order.append("forward"))

    def fuses(spec: ProjectionSpec, device: Any, asked: str | None) -> bool:
        order.append((spec.method, device.type, asked))
        return True

    add = Accumulator.add

    def watched(self: Any, block: Any, start: int, feature: Any = None, *given: Any) -> None:
        order.append((method, "cpu", None if feature is None else feature.kind))
        add(self, block, start, feature, *given)

    monkeypatch.setattr(projected, "FUSED", ("cpu",))
    monkeypatch.setattr(projected, "fuses", fuses)
    monkeypatch.setattr(Accumulator, "add", watched)
    exported(llama, model, method, SPECS[kind], 3)
    assert order[1] == "forward"
    assert {each for each in order if each != "forward"} == {order[0]}


def test_with_dora_no_more_than_a_few_runs_wait(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its magnitudes come after the backward; a run with one would hold its matrices till then."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM(llama.model().config)
    dora = LoraConfig(task_type="CAUSAL_LM", r=4, use_dora=True, target_modules="all-linear")
    model = get_peft_model(base, dora)
    monkeypatch.setattr(projected, "FUSED", ("cpu",))
    monkeypatch.setattr(joined, "RUN_PARAMETERS", 500)
    most, take = [0], JoiningSink.__call__

    def watched(self: JoiningSink, slot: Any, block: Any) -> None:
        take(self, slot, block)
        waiting = sum(s.numel for blocks in self._waiting.values() for s in blocks)
        most[0] = max(most[0], waiting)

    monkeypatch.setattr(JoiningSink, "__call__", watched)
    p = sum(x.numel() for x in model.parameters() if x.requires_grad)
    spec = ProjectionSpec("sjlt", p=p, d=32)
    rows = llama.rows(3)
    assert list(export_features(model, llama.batches(rows, 3), features=SPECS["sgd"],
                                projection=spec))  # fmt: skip
    assert 0 < most[0] < 0.2 * p
