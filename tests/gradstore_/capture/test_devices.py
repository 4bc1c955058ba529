"""Gradients of each device, in each precision, against the CPU's in float32 of one row at a time.

The CPU's own cases show that what is asked of a GPU can be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaForCausalLM

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.recomputing import checkpointed
from gradstore.capture.slots import ParameterSlot
from gradstore.export import projected
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.projected import compute_unit, export_features
from gradstore.export.units import Batches
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange

CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=CUDA)])
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])

Kit = Any  # LlamaKit of the conftest


def whole() -> Any:
    """No adapter: all weights are trained, and the output layer is the embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


def adapted(llama: Kit, **lora: Any) -> Any:
    """LoRA of a size at which rounding is not most of a row's gradient in bf16."""
    model = llama.model(**lora)
    for name, parameter in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data *= 0.25
    return model


MODELS: dict[str, Callable[[Kit], Any]] = {
    "lora": adapted,
    "dora": lambda llama: adapted(llama, use_dora=True),
    "whole": lambda _: whole(),
}
#: How a model computes: its weights' dtype, and what autocast does.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bf16": (torch.float32, torch.bfloat16),
    "bf16_weights": (torch.bfloat16, None),
    "fp16": (torch.float32, torch.float16),
}
#: Most that a row's gradient may miss by: some times what the CPU's misses by, which is rounding.
MISSES = {"float32": 1e-4, "bf16": 0.03, "bf16_weights": 0.04, "fp16": 4e-3}


def captured(
    model: Any, batch: dict[str, Tensor], *, again: bool = False, device: str = "cpu"
) -> Tensor:
    """Gradients (b, p) float32 on the CPU.

    Args:
        model: on the device.
        batch: not yet.
        again: with layers that are computed once more in the backward.
        device: of the model.
    """
    recomputed: AbstractContextManager[None] = nullcontext()
    with GradientCapture(model) as capture:
        out = torch.full((len(batch["labels"]), capture.p), torch.nan)

        def sink(slot: ParameterSlot, block: Tensor) -> None:
            assert block.device.type == device
            out[:, slot.start : slot.start + slot.numel] = block.cpu()

        if again:
            recomputed = checkpointed(model)
        with recomputed:
            capture.capture({key: value.to(device) for key, value in batch.items()}, sink)
    assert not bool(out.isnan().any())
    return out


def exact(llama: Kit, model: Any, rows: list[Any]) -> Tensor:
    """Of one row at a time, on the CPU in float32, with the weights that the model has."""
    model = model.to("cpu", torch.float32)
    return torch.cat([captured(model, llama.collate([row])) for row in rows])


def misses(found: Tensor, expected: Tensor) -> Tensor:
    """Per row ||found - expected|| / ||expected||."""
    return (found - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """No TF32: a float32 product has all its digits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@each_device
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_row_in_a_batch_has_the_gradient_that_the_cpu_gives_it_alone(
    llama: Kit, kind: str, precision: str, again: bool, device: str
) -> None:
    model, rows = MODELS[kind](llama), llama.rows(6)
    weights, computes = PRECISIONS[precision]
    model.to(weights)
    expected = exact(llama, model, rows)
    model.to(device, weights)
    with torch.autocast(device, dtype=computes, enabled=computes is not None):
        found = captured(model, llama.collate(rows), again=again, device=device)
    assert misses(found, expected).max() <= MISSES[precision]


@each_device
@pytest.mark.parametrize("kind", ["adam_marginal", "sgd"])
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_features_made_by_the_projection_follow_the_cpus_in_bf16(
    llama: Kit, kind: Any, method: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # as on a GPU, with plain torch in the kernels' place
        monkeypatch.setattr(projected, "FUSED", ("cpu",))
    model, rows = adapted(llama), llama.rows(9)
    p = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    options: dict[str, Any] = {
        "features": FeatureSpec(kind), "moments": llama.moments(model),
        "projection": ProjectionSpec(method, p=p, d=256, seed=5),
    }  # fmt: skip

    def exported(size: int) -> np.ndarray:
        parts = list(export_features(model, llama.batches(rows, size), **options))
        assert all((part.status == RowStatus.OK).all() for part in parts)
        order = np.argsort(np.concatenate([part.rows for part in parts]))
        return np.concatenate([part.features for part in parts])[order]

    with monkeypatch.context() as plain:
        plain.setattr(projected, "FUSED", ())
        expected = exported(1)
    model.to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        found = exported(4)
    cosines = cosine_similarity(torch.from_numpy(found), torch.from_numpy(expected))
    assert cosines.min() > 0.998


@each_device
@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_were_cut_after_memory_ran_out_have_the_features_of_the_cpu(
    llama: Kit, kind: str, device: str
) -> None:
    model, rows = MODELS[kind](llama), llama.rows(9)
    with GradientCapture(model) as capture:
        p = capture.p
    recipe = Recipe(FeatureSpec("sgd", modules="all"), ProjectionSpec("sjlt", p=p, d=256, seed=5))
    lengths, unit = [len(row["input_ids"]) for row in rows], UnitRange(0, 0, len(rows))
    expected = compute_unit(model, Batches(rows, llama.collate, lengths, max_rows=1), recipe, unit)

    def full(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        """Fail as a device of 60 tokens would, by asking for more than any device has."""
        if inputs["input_ids"].numel() > 60:
            if device == "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory.")
            torch.empty(1 << 50, device=device)

    model.to(device)
    model.register_forward_pre_hook(full, with_kwargs=True)
    batches = Batches(rows, llama.collate, lengths)
    found = compute_unit(model, batches, recipe, unit)
    assert batches.tokens_at_once <= 60
    np.testing.assert_array_equal(found.status, expected.status)
    miss = np.linalg.norm(found.features - expected.features, axis=1)
    assert (miss / np.linalg.norm(expected.features, axis=1)).max() <= 1e-4


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let CUDA raise where the host would wait for it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@on_gpu
@pytest.mark.parametrize("kind", ["adam_marginal", "sgd"])
@pytest.mark.parametrize("method", ["sjlt", "rademacher"])
def test_a_backward_on_a_gpu_never_waits(
    llama: Kit, kind: Any, method: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tests of operations say on a CPU (`test_host_waits.py`), said by CUDA itself."""
    model, rows = llama.model().to(device), llama.rows(8)
    rows[2]["labels"] = [-100] * len(rows[2]["labels"])  # of a row without a target, too
    p = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    backward, watched = Tensor.backward, list[int]()

    def export() -> int:
        parts = export_features(
            model, llama.batches(rows, 4), features=FeatureSpec(kind),
            moments=llama.moments(model), projection=ProjectionSpec(method, p=p, d=256),
        )  # fmt: skip
        return sum(len(part.rows) for part in parts)

    def strictly(self: Tensor, *args: Any, **kwargs: Any) -> None:
        watched.append(1)
        with no_waiting():
            backward(self, *args, **kwargs)

    export()  # compiles, and loads what is loaded once
    monkeypatch.setattr(Tensor, "backward", strictly)
    assert export() == len(rows)
    assert len(watched) == 2


@on_gpu
def test_a_wait_is_an_error_there(device: str) -> None:
    """So that the test above can fail."""
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        x.sum().item()
