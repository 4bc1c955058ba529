"""LoRA on weights of 4 bits, by bitsandbytes: a batch gives each row the gradient it has alone.

bitsandbytes is no dependency, also not of the tests: CI runs this file once more with it.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
        ],
    ),
]
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
    ),
    # Of libraries that were written before those they work with.
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]


def quantised(folder: Path, device: str) -> Any:
    """A tiny Llama whose linear layers are in NF4, under LoRA with random matrices."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    how = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=how, device_map={"": device}, dtype=torch.float32
    )
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = (0.2 * torch.randn(parameter.shape, generator=generator)).to(device)
    return model


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Gradients (b, p) and losses (b,), on the CPU."""
    device = next(model.parameters()).device
    with GradientCapture(model) as capture:
        found = torch.full((len(batch["labels"]), capture.p), torch.nan)

        def sink(slot: ParameterSlot, block: Tensor) -> None:
            found[:, slot.start : slot.start + slot.numel] = block.cpu()

        stats = capture.capture({k: v.to(device) for k, v in batch.items()}, sink)
    return found, stats.loss.cpu()


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_over_weights_of_four_bits_has_the_gradients_of_its_rows_alone(
    llama: Any, device: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = quantised(tmp_path, device), llama.rows(5)
    kinds = {type(m).__name__ for n, m in model.named_modules() if n.endswith("base_layer")}
    assert kinds == {"Linear4bit"}
    with caplog.at_level(logging.INFO, "gradstore"):
        found, losses = gradients(model, llama.collate(rows))
        alone = [gradients(model, llama.collate([row])) for row in rows]
    expected = torch.cat([row for row, _ in alone])
    assert expected.norm(dim=1).min() > 0
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 1e-5
    torch.testing.assert_close(losses, torch.cat([loss for _, loss in alone]), rtol=1e-5, atol=1e-6)
    lines = [line for line in caplog.messages if "left to their own forward" in line]
    assert len(lines) == 1
    assert lines[0].endswith("peft.tuners.lora.bnb.Linear4bit")


@pytest.mark.parametrize("device", DEVICES)
def test_they_are_those_of_autograd(llama: Any, device: str, tmp_path: Path) -> None:
    model, (row,) = quantised(tmp_path, device), llama.rows(1)
    found, _ = gradients(model, llama.collate([row]))
    model.eval()
    ids = torch.tensor([row["input_ids"]], device=device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor(row["labels"][1:], device=device)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pieces = torch.autograd.grad(loss, parameters)
    expected = torch.cat([piece.reshape(-1) for piece in pieces]).cpu()
    assert (found[0] - expected).norm() <= 1e-5 * expected.norm()
