"""Weights of checkpoints without an adapter, put into a model that is loaded already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dataflex.checkpoints.weights import load_weights
from gradstore.errors import BadInput

SIZES: dict[str, Any] = {
    "vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))  # type: ignore[no-untyped-call]


def mixtral() -> Any:
    """Its experts are one tensor in memory and many in a file."""
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (llama, {}),
        (lambda: llama(tie_word_embeddings=True), {}),
        (mixtral, {}),
        (llama, {"max_shard_size": "10KB"}),
    ],
)
def test_a_checkpoint_comes_back_to_the_bit(make: Any, options: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, other = make(), make()
    trained.save_pretrained(tmp_path, **options)
    assert len(list(tmp_path.glob("model*.safetensors"))) > (1 if options else 0)
    states = [id(p) for p in other.parameters()]
    for number, parameter in enumerate(other.parameters()):
        parameter.requires_grad = number % 2 == 0
    load_weights(other, tmp_path)
    for (name, found), expected in zip(other.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert [id(p) for p in other.parameters()] == states  # an optimizer's still are
    assert [p.requires_grad for p in other.parameters()][:2] == [True, False]


def test_a_model_in_half_precision_takes_rounded_weights(tmp_path: Path) -> None:
    trained = llama()
    trained.save_pretrained(tmp_path)
    other = llama().to(torch.bfloat16)
    load_weights(other, tmp_path)
    weight = other.model.layers[0].mlp.up_proj.weight
    expected = trained.model.layers[0].mlp.up_proj.weight.to(torch.bfloat16)
    assert torch.equal(weight, expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "why"),
    [({"vocab_size": 48}, "mismatched"), ({"num_hidden_layers": 3}, "missing model.layers.2"),
     ({"num_hidden_layers": 1}, "unexpected model.layers.1")],
)  # fmt: skip
def test_weights_of_another_model_are_refused_and_change_nothing(
    changes: dict[str, int], why: str, tmp_path: Path
) -> None:
    llama().save_pretrained(tmp_path)
    other = llama(**changes)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(BadInput, match=rf"(?s)does not fit the model: {why}.*model_name_or_path"):
        load_weights(other, tmp_path)
    assert all(
        torch.equal(found, kept) for found, kept in zip(other.parameters(), before, strict=True)
    )
