"""LoRA layers that run as one operation against peft's own forward and hooks on its matrices."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradstore.capture import per_sample
from gradstore.capture.adapters import watched_linears
from gradstore.capture.hooks import HookedPass
from gradstore.capture.lora import fused_layers, lora_layers
from gradstore.capture.losses import RowLoss, Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot, trainable_slots

Taken = dict[str, Tensor]


def fused(model: Any) -> list[nn.Module]:
    """The layers that would run as one operation."""
    matrices = watched_linears(model, trainable_slots(model))
    return [each.module for each in lora_layers(model, matrices)]


def peft_layers(model: Any) -> list[nn.Module]:
    """The layers that have an adapter."""
    return [each for each in model.modules() if isinstance(each, peft_layer.Linear)]


def taken(model: Any, batch: Any, tap: Any = None) -> Taken:
    """Gradient blocks (b, numel) by name."""
    found: Taken = {}

    def sink(slot: ParameterSlot, block: Tensor) -> None:
        assert slot.name not in found
        found[slot.name] = block

    with GradientCapture(model) as capture:
        capture.capture(batch, sink, tap)
    return found


@pytest.fixture
def by_hooks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Taken]:
    """Take gradients with every layer left to peft."""

    def take(*args: Any) -> Taken:
        with monkeypatch.context() as patched:
            patched.setattr(per_sample, "fused_layers", lambda *_: nullcontext())
            return taken(*args)

    return take


def same(found: Taken, expected: Taken, tolerance: float = 1e-5) -> None:
    """To a part of each block's largest number."""
    assert found.keys() == expected.keys()
    for name, block in expected.items():
        assert (found[name] - block).abs().max() <= tolerance * block.abs().max(), name


def put(found: Taken, slot: ParameterSlot, block: Tensor) -> None:
    """Keep a block by name."""
    found[slot.name] = block


def never(*_: object, **__: object) -> Tensor:
    """What nobody may call."""
    raise AssertionError("called")


def test_plain_layers_are_one_operation_with_the_gradients_that_hooks_give(
    llama: Any, by_hooks: Callable[..., Taken], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama.model(), llama.collate(llama.rows(6))
    expected = by_hooks(model, batch)
    assert len(expected) == 2 * len(peft_layers(model)) == 2 * len(fused(model)) > 0
    monkeypatch.setattr(peft_layer.LoraLayer, "_cast_input_dtype", never)  # of peft's forward
    same(taken(model, batch), expected)


def test_the_sum_is_that_of_rows_alone_in_float64(llama: Any) -> None:
    model, rows = llama.model().double(), llama.rows(5)
    expected = llama.gradients(model, rows)
    found = taken(model, llama.collate(rows))
    flat = torch.cat([found[slot.name] for slot in trainable_slots(model)], dim=1)
    assert (flat - expected).abs().max() <= 1e-6 * expected.abs().max()


class Quantised(nn.Linear):
    """As a library of quantised layers would make them."""


def quantise(layer: Any) -> None:
    layer.base_layer.__class__ = Quantised


def hook(layer: Any) -> None:
    layer.base_layer.register_forward_pre_hook(lambda *_: None)


def hook_matrix(layer: Any) -> None:
    layer.lora_B["default"].register_forward_hook(lambda *_: None)


def move(layer: Any) -> None:
    layer.base_layer.forward = layer.base_layer.forward


def patch(layer: Any) -> None:
    layer.forward = layer.forward


def subclass(layer: Any) -> None:
    layer.__class__ = type("Linear", (type(layer),), {"__module__": "elsewhere"})


@pytest.mark.parametrize("change", [quantise, hook, hook_matrix, move, patch, subclass])
def test_a_layer_that_another_library_changed_is_left_to_peft(
    llama: Any, by_hooks: Callable[..., Taken], change: Callable[[Any], None]
) -> None:
    model, batch = llama.model(), llama.collate(llama.rows(4))
    expected = by_hooks(model, batch)
    changed = peft_layers(model)[3]
    change(changed)
    assert fused(model) == [each for each in peft_layers(model) if each is not changed]
    same(taken(model, batch), expected)


@pytest.mark.filterwarnings("ignore:`lora_bias=True`")  # peft: it can't be merged here
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}])
def test_what_peft_computes_otherwise_is_left_to_it(llama: Any, lora: dict[str, Any]) -> None:
    model, rows = llama.model(**lora), llama.rows(4)
    assert fused(model) == []
    expected = llama.gradients(model, rows)
    found = taken(model, llama.collate(rows))
    flat = torch.cat([found[slot.name] for slot in trainable_slots(model)], dim=1)
    assert (flat - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_rank_stabilised_scaling_is_the_layers_own(
    llama: Any, by_hooks: Callable[..., Taken]
) -> None:
    model, batch = llama.model(use_rslora=True, lora_alpha=6), llama.collate(llama.rows(4))
    assert len(fused(model)) == len(peft_layers(model))
    same(taken(model, batch), by_hooks(model, batch))


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines about layers that are left to themselves; forgotten afterwards."""
    lines = [line for line in caplog.messages if "left to their own forward" in line]
    caplog.clear()
    return lines


def test_nothing_is_said_where_every_layer_is_one_operation(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "gradstore"):
        taken(llama.model(), llama.collate(llama.rows(2)))
    assert told(caplog) == []


def test_layers_that_are_left_to_themselves_are_told_of_once_for_each_reason(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = llama.model(use_dora=True), llama.collate(llama.rows(2))
    layers = peft_layers(model)
    patch(layers[0])
    subclass(layers[1])
    with caplog.at_level(logging.INFO, "gradstore"):
        taken(model, batch)
        lines = told(caplog)
        assert sorted(line.split(":")[1].strip() for line in lines) == [
            "a variant of LoRA, DoraLinearVariant", "of type elsewhere.Linear",
            "patched by another library",
        ]  # fmt: skip
        assert any(f"{len(layers) - 2} LoRA layers are" in line for line in lines)
        taken(model, batch)
        assert told(caplog) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (quantise, "base layers of type Quantised"),
        (hook, "hooks on their parts"),
        (move, "parts with a forward of their own"),
    ],
)
def test_the_reason_is_what_was_changed(
    llama: Any, change: Callable[[Any], None], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama.model()
    change(peft_layers(model)[3])
    with caplog.at_level(logging.INFO, "gradstore"):
        taken(model, llama.collate(llama.rows(2)))
    (line,) = told(caplog)
    assert line.endswith(why)
    assert "1 LoRA layers are" in line


def test_layers_that_a_forward_finds_in_several_dtypes_are_told_of(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = llama.model().bfloat16(), llama.collate(llama.rows(2))
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()
    with caplog.at_level(logging.INFO, "gradstore"):
        taken(model, batch)
    (line,) = told(caplog)
    assert line.endswith("several dtypes")


class OwnDropout(nn.Dropout):
    """As a trainer puts it in the place of torch's."""


def test_dropout_of_any_kind_does_nothing_to_gradients(
    llama: Any, by_hooks: Callable[..., Taken], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama.model(lora_dropout=0.5), llama.collate(llama.rows(4))
    for layer in peft_layers(model):
        layer.lora_dropout["default"].__class__ = OwnDropout  # type: ignore[operator, union-attr, index, assignment]
    expected = by_hooks(model, batch)
    assert fused(model.train()) == []
    monkeypatch.setattr(peft_layer.LoraLayer, "_cast_input_dtype", never)  # of peft's forward
    same(taken(model, batch), expected)


def test_layers_of_several_dtypes_are_left_to_peft(
    llama: Any, by_hooks: Callable[..., Taken], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = llama.model().bfloat16(), llama.collate(llama.rows(4))
    for parameter in filter(lambda each: each.requires_grad, model.parameters()):
        parameter.data = parameter.data.float()
    expected = by_hooks(model, batch)
    monkeypatch.setattr("gradstore.capture.lora._Fused.apply", never)
    found = taken(model, batch)
    assert all(torch.equal(found[name], block) for name, block in expected.items())


def test_autocast_computes_in_its_own_dtype(llama: Any, by_hooks: Callable[..., Taken]) -> None:
    model, batch = llama.model(), llama.collate(llama.rows(4))
    exact = by_hooks(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_peft, found = by_hooks(model, batch), taken(model, batch)

    def errors(blocks: Taken) -> float:
        return sum(
            float((blocks[name] - exact[name]).norm() / exact[name].norm()) for name in exact
        )

    assert 0 < errors(found) <= 1.1 * errors(by_peft)


def test_a_tap_sees_what_hooks_show_it(llama: Any, by_hooks: Callable[..., Taken]) -> None:
    model, batch = llama.model(), llama.collate(llama.rows(4))
    seen: tuple[dict[str, list[Tensor]], ...] = ({}, {})
    for shown, take in zip(seen, (by_hooks, taken), strict=True):
        take(model, batch, lambda slot, *pair, shown=shown: shown.update({slot.name: list(pair)}))
    expected, found = seen
    assert found.keys() == expected.keys()
    for name, (x, gradient) in expected.items():
        scale = 2.0 if "lora_B" in name else 1.0  # lora_alpha over r; with the inputs of B
        for ours, theirs in zip(found[name], (x * scale, gradient / scale), strict=True):
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_is_kept_for_the_backward(
    llama: Any, monkeypatch: pytest.MonkeyPatch, autocast: bool
) -> None:
    model, batch = llama.model(), llama.collate(llama.rows(6))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        with GradientCapture(model) as capture:
            kept, _ = capture.kept_bytes(batch)
        monkeypatch.setattr(per_sample, "fused_layers", lambda *_: nullcontext())
        with GradientCapture(model) as capture:
            assert 0 < kept <= capture.kept_bytes(batch)[0]


@pytest.mark.parametrize("fails", [False, True])
def test_layers_are_given_back_and_other_forwards_are_pefts_own(llama: Any, fails: bool) -> None:
    model, batch = llama.model().eval(), llama.collate(llama.rows(3))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    expected = model(**inputs).logits
    with pytest.raises(KeyError) if fails else nullcontext(), GradientCapture(model):
        assert any("forward" in vars(layer) for layer in peft_layers(model))
        assert torch.equal(model(**inputs).logits, expected)
        if fails:
            raise KeyError
    assert not any("forward" in vars(layer) for layer in peft_layers(model))


# ---- what happens inside of the context ------------------------------------------------------


def disable(_: pytest.MonkeyPatch, layer: Any) -> None:
    layer.enable_adapters(False)


def rescale(_: pytest.MonkeyPatch, layer: Any) -> None:
    layer.set_scale("default", 3)


def merge(_: pytest.MonkeyPatch, layer: Any) -> None:
    layer.merge()


def hook_base(_: pytest.MonkeyPatch, layer: Any) -> None:
    layer.base_layer.register_forward_hook(lambda _module, _args, output: output * 2)


def patch_class(patched: pytest.MonkeyPatch, layer: Any) -> None:
    original = type(layer).forward

    @functools.wraps(original)
    def doubled(*args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = original(*args, **kwargs) * 2
        return result

    patched.setattr(type(layer), "forward", doubled)


def patch_linear(patched: pytest.MonkeyPatch, _: Any) -> None:
    original = nn.Linear.forward
    patched.setattr(nn.Linear, "forward", lambda module, x: original(module, x) * 1.25)


def hook_all(_patched: pytest.MonkeyPatch, _layer: Any) -> RemovableHandle:
    return nn.modules.module.register_module_forward_hook(
        lambda module, _args, output: output * 1.25 if isinstance(module, nn.Linear) else None
    )


CHANGES = [disable, rescale, merge, hook_base, patch_class, patch_linear, hook_all]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("entered", [False, True])
def test_changes_of_a_layer_before_a_batch_are_seen(
    llama: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any], entered: bool
) -> None:
    if not entered and change in (disable, merge):
        pytest.skip("refused by name")
    batch, seen = llama.collate(llama.rows(4)), []
    for by_peft in (True, False):
        model, found = llama.model(), {}
        with monkeypatch.context() as patched, ExitStack() as changed:
            if by_peft:
                patched.setattr(per_sample, "fused_layers", lambda *_: nullcontext())
            if not entered:
                changed.enter_context(change(patched, peft_layers(model)[3]) or nullcontext())
            with GradientCapture(model) as capture:
                if entered:
                    changed.enter_context(change(patched, peft_layers(model)[3]) or nullcontext())
                stats = capture.capture(batch, functools.partial(put, found))
        seen.append((found, stats.loss))
    (expected, loss), (found, ours) = seen
    assert (ours - loss).abs().max() <= 1e-4
    same(found, expected, 1e-4)


def test_a_forward_that_was_put_in_the_place_of_ours_stays(llama: Any) -> None:
    model = llama.model()
    layer, other = peft_layers(model)[:2]
    with GradientCapture(model):
        layer.forward = mine = functools.partial(layer.forward)
        del other.forward
    assert vars(layer)["forward"] is mine
    assert "forward" not in vars(other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at it
def test_a_compiled_layer_is_left_to_peft(llama: Any, by_hooks: Callable[..., Taken]) -> None:
    model, batch = llama.model(), llama.collate(llama.rows(3))
    expected = by_hooks(model, batch)
    peft_layers(model)[0].compile(backend="eager")
    same(taken(model, batch), expected)


class Odd(nn.Module):
    """Changes a layer's output in place, and calls a layer with no tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.layer, self.other = peft_layers(model)[0:4:3]  # of q and o, as wide

    def forward(self, x: Tensor) -> Tensor:
        nothing = self.other(x[:, :0])
        return torch.cat([self.layer(x).clamp_(-0.5, 0.5), nothing], dim=1)


@pytest.mark.parametrize("rows", [1, 3])
def test_outputs_may_be_changed_in_place_and_be_empty(llama: Any, rows: int) -> None:
    odd = Odd(llama.model().eval())
    x = torch.randn(rows, 5, 32, generator=torch.Generator().manual_seed(1))
    weight = odd.layer.lora_A["default"].weight  # type: ignore[operator, union-attr, index]
    (expected,) = torch.autograd.grad(odd(x).square().sum(), weight)
    matrices = watched_linears(odd, trainable_slots(odd))
    blocks: Taken = {}
    targets = Targets.of({"labels": torch.ones(rows, 5, dtype=torch.long)})
    seen = HookedPass(targets, lambda slot, block: blocks.update({slot.name: block}))
    with fused_layers(odd, matrices, lambda: seen):
        for each in matrices:
            each.module.register_forward_hook(lambda *_: None)  # as capture's
        total = odd(x).square().sum()
        seen.await_only({each.weight for each in matrices if each.weight is not None})
        total.backward()
    found = blocks["layer.lora_A.default.weight"].sum(0).view_as(expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_inputs_made_in_inference_mode_are_left_to_peft(
    llama: Any, by_hooks: Callable[..., Taken]
) -> None:
    """No operation may keep one for its backward; hooks do."""
    model, batch = llama.model(), llama.collate(llama.rows(3))
    expected = taken(model, batch)
    norm = next(m for name, m in model.named_modules() if name.endswith("0.input_layernorm"))
    norm.forward = torch.inference_mode()(norm.forward)
    same(taken(model, batch), by_hooks(model, batch))
    same(taken(model, batch), expected)


def test_float64_under_autocast_stays_float64(llama: Any, by_hooks: Callable[..., Taken]) -> None:
    model, batch = llama.model().double(), llama.collate(llama.rows(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(taken(model, batch), by_hooks(model, batch))


def test_the_output_layer_is_compared_by_one_way_of_computing(llama: Any) -> None:
    """What follows it may make logits float32 of a model that computed in bfloat16."""
    model, batch = llama.model().bfloat16(), llama.collate(llama.rows(5))
    model.register_forward_hook(lambda _module, _args, output: output.logits.float())
    taken(model, batch)
    assert RowLoss._verified[model] is True
