"""Rows of a question: a training row made again, and the text of single tokens."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.bridge.questions import QuestionModel
from dataflex.features.question_rows import token_texts, train_row
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.records import row_hash

ROW = {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1], "labels": [-100, 2, 3]}
OTHER = {**ROW, "input_ids": [1, 2, 4]}


class Words:
    """A tokenizer of bytes."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve: 東京", "", "é", "🙂 done"])
def test_tokens_read_as_the_whole_text_when_joined(text: str) -> None:
    shown = token_texts(Words(), list(text.encode()))
    assert "".join(shown) == text
    assert len(shown) == len(text.encode())


def test_a_text_cut_within_a_character_is_shown_so() -> None:
    assert token_texts(Words(), list("a é".encode())[:-1])[-1] == "\N{REPLACEMENT CHARACTER}"


def made(
    encode: Callable[[], Any], source: Callable[[], Any], *, text: bool = True, known: bool = True
) -> Any:
    """`train_row` with a model whose text and file give what the functions return."""
    model: Any = SimpleNamespace(
        encode=lambda *_: encode(),
        source_row=lambda *_: source(),
        has_media=QuestionModel.has_media,
    )
    sources = (("alpaca", 7),) if known else None
    keys = np.frombuffer(row_hash(ROW["input_ids"], ROW["labels"]), np.uint8)[None]
    train: Any = SimpleNamespace(name="train/2", rows=1, row_hash=keys, sources=sources)
    said = SimpleNamespace(prompt="ask", response="say")
    texts: Any = SimpleNamespace(read=lambda rows: [said]) if text else None
    return train_row(model, train, texts, 0)


def gone() -> Any:
    raise BadInput("no such file.")


def test_a_row_is_made_of_text_or_of_its_file() -> None:
    assert made(lambda: ROW, gone) == ROW
    assert made(lambda: OTHER, lambda: ROW) == ROW, "turns apart are in the file alone"
    assert made(gone, lambda: ROW) == ROW, "the template refuses a lone placeholder"
    assert made(lambda: ROW, lambda: ROW, text=False) == ROW


def test_a_row_that_cannot_be_made_again_is_named() -> None:
    place = r"row 0 \(alpaca\[7\]\)"
    with pytest.raises(ProvenanceMismatch, match=f"{place} differs"):
        made(lambda: OTHER, lambda: OTHER)
    with pytest.raises(ProvenanceMismatch, match=f"{place} differs"):
        made(lambda: OTHER, lambda: None)
    with pytest.raises(BadInput, match=f"{place} cannot be made again: its text alone.*no such"):
        made(lambda: OTHER, gone)
    with pytest.raises(BadInput, match=f"{place} cannot be made again: the store keeps no text"):
        made(lambda: ROW, gone, text=False)
    with pytest.raises(BadInput, match="row 0 cannot be made again: the store does not know"):
        made(lambda: OTHER, lambda: ROW, known=False)
    with pytest.raises(BadInput, match=f"{place} has images"):
        made(gone, lambda: {**ROW, "images": ["a.png"], "videos": None})
