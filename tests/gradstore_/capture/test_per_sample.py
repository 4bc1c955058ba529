"""Captured gradients against plain autograd of one row at a time, on tiny random models."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from gradstore.capture import losses
from gradstore.capture.hooks import HookedPass
from gradstore.capture.losses import RowLoss
from gradstore.capture.per_sample import GradientCapture, batch_losses
from gradstore.capture.recomputing import checkpointable, checkpointed
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments

VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
pytestmark = pytest.mark.filterwarnings(
    # peft warns of ties that the model does not have, and of those that a test is about.
    "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"
)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def adapted(base: nn.Module, **options: Any) -> Any:
    """Wraps a model in LoRA whose matrices are all random, so that no gradient is trivially 0."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options}
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        elif "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand(parameter.shape, generator=generator)
    return model.train()


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{**SIZES, **options.pop("config", {})}))
    return adapted(base, **options)


def qwen2() -> Any:
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return adapted(base)


def trainable_norms() -> Any:
    model = llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad = True
    return model


def lora_bias() -> Any:
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    return adapted(base, lora_bias=True, target_modules=["q_proj", "v_proj"])


def bias_lora_only() -> Any:
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    return adapted(base, bias="lora_only", target_modules=["q_proj", "v_proj", "down_proj"])


def tied_adapters() -> Any:
    """The second layer's MLP uses the first layer's matrices of LoRA."""
    model = llama()
    first, second = model.base_model.model.model.layers
    for name in ("up_proj", "gate_proj"):
        for part in ("lora_A", "lora_B"):
            source = getattr(getattr(first.mlp, name), part)["default"]
            getattr(getattr(second.mlp, name), part)["default"].weight = source.weight
    return model


def called_twice() -> Any:
    """Both layers of the model are the same module."""
    model = llama()
    layers = model.base_model.model.model.layers
    layers[1] = layers[0]
    return model


def gemma2() -> Any:
    """Soft-capped logits, so something follows the output layer."""
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES, head_dim=8, final_logit_softcapping=0.5, attn_implementation="eager"
    )
    return adapted(Gemma2ForCausalLM(config))


def granite() -> Any:
    """Scaled logits."""
    torch.manual_seed(0)
    return adapted(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=0.3)))


def mixtral() -> Any:
    """Routed experts with an auxiliary loss that must not enter."""
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    return adapted(MixtralForCausalLM(config), target_modules=["q_proj", "v_proj", "o_proj"])


MODELS: dict[str, Callable[[], Any]] = {
    "llama_gqa": llama,
    "llama_mha": lambda: llama(config={"num_key_value_heads": 4}),
    "qwen2_biases": qwen2,
    "rslora": lambda: llama(use_rslora=True),
    "dora": lambda: llama(use_dora=True, target_modules=["q_proj", "down_proj"]),
    "lora_bias": lora_bias,
    "bias_lora_only": bias_lora_only,
    "trainable_norms": trainable_norms,
    "modules_to_save_head": lambda: llama(modules_to_save=["lm_head"]),
    "modules_to_save_embedding": lambda: llama(modules_to_save=["embed_tokens"]),
    "lora_on_head": lambda: llama(target_modules=["q_proj", "lm_head"]),
    "tied_embeddings": lambda: llama(
        config={"tie_word_embeddings": True}, target_modules=["embed_tokens", "q_proj", "up_proj"]
    ),
    "tied_adapters": tied_adapters,
    "called_twice": called_twice,
    "gemma2_softcap": gemma2,
    "granite_scaled": granite,
    "mixtral": mixtral,
    "dropout": lambda: llama(lora_dropout=0.5),
}


def make_batch(
    lengths: list[int], *, seed: int = 5, multiple: int = 8, prompts: list[int] | None = None
) -> Batch:
    """Right-padded rows; the first `prompts` tokens of a row carry no label."""
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(lengths) // multiple) * multiple
    rows = len(lengths)
    input_ids = torch.zeros(rows, width, dtype=torch.long)
    labels = torch.full((rows, width), -100)
    mask = torch.zeros(rows, width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        input_ids[row, :length] = tokens
        mask[row, :length] = 1
        prompt = (length // 3) if prompts is None else prompts[row]
        labels[row, prompt:length] = tokens[prompt:]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def reference(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Plain autograd, one unpadded row at a time: gradients (b, p) float32, losses (b,)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    training = {module: module.training for module in model.modules()}
    model.eval()
    gradients, losses = [], []
    for row in range(batch["input_ids"].shape[0]):
        length = int(batch["attention_mask"][row].sum())
        ids = batch["input_ids"][row : row + 1, :length]
        labels = batch["labels"][row, 1:length]
        if not (labels != -100).any():
            gradients.append(torch.zeros(sum(p.numel() for p in parameters)))
            losses.append(torch.tensor(torch.nan))
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, labels, ignore_index=-100)
        flat = torch.autograd.grad(loss, parameters, allow_unused=True)
        pieces = [
            torch.zeros(p.numel()) if g is None else g.reshape(-1).float()
            for g, p in zip(flat, parameters, strict=True)
        ]
        gradients.append(torch.cat(pieces))
        losses.append(loss.detach())
    for module, flag in training.items():
        module.training = flag
    return torch.stack(gradients), torch.stack(losses)


def captured(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """All blocks of one batch as (b, p), each slot exactly once, and the losses (b,)."""
    with GradientCapture(model) as capture:
        return captured_in(capture, batch)


def captured_in(capture: GradientCapture, batch: Batch) -> tuple[Tensor, Tensor]:
    out = torch.full((batch["labels"].shape[0], capture.p), torch.nan)
    seen: set[str] = set()

    def sink(slot: ParameterSlot, block: Tensor) -> None:
        assert slot.name not in seen
        assert block.shape == (out.shape[0], slot.numel)
        assert block.dtype == torch.float32
        assert not block.requires_grad
        seen.add(slot.name)
        out[:, slot.start : slot.start + slot.numel] = block

    stats = capture.capture(batch, sink)
    assert seen == {slot.name for slot in capture.slots}
    return out, stats.loss


def relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Per row ||found - expected|| / ||expected||, in float64."""
    difference = (found.double() - expected.double()).norm(dim=1)
    return difference / expected.double().norm(dim=1).clamp(min=1e-30)


LENGTHS = [11, 24, 7, 16, 20, 5, 13, 9]


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_gives_each_row_the_gradient_it_has_alone(kind: str) -> None:
    model = MODELS[kind]()
    batch = make_batch(LENGTHS[:3])
    expected, losses = reference(model, batch)
    found, found_losses = captured(model, batch)
    assert expected.norm(dim=1).min() > 0
    assert relative_errors(found, expected).max() <= 1e-5
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["adam_marginal", "adam", "sgd", "sign", "raw"])
def test_features_do_not_depend_on_batch_size_padding_or_order(kind: Any, rows: int) -> None:
    model = llama()
    order = torch.randperm(len(LENGTHS), generator=torch.Generator().manual_seed(rows))
    whole = make_batch(LENGTHS)
    expected, _ = reference(model, whole)
    with GradientCapture(model) as capture:
        pieces = []
        for chosen in order.split(rows):
            width = -(-max(LENGTHS[int(i)] for i in chosen) // 8) * 8
            batch = {key: value[chosen, :width] for key, value in whole.items()}
            pieces.append(captured_in(capture, batch)[0])
        slots = capture.slots
    found = torch.empty_like(expected)
    found[order] = torch.cat(pieces)
    if kind == "raw":
        assert relative_errors(found, expected).max() <= 1e-5
        return
    generator = torch.Generator().manual_seed(9)
    scale = float(expected.abs().mean())
    constants = AdamConstants(0.9, 0.999, 1e-8, 10)
    moments = AdamMoments(
        {
            slot.name: ParameterMoments(
                scale * torch.randn(slot.shape, generator=generator),
                (scale * torch.randn(slot.shape, generator=generator)) ** 2,
                constants,
            )
            for slot in slots
        }
    )
    feature_map = FeatureMap(FeatureSpec(kind), slots, moments)
    loud = expected.abs() > 1e-5 * expected.abs().amax(dim=1, keepdim=True)
    for slot in slots:
        span = slice(slot.start, slot.start + slot.numel)
        for table in (found, expected):
            table[:, span] = feature_map.apply_(slot, table[:, span].clone())
    if kind == "sign":
        assert torch.equal(found[loud], expected[loud])
    else:
        assert relative_errors(found, expected).max() <= 1e-5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_any_lengths_and_label_masks_give_the_reference(data: st.DataObject) -> None:
    model = _shared_model()
    lengths = data.draw(st.lists(st.integers(1, 17), min_size=1, max_size=5))
    batch = make_batch(lengths, seed=data.draw(st.integers(0, 99)), multiple=1)
    for row, length in enumerate(lengths):
        shown = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        batch["labels"][row, :length] = torch.where(
            torch.tensor(shown), batch["input_ids"][row, :length], -100
        )
    expected, losses = reference(model, batch)
    found, found_losses = captured(model, batch)
    # Few targets can have gradients of almost 0 by cancellation: an absolute floor beside.
    difference = (found - expected).norm(dim=1)
    assert bool((difference <= 1e-5 * expected.norm(dim=1) + 1e-8).all())
    torch.testing.assert_close(found_losses, losses, equal_nan=True, rtol=1e-5, atol=1e-6)
    stats = batch_losses(model, batch)
    torch.testing.assert_close(stats.loss, losses, equal_nan=True, rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.target_tokens, (batch["labels"][:, 1:] != -100).sum(1))


_SHARED: list[Any] = []


def _shared_model() -> Any:
    if not _SHARED:
        _SHARED.append(llama())
    return _SHARED[0]


def test_position_ids_in_the_batch_reach_the_model() -> None:
    model = llama()
    batch = make_batch([9, 12])
    positions = torch.arange(16).repeat(2, 1)
    plain, _ = captured(model, batch)
    same, _ = captured(model, {**batch, "position_ids": positions})
    other, _ = captured(model, {**batch, "position_ids": positions * 3})
    assert relative_errors(same, plain).max() <= 1e-5
    assert relative_errors(other, plain).min() > 1e-3


def test_keys_that_are_not_the_models_are_dropped() -> None:
    model = llama()
    batch = make_batch([9, 12])
    plain, _ = captured(model, batch)
    extra = {**batch, "domain_id": torch.tensor([0, 1]), "num_items_in_batch": torch.tensor(7)}
    assert torch.equal(captured(model, extra)[0], plain)


@pytest.mark.parametrize("kind", ["llama_gqa", "modules_to_save_embedding"])
def test_a_row_without_targets_gets_zeros_and_a_nan_loss(kind: str) -> None:
    model = MODELS[kind]()
    batch = make_batch([9, 12, 7])
    batch["labels"][1] = -100
    expected, _ = reference(model, batch)
    with GradientCapture(model) as capture:
        found, losses = captured_in(capture, batch)
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        none_found, none_losses = captured_in(capture, nothing)
    assert bool((found[1] == 0).all())
    assert torch.isnan(losses).tolist() == [False, True, False]
    assert relative_errors(found[::2], expected[::2]).max() <= 1e-5
    assert bool((none_found == 0).all())
    assert bool(torch.isnan(none_losses).all())
    assert bool(torch.isnan(batch_losses(model, nothing).loss).all())


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_that_is_not_finite_leaves_the_others_alone(masked: bool) -> None:
    model = llama(target_modules=[*LINEARS, "embed_tokens"])
    batch = make_batch([9, 12, 7])
    clean, clean_losses = captured(model, batch)
    poison = VOCABULARY - 1
    batch["input_ids"][batch["input_ids"] == poison] = 5
    clean, clean_losses = captured(model, batch)
    batch["input_ids"][1, 2] = poison
    if masked:
        batch["labels"][1] = -100
    embedding = model.get_input_embeddings().base_layer
    embedding.weight.data[poison] = torch.inf
    found, losses = captured(model, batch)
    assert torch.equal(found[::2], clean[::2])
    assert torch.equal(losses[::2], clean_losses[::2])
    assert bool(torch.isnan(losses[1]))
    if masked:
        assert bool((found[1] == 0).all())
    else:
        assert not bool(torch.isfinite(found[1]).all())


def test_dropout_is_off_and_the_random_state_untouched() -> None:
    model = llama(lora_dropout=0.5, config={"attention_dropout": 0.5})
    batch = make_batch([9, 12])
    state = torch.get_rng_state()
    first, _ = captured(model, batch)
    second, _ = captured(model, batch)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def _fingerprint(model: nn.Module) -> list[Any]:
    return [
        [(n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()],
        [(n, m.training) for n, m in model.named_modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [len(p._backward_hooks or ()) for p in model.parameters()],
        model.config.use_cache,
        getattr(model.config, "output_router_logits", None),
    ]


@pytest.mark.parametrize("kind", ["llama_gqa", "mixtral", "trainable_norms"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_given_back_as_it_was(kind: str, fails: bool) -> None:
    model = MODELS[kind]()
    model.base_model.model.model.layers[0].eval()  # a mixed state, as some trainers leave it
    first = next(p for p in model.parameters() if p.requires_grad)
    first.grad = torch.ones_like(first)
    before = _fingerprint(model)
    batch = make_batch([9, 12])

    def sink(slot: ParameterSlot, block: Tensor) -> None:
        if fails:
            raise OSError("disk full")

    def use() -> None:
        with GradientCapture(model) as capture:
            assert not any(p.requires_grad for p in model.parameters())
            capture.capture(batch, sink)

    if fails:
        with pytest.raises(OSError, match="disk full"):
            use()
    else:
        use()
    assert _fingerprint(model) == before
    assert torch.equal(first.grad, torch.ones_like(first))
    batch_losses(model, batch)
    assert _fingerprint(model) == before


def test_a_failing_forward_gives_the_model_back_too() -> None:
    model = llama()
    before = _fingerprint(model)
    batch = make_batch([9, 12])
    batch["input_ids"][0, 0] = VOCABULARY + 5
    with pytest.raises(IndexError), GradientCapture(model) as capture:
        capture.capture(batch, lambda slot, block: None)
    assert _fingerprint(model) == before


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_trains_with_checkpoints_is_captured_without(reentrant: bool) -> None:
    model = llama()
    batch = make_batch(LENGTHS[:3])
    expected, _ = reference(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with counted_layers(model) as calls:
        found, _ = captured(model, batch)
    assert set(calls.values()) == {1}
    assert relative_errors(found, expected).max() <= 1e-5


@contextmanager
def counted_layers(model: nn.Module) -> Iterator[Counter[nn.Module]]:
    """Count the forwards that each layer's feed-forward part begins; a second may stop early."""
    calls: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_pre_hook(lambda part, _: calls.update([part]))
        for name, module in model.named_modules()
        if name.split(".")[-1] in ("mlp", "block_sparse_moe", "feed_forward")
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def dense_llama() -> Any:
    """No adapter: whole weights, tied embeddings and norms among them."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True})).train()


CHECKPOINTED = {
    name: MODELS[name]
    for name in ("llama_gqa", "dora", "trainable_norms", "gemma2_softcap", "tied_adapters",
                 "mixtral", "modules_to_save_head", "dropout")
} | {"dense": dense_llama}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_layers_that_are_computed_again_in_the_backward_have_the_same_gradients(kind: str) -> None:
    model = CHECKPOINTED[kind]()
    batch = make_batch(LENGTHS[:3])
    expected, _ = reference(model, batch)
    before = _fingerprint(model)
    with counted_layers(model) as calls, GradientCapture(model) as capture, checkpointed(model):
        found, _ = captured_in(capture, batch)
    assert len(calls) == 2
    assert min(calls.values()) >= 2, "each layer was computed again"
    assert relative_errors(found, expected).max() <= 1e-5
    assert _fingerprint(model) == before


@contextmanager
def tight(limit: int) -> Iterator[list[bool]]:
    """Let memory run out where a backward has kept the inside of two layers, after some blocks.

    The stand-in fails with the `limit`-th block of an attempt that does not checkpoint; whether
    each attempt did is told.
    """
    attempts: list[bool] = []
    blocks: Counter[int] = Counter()
    begin, deliver = GradientCapture._new_pass, HookedPass._deliver

    def new_pass(self: GradientCapture, *args: Any) -> Any:
        attempts.append(any(layer.training for layer in checkpointable(self._model)))
        return begin(self, *args)

    def counted(self: HookedPass, slot: ParameterSlot, block: Tensor) -> None:
        blocks[id(self)] += 1
        if blocks[id(self)] == limit and not attempts[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        deliver(self, slot, block)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GradientCapture, "_new_pass", new_pass)
        patched.setattr(HookedPass, "_deliver", counted)
        yield attempts


@pytest.mark.parametrize("kind", ["llama_gqa", "dora", "dropout", "tied_adapters"])
def test_a_row_that_does_not_fit_is_checkpointed_and_those_after_it(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks that were handed on before are handed on once, as `captured_in` asserts."""
    model = MODELS[kind]()
    rows = [make_batch([length], seed=length) for length in LENGTHS[:3]]
    expected = torch.cat([reference(model, row)[0] for row in rows])
    before = _fingerprint(model)
    with tight(7) as attempts:
        with GradientCapture(model) as capture:
            found = [captured_in(capture, row)[0] for row in rows[:2]]
        found.append(captured(model, rows[2])[0])  # remembered with the model
    assert attempts == [False, True, True, True]
    assert relative_errors(torch.cat(found), expected).max() <= 1e-5
    assert sum("checkpointing" in line for line in caplog.messages) == 1
    assert _fingerprint(model) == before


def test_what_blocks_are_made_of_is_shown_once_over_both_attempts() -> None:
    """As Kronecker factors add it up; a matrix of two uses is shown both."""
    model, row = tied_adapters(), make_batch([11])

    def tapped() -> list[tuple[str, float]]:
        seen: list[tuple[str, float]] = []

        def tap(slot: ParameterSlot, x: Tensor, gradient: Tensor) -> None:
            seen.append((slot.name, float(x.square().sum() * gradient.square().sum())))

        with GradientCapture(model) as capture:
            capture.capture(row, lambda slot, block: None, tap)
        return sorted(seen)

    expected = tapped()
    with tight(9):
        found = tapped()
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [size for _, size in found] == pytest.approx([size for _, size in expected], rel=1e-4)


def test_a_row_that_does_not_fit_is_an_error_where_layers_cannot_be_checkpointed() -> None:
    torch.manual_seed(0)
    model = Mixer()
    with tight(1), pytest.raises(torch.OutOfMemoryError):
        captured(model, make_batch([9]))


def test_a_receiver_that_runs_out_of_memory_is_not_asked_again() -> None:
    """It may have taken a part of the block."""
    model, seen = llama(), list[str]()

    def sink(slot: ParameterSlot, block: Tensor) -> None:
        seen.append(slot.name)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with GradientCapture(model) as capture, pytest.raises(torch.OutOfMemoryError):
        capture.capture(make_batch([9]), sink)
    assert len(seen) == 1


def test_batches_of_several_rows_are_left_to_whoever_cuts_them() -> None:
    model = llama()
    with tight(7) as attempts, pytest.raises(torch.OutOfMemoryError):
        captured(model, make_batch([9, 12]))
    assert attempts == [False]


def test_layers_that_checkpoint_in_eval_mode_too_keep_their_gradients() -> None:
    model = llama()
    batch = make_batch(LENGTHS[:3])
    expected, _ = reference(model, batch)
    for layer in model.base_model.model.model.layers:
        forward = layer.forward

        def checkpointed(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, **kwargs)

        layer.forward = checkpointed
    found, _ = captured(model, batch)
    assert relative_errors(found, expected).max() <= 1e-5


def _cosines(found: Tensor, expected: Tensor) -> Tensor:
    return F.cosine_similarity(found.double(), expected.double(), dim=1)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_the_direction(autocast: bool) -> None:
    model = llama(config={"initializer_range": 0.1})
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data *= 0.2
    model = model.to(torch.bfloat16)  # the same weights everywhere, in whichever dtype
    exact, _ = reference(model.float(), make_batch(LENGTHS))
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        alone, _ = reference(model, make_batch(LENGTHS))
        found, losses = captured(model, make_batch(LENGTHS))
    assert losses.dtype == torch.float32
    assert _cosines(found, exact).min() > 0.999
    # Rounding of the model itself apart, nothing is lost: as near to the truth as autograd is.
    assert relative_errors(found, exact).mean() <= 1.2 * relative_errors(alone, exact).mean()


def test_full_fine_tuning_works_without_any_lora() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": True}))
    batch = make_batch([9, 12])
    expected, _ = reference(model, batch)
    found, _ = captured(model, batch)
    assert relative_errors(found, expected).max() <= 1e-5


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_fallback_is_the_same_vectorised_or_row_by_row(
    attention: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = llama(modules_to_save=["lm_head"], config={"attn_implementation": attention})
    batch = make_batch([9, 12, 7])
    expected, _ = reference(model, batch)
    with caplog.at_level(logging.INFO, "gradstore"), GradientCapture(model) as capture:
        found, _ = captured_in(capture, batch)
        again, _ = captured_in(capture, batch)
        vectorised = capture._rowwise._vmap_works
    assert vectorised == (attention == "eager")
    assert relative_errors(found, expected).max() <= 1e-5
    assert torch.equal(found, again)
    notes = [r for r in caplog.records if "not plain LoRA" in r.message]
    assert len(notes) == 1


@pytest.mark.parametrize("room", [0, 1, 2, 4])
def test_memory_that_runs_out_in_vmap_takes_fewer_rows_at_once_from_then_on(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch itself had room, so nobody has to cut it."""
    model = llama(modules_to_save=["lm_head"], config={"attn_implementation": "eager"})
    batch = make_batch(LENGTHS[:5])
    expected, losses = reference(model, batch)
    tried: list[int] = []

    def small(function: Any, **options: Any) -> Any:
        def call(values: Any, inputs: Any, shares: Tensor) -> Any:
            tried.append(len(shares))
            if len(shares) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return torch.func.vmap(function, **options)(values, inputs, shares)

        return call

    monkeypatch.setattr("gradstore.capture.fallback.vmap", small)
    with GradientCapture(model) as capture:
        if room == 0:
            with pytest.raises(torch.OutOfMemoryError):
                capture.capture(batch, lambda slot, block: None)
            return
        for _ in range(2):
            found, ours = captured_in(capture, batch)
            assert relative_errors(found, expected).max() <= 1e-5
            torch.testing.assert_close(ours, losses, rtol=1e-5, atol=1e-6)
        assert capture._rowwise._vmap_works
    parts = {1: [1] * 5, 2: [2, 2, 1], 4: [2, 2, 1]}[room]
    assert tried == [5, *([2] if room == 1 else []), *parts, *parts]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_token_predicted_from_padding_on_the_left_counts_in_no_fallback(attention: str) -> None:
    model = llama(modules_to_save=["lm_head"], config={"attn_implementation": attention})
    right = make_batch([9, 14, 5], prompts=[0, 0, 0])
    expected, losses = reference(model, right)
    lengths = right["attention_mask"].sum(1).tolist()
    left = {
        key: torch.stack([row.roll(-length) for row, length in zip(value, lengths, strict=True)])
        for key, value in right.items()
    }
    found, found_losses = captured(model, left)
    assert relative_errors(found, expected).max() <= 1e-5
    torch.testing.assert_close(found_losses, losses, rtol=1e-5, atol=1e-6)


class Mixer(nn.Module):
    """A causal model whose adapter sees all tokens of all rows in one list, in reverse order."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 8, bias=True)})
        self.unused = nn.ModuleDict({"lora_A": nn.ModuleDict({"default": nn.Linear(8, 4)})})
        self.head = nn.Linear(8, VOCABULARY)
        for part in (self.embedding, self.head):
            part.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(input_ids)
        flat = hidden.reshape(-1, 8).flip(0)
        change = self.lora_B["default"](self.lora_A["default"](flat))
        return self.head(hidden + change.flip(0).reshape(hidden.shape))


def test_matrices_called_on_tokens_of_mixed_rows_fall_back_and_stay_right() -> None:
    torch.manual_seed(0)
    model = Mixer()
    batch = make_batch([9, 12, 7])
    expected = []
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for row in range(3):
        one = {key: value[row : row + 1] for key, value in batch.items()}
        logits = model(one["input_ids"])[0, :-1]
        loss = F.cross_entropy(logits, one["labels"][0, 1:], ignore_index=-100)
        parameters = [p for p in model.parameters() if p.requires_grad]
        flat = torch.autograd.grad(loss, parameters, allow_unused=True)
        pieces = zip(flat, parameters, strict=True)
        expected.append(torch.cat([(p * 0 if g is None else g).reshape(-1) for g, p in pieces]))
    with GradientCapture(model) as capture:
        assert [slot.name for slot in capture.slots] == names
        for _ in range(2):
            found, _ = captured_in(capture, batch)
            assert relative_errors(found, torch.stack(expected).detach()).max() <= 1e-5


def test_slots_are_in_parameter_order_with_prefixes_stripped_and_ties_once() -> None:
    model = tied_adapters()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    wrapped = torch.compile(model, backend="eager")
    for candidate in (model, wrapped, nn.DataParallel(model)):
        capture = GradientCapture(candidate)
        assert [slot.name for slot in capture.slots] == names
        starts = [slot.start for slot in capture.slots]
        assert starts == sorted(starts)
        assert capture.p == sum(p.numel() for p in model.parameters() if p.requires_grad)
    found, _ = captured(wrapped, make_batch([9, 12]))
    plain, _ = captured(model, make_batch([9, 12]))
    assert torch.equal(found, plain)


def test_the_output_layer_runs_on_target_positions_only() -> None:
    model = llama()
    batch = make_batch([9, 12])
    rows_seen = []
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: rows_seen.append(output.shape[:-1].numel())
    )
    captured(model, batch)
    handle.remove()
    assert rows_seen == [int((batch["labels"][:, 1:] != -100).sum())]


class Reranked(nn.Module):
    """Its logits at a position depend on all positions, so they cannot be computed apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, **inputs: Tensor) -> Tensor:
        logits = self.inner(**inputs).logits
        return logits - logits.mean(dim=1, keepdim=True).detach()


def test_a_model_whose_positions_depend_on_each_other_computes_all_logits() -> None:
    model = Reranked()
    batch = make_batch([16, 16])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    model.eval()
    logits = model(**inputs)[:, :-1]
    losses = F.cross_entropy(
        logits.transpose(1, 2), batch["labels"][:, 1:], ignore_index=-100, reduction="none"
    ).sum(1) / (batch["labels"][:, 1:] != -100).sum(1)
    for _ in range(2):
        torch.testing.assert_close(batch_losses(model, batch).loss, losses.detach())
    assert RowLoss._verified[model] is False


@pytest.mark.parametrize("kind", ["own", "all positions", "scaled"])
def test_logits_are_overwritten_only_where_nothing_else_reads_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output layer's own, or a copy of those at the targets; gradients have the same bits."""
    compute, asked = losses.weighted_cross_entropy, list[bool]()
    model = Reranked() if kind == "all positions" else llama()
    if kind == "scaled":  # by what may keep its output for its backward
        model.register_forward_hook(lambda _module, _args, output: 0.5 * output.logits)
    batch = make_batch([9, 16, 12])

    def taken(overwrites: bool) -> list[Tensor]:
        def watched(*given: Tensor, **options: bool) -> tuple[Tensor, Tensor]:
            asked.append(options["overwrites"])
            return compute(*given, overwrites=overwrites and options["overwrites"])

        monkeypatch.setattr(losses, "weighted_cross_entropy", watched)
        blocks: dict[ParameterSlot, Tensor] = {}
        with GradientCapture(model) as capture:
            capture.capture(batch, blocks.__setitem__)
            return [blocks[slot] for slot in capture.slots]

    for apart, within in zip(taken(False), taken(True), strict=True):
        assert torch.equal(apart, within)
    assert set(asked) == {kind != "scaled"}


def test_two_adapters_are_refused_by_name() -> None:
    model = llama()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    GradientCapture(model)  # one is active, the other asleep
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(BadInput, match="default, second"):
        GradientCapture(model)


def test_a_merged_or_disabled_adapter_is_refused() -> None:
    model = llama()
    model.merge_adapter()
    with pytest.raises(BadInput, match="merged"):
        GradientCapture(model)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(BadInput):
        GradientCapture(model)


def test_a_frozen_model_and_a_batch_without_labels_are_refused() -> None:
    model = llama()
    batch = make_batch([9, 12])
    with GradientCapture(model) as capture:
        with pytest.raises(BadInput, match="labels"):
            capture.capture({"input_ids": batch["input_ids"]}, lambda slot, block: None)
        with pytest.raises(RuntimeError):
            capture.__enter__()
        with pytest.raises(BadInput, match="no parameter"):
            GradientCapture(model)
    with pytest.raises(RuntimeError, match="context"):
        capture.capture(batch, lambda slot, block: None)
