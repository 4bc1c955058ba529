"""Rows of a script of one's own: every form that is taken, and what is told of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gradstore.errors import BadInput
from gradstore.export.token_rows import decoded, padded, read_rows, tokenizer_of
from gradstore.format.records import row_hash

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"
ROW = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY / "model")


def test_tokens_are_taken_as_they_are_and_learned_whole_without_labels() -> None:
    found = read_rows("set", [ROW, {"input_ids": torch.tensor([3, 4])}], None)
    assert found.input_ids == [[5, 6, 7, 8], [3, 4]]
    assert found.labels == [[-100, -100, 7, 8], [3, 4]]
    assert found.lengths.tolist() == [4, 2]
    assert found.row_set.hashes[0].tobytes() == row_hash(ROW["input_ids"], ROW["labels"])
    assert found.row_set.sources == (("set", 0), ("set", 1))


def test_a_batch_is_padded_to_the_right_and_padding_is_no_target() -> None:
    batch = padded(read_rows("set", [ROW, {"input_ids": [3, 4]}], None).items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [3, 4, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8], [3, 4, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_of_two_texts_the_answer_is_learned_with_its_end(tokenizer: Any) -> None:
    found = read_rows("set", [{"prompt": "Add 1 and 2.", "response": "3"}], tokenizer)
    prompt = tokenizer("Add 1 and 2.")["input_ids"]
    answer = [*tokenizer("3", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert found.input_ids == [prompt + answer]
    assert found.labels == [[-100] * len(prompt) + answer]
    assert found.texts == [("Add 1 and 2.", "3")]
    assert decoded(tokenizer, found.input_ids[0], found.labels[0]) == ("Add 1 and 2.", "3")


def test_a_chat_template_is_followed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    found = read_rows("set", [{"prompt": "hi", "response": "yes"}], tokenizer)
    ids, labels = found.input_ids[0], found.labels[0]
    assert tokenizer.decode(ids) == "[user]hi</s>[assistant]yes</s>"
    assert tokenizer.decode([token for token in labels if token != -100]) == "yes</s>"
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}")
    with pytest.raises(BadInput, match="writes a prompt otherwise once it is answered"):
        read_rows("set", [{"prompt": "hi", "response": "yes"}], tokenizer)


def test_a_collators_rows_are_those_it_makes_of_each_alone(tokenizer: Any) -> None:
    """Transformers' collators, left padding, and TRL's completion-only labels."""
    from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq

    ids, labels = ROW["input_ids"], ROW["labels"]
    seq2seq = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    assert read_rows("set", [ROW], seq2seq).items == [ROW]
    assert tokenizer_of(seq2seq) is tokenizer
    plain = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    assert read_rows("set", [{"input_ids": ids}], plain).items == [
        {"input_ids": ids, "labels": ids}
    ]
    row = {"input_ids": ids, "labels": labels, "attention_mask": [0, 1, 1, 1]}
    assert read_rows("set", [row], seq2seq).items == [{"input_ids": ids[1:], "labels": labels[1:]}]


def test_trls_collator_is_followed_and_its_packed_rows_are_refused() -> None:
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    row = {"input_ids": ROW["input_ids"], "completion_mask": [0, 0, 1, 1]}
    collate = trl.DataCollatorForLanguageModeling(pad_token_id=0)
    assert read_rows("set", [row], collate).items == [ROW]
    flat = trl.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    assert read_rows("set", [row], flat).items == [ROW]
    with pytest.raises(BadInput, match=r"'set', row 0 holds 2 packed samples.*packing=False"):
        read_rows("set", [{**row, "seq_lengths": [1, 3]}], flat)


def _with(**more: Any) -> Any:
    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**padded(rows), **more}

    return collate


@pytest.mark.parametrize(
    ("rows", "by", "told"),
    [
        ([], None, r"'set' has 0 rows and none with a target token"),
        ([{"input_ids": [1, 2], "labels": [2, -100]}], None, r"1 rows and none with a target"),
        (5, None, r"the rows of 'set' is 5; give a list"),
        ((row for row in [ROW]), None, r"give a list, or a data set with a length"),
        ([ROW, {"input_ids": []}], None, r"'set', row 1 has 0 tokens"),
        ([{"input_ids": [1, 2], "labels": [1]}], None, r"row 0 has 2 tokens and 1 labels"),
        ([{"input_ids": [1, -2]}], None, r"row 0 has 2 tokens below 0"),
        ([{"input_ids": ["a"]}], None, r"'set', row 0, input_ids is of type list; give whole"),
        ([{"text": "x"}], None, r"row 0 has text: give each row input_ids"),
        ([{"prompt": "a", "response": "b"}], None, r"row 0 has prompt, response: .* a tokenizer"),
        (["text"], None, r"'set', row 0 is 'text'; give a mapping"),
        ([ROW], 7, r"tokenizer_or_collator is 7"),
        ([ROW], lambda rows: rows, r"'set', row 0, collated, is of type list"),
        ([ROW], _with(pixel_values=torch.zeros(1)), r"row 0 has pixel_values beside its tokens"),
        ([ROW], _with(labels=None), r"the collator gives labels none, expected \(1, tokens\)"),
        ([ROW], _with(labels=torch.zeros(3, 4)), r"the collator gives labels \(3, 4\)"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_told_by_set_and_row(rows: Any, by: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        read_rows("set", rows, by)


def test_a_collator_that_masks_at_random_is_refused() -> None:
    class Masking:
        mlm = True

        def __call__(self, rows: Any) -> Any: ...

    with pytest.raises(BadInput, match="mlm=False"):
        read_rows("set", [ROW], Masking())
