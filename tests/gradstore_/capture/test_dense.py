"""Gradients of whole weights against plain autograd of one row at a time, on tiny random models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gradstore.capture import per_sample
from gradstore.capture.chosen import Modules, taken_slots
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput

VOCABULARY = 41
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaken(model: Any) -> Any:
    """Moves every vector, of norms and biases, off its start at one or zero."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    return shaken(LlamaForCausalLM(LlamaConfig(**{**SIZES, **config})))  # type: ignore[no-untyped-call]


def qwen2() -> Any:
    """Biases on queries, keys and values; the output layer is the embedding."""
    torch.manual_seed(0)
    return shaken(Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)))


def qwen3() -> Any:
    """Norms of the heads of queries and keys: (b, t, heads, n)."""
    torch.manual_seed(0)
    return shaken(Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)))


def gpt2() -> Any:
    """Linear layers with transposed weights, norms with biases, positions that rows share."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    return shaken(GPT2LMHeadModel(config))


def gemma2() -> Any:
    """An embedding that is scaled inside its own forward, soft-capped logits."""
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, head_dim=4, final_logit_softcapping=0.5,
                          attn_implementation="eager")  # fmt: skip
    return shaken(Gemma2ForCausalLM(config))


def gemma3() -> Any:
    """Norms of the heads that see the tokens behind them: (b, heads, t, n)."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(**SIZES, head_dim=4, attn_implementation="eager")
    return shaken(Gemma3ForCausalLM(config))


def mixtral() -> Any:
    """Routed experts, several in one tensor."""
    torch.manual_seed(0)
    config = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    return shaken(MixtralForCausalLM(config))


def called_twice() -> Any:
    """Both layers of the model are the same module."""
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    return model


def one_layer() -> Any:
    """As finetuning_type freeze leaves it: the last layer alone is trained."""
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".layers.1." in name
    return model


class Borrowing(nn.Module):
    """An output layer that multiplies with another layer's weight by itself."""

    def __init__(self, lender: nn.Module, times: float) -> None:
        super().__init__()
        self._lender, self._times = [lender], times

    def forward(self, hidden: Tensor) -> Tensor:
        """Give logits from the lender's weight, transposed where that fits."""
        weight = self._lender[0].weight
        return self._times * (
            hidden @ (weight.T if weight.shape[1] == hidden.shape[-1] else weight)
        )


def embedding_as_output() -> Any:
    """Logits are products with the embedding, not a call of a layer."""
    model = llama()
    model.lm_head = Borrowing(model.model.embed_tokens, times=1.0)
    return model


def projection_as_output() -> Any:
    """A linear layer's weight gives the logits, beside the layer's own calls."""
    model = llama(intermediate_size=VOCABULARY)
    model.lm_head = Borrowing(model.model.layers[0].mlp.up_proj, times=0.5)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "qwen2_tied": qwen2,
    "qwen3_head_norms": qwen3,
    "gpt2": gpt2,
    "gemma2": gemma2,
    "gemma3_head_norms": gemma3,
    "mixtral": mixtral,
    "called_twice": called_twice,
    "one_layer": one_layer,
    "embedding_as_output": embedding_as_output,
    "projection_as_output": projection_as_output,
}
LENGTHS = [11, 18, 7]


def make_batch(lengths: list[int], *, seed: int = 5, multiple: int = 8) -> Batch:
    """Right-padded rows; the first third of a row carries no label, and rows repeat tokens."""
    generator = torch.Generator().manual_seed(seed)
    width = -(-max(lengths) // multiple) * multiple
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full((len(lengths), width), -100)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        tokens = torch.randint(3, 12, (length,), generator=generator)
        input_ids[row, :length], mask[row, :length] = tokens, 1
        labels[row, length // 3 : length] = tokens[length // 3 :]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def reference(model: nn.Module, batch: Mapping[str, Tensor], names: set[str]) -> Tensor:
    """Plain autograd, one unpadded row at a time: (b, p) float32 of the named parameters."""
    parameters = [p for n, p in model.named_parameters() if n in names]
    model.eval()
    found = []
    for row in range(len(batch["input_ids"])):
        length = int(batch["attention_mask"][row].sum())
        ids, labels = batch["input_ids"][row : row + 1, :length], batch["labels"][row, 1:length]
        if not (labels != -100).any():
            found.append(torch.zeros(sum(p.numel() for p in parameters)))
            continue
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        loss = F.cross_entropy(logits, labels, ignore_index=-100)
        pieces = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(torch.cat([
            torch.zeros(p.numel()) if g is None else g.reshape(-1)
            for g, p in zip(pieces, parameters, strict=True)
        ]))  # fmt: skip
    model.train()
    return torch.stack(found)


def captured(
    model: nn.Module, batch: Batch, modules: Modules = "all", elements: int | None = None
) -> tuple[Tensor, GradientCapture, list[int]]:
    """All parts of one batch as (b, p), each place exactly once, and their lengths."""
    with GradientCapture(model, modules, elements=elements) as capture:
        out = torch.full((len(batch["labels"]), capture.p), torch.nan)
        sizes: list[int] = []

        def sink(slot: ParameterSlot, block: Tensor) -> None:
            span = out[:, slot.start : slot.start + slot.numel]
            assert block.shape == span.shape
            assert block.dtype == torch.float32
            assert bool(span.isnan().all())
            span.copy_(block)
            sizes.append(slot.numel)

        capture.capture(batch, sink)
    assert not bool(out.isnan().any())
    return out, capture, sizes


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Per row ||found - expected|| / ||expected||."""
    difference = (found.double() - expected.double()).norm(dim=1)
    return difference / expected.double().norm(dim=1).clamp(min=1e-30)


@pytest.mark.parametrize("modules", ["all", "linear"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_gives_each_row_the_gradient_it_has_alone(kind: str, modules: Modules) -> None:
    model, batch = MODELS[kind](), make_batch(LENGTHS)
    found, capture, _ = captured(model, batch, modules, elements=700)
    assert capture.dense
    expected = reference(model, batch, {slot.name for slot in capture.slots})
    assert expected.norm(dim=1).min() > 0
    assert errors(found, expected).max() <= 1e-5
    for slot in capture.slots:  # no kind of module drowns in the others
        span = slice(slot.start, slot.start + slot.numel)
        floor = 1e-6 * float(expected.norm(dim=1).min())
        difference = (found[:, span] - expected[:, span]).norm(dim=1)
        assert bool((difference <= 1e-4 * expected[:, span].norm(dim=1) + floor).all()), slot.name


def test_norms_of_heads_are_taken_in_the_backward_wherever_the_tokens_lie() -> None:
    for model in (qwen3(), gemma3()):
        with GradientCapture(model, "all") as capture:
            capture.capture(make_batch(LENGTHS), lambda *_: None)
            norms = {slot for slot in capture.slots if "_norm" in slot.name}
            assert norms
            assert norms <= capture.hooked


def test_linear_leaves_out_embeddings_the_output_layer_and_norms_by_name() -> None:
    untied, tied, freeze = llama(), llama(tie_word_embeddings=True), one_layer()
    norms = {n for n, _ in untied.named_parameters() if "norm" in n}
    outer = {"model.embed_tokens.weight", "lm_head.weight"}
    with GradientCapture(untied, "linear") as capture:
        assert set(capture.left_out) == norms | outer
        assert len(capture.slots) == 2 * 7
    with GradientCapture(tied, "linear") as capture:
        assert set(capture.left_out) == norms | {"model.embed_tokens.weight"}
    with GradientCapture(freeze, "linear") as capture:
        assert {slot.name.split(".")[2] for slot in capture.slots} == {"1"}
        assert set(capture.left_out) == {n for n in norms if ".layers.1." in n}
    with GradientCapture(untied, "all") as capture:
        assert capture.left_out == ()
        assert capture.p == sum(p.numel() for p in untied.parameters())


@pytest.mark.parametrize(
    ("patterns", "taken"),
    [
        (["q_proj"], {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (["layers.1.mlp"], {f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")}),
        (("norm", "lm_head"), {"model.norm", "lm_head"}),
        (["layers.*.*norm"], {f"model.layers.{i}.{name}_layernorm" for i in (0, 1)
                              for name in ("input", "post_attention")}),
    ],
)  # fmt: skip
def test_modules_that_are_named_are_taken_with_what_lies_in_them(
    patterns: Any, taken: set[str]
) -> None:
    model = llama()
    with GradientCapture(model, patterns) as capture:
        assert {slot.name.rsplit(".", 1)[0] for slot in capture.slots} == taken
        assert len(capture.slots) + len(capture.left_out) == len(list(model.parameters()))
        starts = [slot.start for slot in capture.slots]
        assert starts[0] == 0
        assert starts == sorted(starts)


def test_a_weight_that_two_modules_share_is_taken_by_either_name() -> None:
    tied = llama(tie_word_embeddings=True)
    for name in ("lm_head", "embed_tokens"):
        with GradientCapture(tied, [name]) as capture:
            assert [slot.name for slot in capture.slots] == ["model.embed_tokens.weight"]


@pytest.mark.parametrize("patterns", [["q_proj", "qproj"], ["proj"], ["layers.7"], []])
def test_a_pattern_that_names_nothing_is_refused_with_names_that_there_are(patterns: Any) -> None:
    with pytest.raises(BadInput, match=r"names no module .* model\.embed_tokens, model\.layers\.0"):
        GradientCapture(llama(), patterns)


def test_names_of_modules_are_refused_beside_an_adapter(llama: Any) -> None:
    with pytest.raises(BadInput, match=r"names modules \(q_proj\), but the model has an adapter"):
        taken_slots(llama.model(), ["q_proj"])


def test_gradients_of_named_modules_are_those_of_the_whole_model() -> None:
    model, batch = llama(), make_batch([9, 5])
    found, capture, _ = captured(model, batch, ["v_proj", "*norm"], 500)  # type: ignore[arg-type]
    expected = reference(model, batch, {slot.name for slot in capture.slots})
    assert len(capture.slots) == 2 + 5
    assert errors(found, expected).max() <= 1e-5


def test_linear_of_a_model_that_trains_no_linear_layer_is_refused() -> None:
    model = llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "norm" in name
    with pytest.raises(BadInput, match="gradient_modules: linear takes none"):
        GradientCapture(model, "linear")
    assert len(GradientCapture(model).slots) == 5


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_any_rows_labels_and_parts_give_the_reference(data: st.DataObject) -> None:
    model = _shared()
    lengths = data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=5))
    elements = data.draw(st.integers(1, 3000))
    batch = make_batch(lengths, seed=data.draw(st.integers(0, 99)), multiple=1)
    for row, length in enumerate(lengths):
        shown = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
        batch["labels"][row, :length] = torch.where(
            torch.tensor(shown), batch["input_ids"][row, :length], -100
        )
    found, capture, _ = captured(model, batch, "all", elements)
    expected = reference(model, batch, {slot.name for slot in capture.slots})
    difference = (found - expected).norm(dim=1)
    assert bool((difference <= 1e-5 * expected.norm(dim=1) + 1e-7).all())


_SHARED: list[Any] = []


def _shared() -> Any:
    if not _SHARED:
        _SHARED.append(llama(tie_word_embeddings=True, num_hidden_layers=1))
    return _SHARED[0]


def test_parts_are_no_larger_than_asked_and_change_nothing() -> None:
    model, batch = llama(tie_word_embeddings=True), make_batch(LENGTHS)
    whole, _, one_each = captured(model, batch)
    cut, capture, sizes = captured(model, batch, elements=3 * 100)
    assert len(one_each) == len(capture.slots) < len(sizes)
    assert max(sizes) <= 100
    assert errors(cut, whole).max() <= 1e-6
    _, _, rows = captured(model, batch, elements=1)  # one row of a weight is the least
    assert max(rows) == max(slot.width for slot in capture.slots)


@pytest.mark.parametrize("modules", ["all", "linear"])
def test_a_row_does_not_depend_on_the_others_of_its_batch(modules: Modules) -> None:
    model, batch = llama(tie_word_embeddings=True), make_batch(LENGTHS)
    together, _, _ = captured(model, batch, modules, elements=500)
    for row in range(len(LENGTHS)):
        alone, _, _ = captured(model, {k: v[row : row + 1] for k, v in batch.items()}, modules)
        assert errors(together[row : row + 1], alone).max() <= 1e-5


@pytest.mark.parametrize("tied", [False, True])
def test_a_padding_token_inside_a_row_has_no_gradient_as_input(tied: bool) -> None:
    """Torch gives an embedding's `padding_idx` none; as a choice of the output layer it has one."""
    model, batch = llama(tie_word_embeddings=tied), make_batch(LENGTHS)
    batch["input_ids"][:, 2] = 0
    found, capture, _ = captured(model, batch)
    expected = reference(model, batch, {slot.name for slot in capture.slots})
    assert errors(found, expected).max() <= 1e-5
    (slot,) = [slot for slot in capture.slots if "embed_tokens" in slot.name]
    assert bool((found[:, slot.start : slot.start + slot.width] == 0).all()) is not tied


def test_a_row_without_targets_gets_zeros() -> None:
    model, batch = llama(tie_word_embeddings=True), make_batch(LENGTHS)
    clean, _, _ = captured(model, batch)
    batch["labels"][1] = -100
    found, _, _ = captured(model, batch)
    assert bool((found[1] == 0).all())
    assert errors(found[::2], clean[::2]).max() <= 1e-6
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    assert bool((captured(model, nothing, elements=500)[0] == 0).all())


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_that_is_not_finite_leaves_the_others_alone(masked: bool) -> None:
    model, batch, poison = llama(), make_batch(LENGTHS), VOCABULARY - 1
    clean, _, _ = captured(model, batch)
    batch["input_ids"][1, 2] = poison
    if masked:
        batch["labels"][1] = -100
    model.get_input_embeddings().weight.data[poison] = torch.inf
    with GradientCapture(model, "all") as capture:
        found = torch.zeros(3, capture.p)

        def sink(slot: ParameterSlot, block: Tensor) -> None:
            found[:, slot.start : slot.start + slot.numel] = block

        stats = capture.capture(batch, sink)
    assert torch.equal(found[::2], clean[::2])
    assert bool(torch.isnan(stats.loss[1]))
    assert bool((found[1] == 0).all()) is masked
    assert bool(torch.isfinite(found[1]).all()) is masked


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_half_precision_gives_the_same_directions(weights: torch.dtype) -> None:
    """float32 weights are passed under autocast, as bf16: true trains them."""
    model, batch = llama(tie_word_embeddings=True), make_batch(LENGTHS)
    full, _, _ = captured(model, batch)
    model.to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        half, capture, _ = captured(model, batch, elements=500)
    assert F.cosine_similarity(half, full).min() > 0.999
    for slot in capture.slots:
        span = slice(slot.start, slot.start + slot.numel)
        assert F.cosine_similarity(half[:, span], full[:, span]).min() > 0.99, slot.name


def test_the_model_is_given_back_as_it_was() -> None:
    model = one_layer()
    before = {n: (p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()}
    captured(model, make_batch(LENGTHS))
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []


def test_what_no_hook_covers_is_named_once_and_taken_in_bounded_passes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = mixtral(), make_batch(LENGTHS)
    with caplog.at_level(logging.INFO):
        whole, capture, _ = captured(model, batch, "linear")
    (note,) = [r.getMessage() for r in caplog.records if "further pass" in r.getMessage()][:1]
    assert "experts" in note
    experts = max(slot.numel for slot in capture.slots)
    monkeypatch.setattr(per_sample, "FALLBACK_ELEMENTS", len(LENGTHS) * experts)
    with GradientCapture(model, "linear") as again:
        assert again.further_elements(len(LENGTHS)) <= len(LENGTHS) * experts
    cut, _, _ = captured(model, batch, "linear")
    assert errors(cut, whole).max() <= 1e-6
