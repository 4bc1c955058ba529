"""Gradients of long rows in float16 against those in float32: small ones do not vanish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gradstore.capture import scaling
from gradstore.capture.losses import Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.scaling import TOKEN_SCALE, in_float16, row_scales
from gradstore.capture.slots import ParameterSlot

VOCABULARY, LONGEST = 512, 600
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base() -> Any:
    """A model whose output layer passes on as little of a gradient as a large model's."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            pad_token_id=0, initializer_range=0.1,
        )
    )  # fmt: skip
    model.lm_head.weight.data *= 0.001
    return model


def adapted(**options: Any) -> Any:
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **options
    )
    return get_peft_model(base(), lora)


def with_norms(**options: Any) -> Any:
    """Norms are trained beside LoRA, which no hook covers there."""
    model = adapted(**options)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad = True
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "lora": adapted,
    "dora": lambda: adapted(use_dora=True),
    "norms": with_norms,
    "whole": base,
}


def batch_of(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    labels = torch.where(mask, ids, -100)
    return {"input_ids": ids * mask, "labels": labels, "attention_mask": mask.long()}


def captured(model: Any, batch: Batch, tap: Any = None) -> tuple[Tensor, Tensor]:
    """Gradients (b, p) and losses (b,)."""
    with GradientCapture(model) as capture:
        out = torch.full((len(batch["labels"]), capture.p), torch.nan)

        def sink(slot: ParameterSlot, block: Tensor) -> None:
            assert block.dtype == torch.float32
            out[:, slot.start : slot.start + slot.numel] = block

        return out, capture.capture(batch, sink, tap).loss


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What we say, beside what a model's library says of it."""
    return [each.getMessage() for each in caplog.records if each.name.startswith("gradstore")]


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.float16)


def cosines(found: Tensor, expected: Tensor) -> Tensor:
    return F.cosine_similarity(found.double(), expected.double(), dim=1)


@pytest.mark.parametrize("kind", MODELS)
def test_long_rows_have_the_gradients_of_float32(kind: str) -> None:
    model, batch = MODELS[kind](), batch_of(LONGEST, 9)
    expected, losses = captured(model, batch)
    with half():
        found, ours = captured(model, batch)
    assert cosines(found, expected).min() > 0.999
    lengths = found.norm(dim=1) / expected.norm(dim=1)
    assert (lengths - 1).abs().max() < 0.02
    torch.testing.assert_close(ours, losses, rtol=2e-3, atol=0)


def test_where_autograd_adds_tokens_up_in_float16_a_mean_gradient_above_2_has_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of norms, which no hook covers beside LoRA: at the row's own scale, 32,768, it would not."""
    model, batch = with_norms(), batch_of(LONGEST)
    model.get_base_model().lm_head.weight.data *= 30_000
    model.get_base_model().half()
    with GradientCapture(model) as capture:
        rest = [slot for slot in capture.slots if slot not in capture.hooked]
    found, _ = captured(model, batch)
    norms = torch.cat([found[0, slot.start : slot.start + slot.numel] for slot in rest])
    assert float(norms.abs().max()) > 2
    assert bool(torch.isfinite(norms).all())
    monkeypatch.setattr("gradstore.capture.fallback.MOST_SCALE", 1e9)
    found, _ = captured(model, batch)
    norms = torch.cat([found[0, slot.start : slot.start + slot.numel] for slot in rest])
    assert not bool(torch.isfinite(norms).all())


def test_without_a_scale_they_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above can fail."""
    model, batch = adapted(), batch_of(LONGEST)
    expected, _ = captured(model, batch)
    monkeypatch.setattr("gradstore.capture.per_sample.in_float16", lambda *_: False)
    with half():
        found, _ = captured(model, batch)
    assert cosines(found, expected).max() < 0.999


def test_what_blocks_are_made_of_is_shown_without_the_scale() -> None:
    """As Kronecker factors take the moments of output gradients."""
    model, batch = adapted(), batch_of(60, 9)

    def tapped() -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}

        def tap(slot: ParameterSlot, x: Tensor, gradient: Tensor) -> None:
            made = torch.einsum("bto,bti->boi", gradient.double(), x.double())
            seen[slot.name] = made.flatten(1)

        captured(model, batch, tap)
        return seen

    expected = tapped()
    with half():
        found = tapped()
    assert found.keys() == expected.keys()
    for name, made in expected.items():
        assert cosines(found[name], made).min() > 0.999, name
        assert (found[name].norm(dim=1) / made.norm(dim=1) - 1).abs().max() < 0.02, name


def test_a_rows_scale_is_its_own_power_of_two() -> None:
    counts = torch.cat([torch.arange(3000), 2 ** torch.arange(12, 24)])
    scales = row_scales(counts)
    assert torch.equal(torch.frexp(scales).mantissa, torch.full_like(scales, 0.5))
    each = (scales / counts.clamp(min=1)).double()
    assert each.max() <= TOKEN_SCALE
    assert each.min() > TOKEN_SCALE / 2
    assert torch.equal(scales[:1], row_scales(counts[1:2]))


def test_weights_of_tokens_are_scaled_and_losses_are_not() -> None:
    targets = Targets.of(batch_of(6, 4))
    scaled = targets.scaled(torch.tensor([8.0, 2.0]))
    assert targets.weights().tolist() == pytest.approx([1 / 5] * 5 + [1 / 3] * 3)
    assert scaled.weights().tolist() == pytest.approx([8 / 5] * 5 + [2 / 3] * 3)
    assert scaled.unscaled(torch.tensor([16.0, 3.0])).tolist() == [2.0, 1.5]
    assert targets.unscaled(torch.tensor([16.0, 3.0])).tolist() == [16.0, 3.0]


def test_a_row_that_overflows_all_the_same_is_not_finite_and_told_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scaling, "TOKEN_SCALE", 2.0**17)  # its tokens give more than 65,504 each
    model, batch = adapted(), batch_of(30, 9)
    with half(), GradientCapture(model) as capture:
        for _ in range(2):
            rows = torch.ones(2, dtype=torch.bool)

            def sink(slot: ParameterSlot, block: Tensor, rows: Tensor = rows) -> None:
                rows &= torch.isfinite(block).all(dim=1)

            loss = capture.capture(batch, sink).loss
            assert rows.tolist() == [False, False]
            assert bool(torch.isfinite(loss).all())
    (line,) = [line for line in caplog.messages if "overflow float16" in line]
    assert "gradients of 2 rows" in line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_left_alone(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scaling, "TOKEN_SCALE", torch.inf)
    model, batch = adapted(), batch_of(30, 9)
    with torch.autocast("cpu", dtype=dtype) if dtype == torch.bfloat16 else nullcontext():
        found, _ = captured(model, batch)
    assert bool(torch.isfinite(found).all())
    assert not told(caplog)


def test_float16_is_seen_in_weights_and_under_autocast() -> None:
    model, cpu = base(), torch.device("cpu")
    assert not in_float16(model, cpu)
    with half():
        assert in_float16(model, cpu)
    model.model.norm.half()
    assert in_float16(model, cpu)


def test_nothing_is_told_of_a_row_whose_loss_is_not_finite(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is no matter of float16."""
    model, batch = adapted(), batch_of(30, 9)
    model.get_input_embeddings().weight.data[511] = torch.inf
    batch["input_ids"][1, 2] = 511
    batch["input_ids"][0][batch["input_ids"][0] == 511] = 5
    with half(), caplog.at_level(logging.WARNING, "gradstore"):
        found, loss = captured(model, batch)
    assert torch.isfinite(loss).tolist() == [True, False]
    assert torch.isfinite(found).all(dim=1).tolist() == [True, False]
    assert not told(caplog)
