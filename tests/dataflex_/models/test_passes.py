"""A row's loss and gradient are its own, whatever its neighbours and its padding are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from dataflex.data.rows import Rows
from dataflex.models.passes import longest_row, own_labels, row_losses
from gradstore.capture.limits import max_positions
from gradstore.capture.per_sample import GradientCapture
from gradstore.errors import BadInput

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"

#: What LlamaFactory's workflows give their collators, for stage sft.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding is a label": {"label_pad_token_id": 0},
    "padding is a label, to multiples of 8": {"label_pad_token_id": 0, "pad_to_multiple_of": 8},
    "4D masks": {"block_diag_attn": True, "neat_packing": True, "label_pad_token_id": 0},
    "padding on the left": {"padding_side": "left", "label_pad_token_id": 0},
}

Collate = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(TINY / "model"))


@pytest.fixture(scope="module")
def dense() -> Any:
    from transformers import AutoModelForCausalLM

    return adapted(AutoModelForCausalLM.from_pretrained(str(TINY / "model"), dtype=torch.float32))


@pytest.fixture(scope="module")
def experts(tokenizer: Any) -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return adapted(MixtralForCausalLM(sizes))


def adapted(model: Any) -> Any:
    """The model with a LoRA adapter whose second matrix isn't zero."""
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, lora)


def sft_collate(tokenizer: Any, model: Any, **options: Any) -> Collate:
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments

    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="default"))
    tokenizer.padding_side = options.pop("padding_side", "right")
    collate: Collate = SFTDataCollatorWith4DAttentionMask(
        template=template, model=model, tokenizer=tokenizer, **options
    )
    return collate


def gradients(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Losses (b,) and flat gradients (b, p)."""
    blocks: dict[Any, Tensor] = {}
    with GradientCapture(model) as capture:
        stats = capture.capture(batch, lambda slot, block: blocks.update({slot: block.clone()}))
        return stats.loss, torch.cat([blocks[slot] for slot in capture.slots], dim=1)


def check_alone(model: Any, collate: Collate, rows: list[dict[str, Any]]) -> None:
    """Every row of a batch has the loss and gradient that it has alone."""
    together = gradients(model, collate([dict(row) for row in rows]))
    for i, row in enumerate(rows):
        for found, alone in zip(together, gradients(model, collate([dict(row)])), strict=True):
            scale = alone.norm().clamp_min(1e-3)
            assert ((found[i] - alone[0]).norm() / scale).item() < 1e-5


def sft_row(length: int, prompt: int, seed: int) -> dict[str, Any]:
    ids = np.random.default_rng(seed).integers(3, 60, length).tolist()
    return {"input_ids": ids, "attention_mask": [1] * length,
            "labels": [-100] * prompt + ids[prompt:]}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["dense", "experts"])
@settings(max_examples=5, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 40), st.integers(0, 3)), min_size=2, max_size=5))
def test_a_rows_gradient_is_that_of_the_row_alone_whatever_pads_it(
    request: pytest.FixtureRequest, kind: str, option: str, shapes: list[tuple[int, int]]
) -> None:
    model, tokenizer = request.getfixturevalue(kind), request.getfixturevalue("tokenizer")
    collate = own_labels(sft_collate(tokenizer, model, **OPTIONS[option]))
    check_alone(model, collate, [sft_row(t, p, i) for i, (t, p) in enumerate(shapes)])


def test_without_it_padding_would_count(tokenizer: Any, dense: Any) -> None:
    """What the collator itself gives: training keeps it, features don't."""
    collate = sft_collate(tokenizer, dense, label_pad_token_id=0)
    rows = [sft_row(30, 2, 0), sft_row(6, 2, 1)]
    with pytest.raises(AssertionError):
        check_alone(dense, collate, rows)
    own_labels(collate)
    assert collate([dict(row) for row in rows])["labels"][1, -1] == 0


@pytest.mark.parametrize("pad", ["of its own", "eos"])
def test_a_row_of_stage_pt_is_the_row_alone_too(pad: str, tokenizer: Any, dense: Any) -> None:
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    own = AutoTokenizer.from_pretrained(str(TINY / "model"))
    own.pad_token = own.eos_token if pad == "eos" else own.convert_ids_to_tokens(7)
    collate = own_labels(DataCollatorForLanguageModeling(tokenizer=own, mlm=False))
    rows = [[5, 9, 11, own.eos_token_id], [5, 8, *range(20, 40), own.eos_token_id], [4, 6]]
    check_alone(dense, collate, [{"input_ids": r, "attention_mask": [1] * len(r)} for r in rows])


@pytest.mark.parametrize(
    "changes",
    [{}, {"train_on_prompt": True}, {"mask_history": True}, {"template": "mistral"},
     {"template": "llama2"}, {"template": "alpaca", "train_on_prompt": True}],
    ids=str,
)  # fmt: skip
def test_a_conversation_becomes_the_same_tokens_beside_any_other(
    changes: dict[str, Any], tokenizer: Any, dense: Any
) -> None:
    """Templates, those that end a turn by the next one's first token (efficient_eos) included."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.data.processor import SupervisedDatasetProcessor
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(str(TINY / "model"))
    arguments = DataArguments(**{"template": "default", "cutoff_len": 64, **changes})
    template = get_template_and_fix_tokenizer(own, arguments)
    processor = SupervisedDatasetProcessor(
        template=template, tokenizer=own, processor=None, data_args=arguments
    )
    said = [["sort: 3 1 2", "1 2 3"], ["copy: a", "a", "copy: b b", "b b"], ["add: 1 1", "2"]]
    turns = [[{"role": ("user", "assistant")[i % 2], "content": text}
              for i, text in enumerate(texts)] for texts in said]  # fmt: skip
    nothing: list[Any] = [None] * len(said)
    examples = {"_prompt": [t[:-1] for t in turns], "_response": [t[-1:] for t in turns]}
    examples |= {f"_{k}": nothing for k in ("system", "tools", "images", "videos", "audios")}
    together = processor.preprocess_dataset(examples)
    for i in range(len(said)):
        alone = processor.preprocess_dataset({k: [v[i]] for k, v in examples.items()})
        assert {k: v[0] for k, v in alone.items()} == {k: v[i] for k, v in together.items()}
    rows = [{k: together[k][i] for k in ("input_ids", "attention_mask", "labels")}
            for i in range(len(said))]  # fmt: skip
    check_alone(dense, own_labels(sft_collate(own, dense, label_pad_token_id=0)), rows)


def longrope(original: int) -> Any:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": original}
    return SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64, rope_parameters=rope))


def rows_of(*lengths: int) -> Rows:
    from datasets import Dataset

    ids = [[1] * length for length in lengths]
    return Rows("train", Dataset.from_dict({"input_ids": ids, "labels": ids}))


def test_positions_that_depend_on_the_longest_row_of_a_batch_are_refused() -> None:
    assert longest_row(longrope(16), rows_of(8, 16)) == 64
    assert longest_row(longrope(16), rows_of(17, 40)) == 64
    for refuse in (longest_row, lambda model, rows: row_losses(run_of(model), rows=rows)):
        with pytest.raises(BadInput, match=r"1 of the 2 rows of 'train' have more than 16.*cutoff"):
            refuse(longrope(16), rows_of(8, 17))


def run_of(model: Any) -> Any:
    return SimpleNamespace(model=model, data=SimpleNamespace(train=None))


def test_the_limit_of_positions_is_the_language_models() -> None:
    """A vision-language model keeps it in an inner configuration."""
    text = SimpleNamespace(max_position_embeddings=32)
    outer = SimpleNamespace(get_text_config=lambda: text)
    assert max_positions(SimpleNamespace(config=outer)) == 32
    assert longest_row(SimpleNamespace(config=outer), rows_of(40)) == 32
    assert max_positions(SimpleNamespace(config=SimpleNamespace())) is None
