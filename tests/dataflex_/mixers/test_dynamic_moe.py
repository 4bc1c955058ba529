"""dynamic_moe: E24, and what counts as a router of real architectures (ALGORITHMS 2.5)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dataflex.config.presets import resolve
from dataflex.data.mixture import exponentiated
from dataflex.mixers.dynamic_moe import load_distances
from dataflex.models.experts import (
    counted_choices,
    expert_layers,
    freeze_routers,
    load_experts,
    loads,
    routers,
)
from gradstore.errors import BadInput

SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "max_position_embeddings": 16, "pad_token_id": 0,
}  # fmt: skip
#: Architecture -> its settings, and how many layers route.
MOE: dict[str, tuple[dict[str, Any], int]] = {
    "Mixtral": ({"num_local_experts": 4}, 2),
    "Qwen2Moe": ({"num_experts": 4, "moe_intermediate_size": 8,
                  "shared_expert_intermediate_size": 4}, 2),
    "Qwen3Moe": ({"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 4}, 2),
    "Olmoe": ({"num_experts": 4}, 2),
    "DeepseekV3": ({"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 4,
                    "first_k_dense_replace": 1, "moe_intermediate_size": 8, "kv_lora_rank": 4,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}, 1),
}  # fmt: skip


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    settings = {**SMALL, **MOE.get(name, ({}, 0))[0]}
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def counts(model: Any, ids: list[list[int]], mask: list[list[int]]) -> Any:
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    with torch.no_grad(), counted_choices(model) as choices:
        model(**batch)
    return loads(choices, batch["attention_mask"], 4).numpy()


def test_e24_loads_to_proportions() -> None:
    one = [[0.5, 0.25, 0.125, 0.125], [0.4375, 0.3125, 0.125, 0.125], [0.0625, 0.125, 0.3125, 0.5]]
    distances = load_distances(np.array(one)[:, None] * 160)
    np.testing.assert_allclose(distances, [0.235702, 0.227105, 0.403882], atol=1e-5)
    proportions = exponentiated(np.full(3, 1 / 3), distances, 10.0, 0.05)
    np.testing.assert_allclose(proportions, [0.146932, 0.136201, 0.716868], atol=1e-5)


def test_a_layer_is_compared_with_itself_and_depth_changes_no_distance() -> None:
    one = np.random.default_rng(1).integers(1, 9, (3, 1, 4)).astype(float)
    deep = np.concatenate([one, 5 * one[:, :, ::-1]], axis=1)
    np.testing.assert_allclose(load_distances(deep), load_distances(one))
    assert load_distances(np.zeros((2, 1, 4))).tolist() == [0, 0], "a domain without a token"


@pytest.mark.parametrize("name", MOE)
def test_choices_are_counted_and_padding_is_not(name: str) -> None:
    model = tiny(name)
    row, short = [3, 4, 5, 6, 7], [8, 9, 10]
    together = counts(model, [row, [*short, 0, 0]], [[1] * 5, [1, 1, 1, 0, 0]])
    apart = counts(model, [row], [[1] * 5]) + counts(model, [short], [[1] * 3])
    np.testing.assert_array_equal(together, apart)
    assert together.shape == (MOE[name][1], 4)
    assert together.sum(axis=1).tolist() == [16.0] * MOE[name][1], "8 tokens, 2 experts each"
    assert not any(layer._forward_pre_hooks for layer in expert_layers(model))


def test_the_counts_are_the_routers_own() -> None:
    """Top 2 of the logits that the model gives out itself."""
    model = tiny("Mixtral")
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        logits = model(input_ids=ids, output_router_logits=True).router_logits
    expected = [torch.bincount(layer.topk(2).indices.flatten(), minlength=4) for layer in logits]
    np.testing.assert_array_equal(counts(model, ids.tolist(), [[1] * 6]), torch.stack(expected))


@pytest.mark.parametrize("name", MOE)
def test_freeze_gate_freezes_routers_and_nothing_else(name: str) -> None:
    model = tiny(name)
    freeze_routers(model)
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == len(routers(model)) == MOE[name][1]
    assert all(n.endswith("mlp.gate.weight") for n in frozen), frozen


@pytest.mark.parametrize("name", MOE)
def test_a_checkpoints_experts_come_back(name: str, tmp_path: Path) -> None:
    trained, fresh = tiny(name), tiny(name)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1.0
    trained.save_pretrained(tmp_path)
    load_experts(fresh, tmp_path)
    for one, other in zip(expert_layers(trained), expert_layers(fresh), strict=True):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    load_experts(tiny(name), tmp_path / "nothing")


def test_a_dense_model_has_no_router_though_its_mlp_has_a_gate_proj() -> None:
    model = tiny("Llama")
    assert routers(model) == expert_layers(model) == []
    with pytest.raises(BadInput, match="LlamaForCausalLM is no mixture of experts"):
        freeze_routers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"eta": 0}, "eta is 0"),
        ({"c": 2}, "c is 2"),
        ({"collect_steps": 0}, "collect_steps is 0"),
        ({"eval_samples": 0}, "eval_samples is 0"),
        ({"eval_batch": 3}, "did you mean 'eval_batch_size'"),
    ],
)
def test_bad_parameters_are_refused(params: dict[str, float], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        resolve("dynamic_mix", "dynamic_moe", params).build()
