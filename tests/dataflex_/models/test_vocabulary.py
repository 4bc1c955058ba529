"""Tokens without an embedding are told by name, before a step is trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.data.rows import Domains, Rows, RunData
from dataflex.models.vocabulary import check_vocabulary
from gradstore.errors import BadInput


def model(size: int, **config: int) -> Any:
    return SimpleNamespace(
        get_input_embeddings=lambda: SimpleNamespace(num_embeddings=size),
        config=SimpleNamespace(**config),
    )


def rows(name: str, *ids: list[int], sources: Any = None) -> Rows:
    from datasets import Dataset

    return Rows(name, Dataset.from_dict({"input_ids": list(ids), "labels": list(ids)}), sources)


def data(train: Rows, *targets: Rows, domains: Domains | None = None) -> RunData:
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda i: f"<{i}>")
    return RunData(train, targets, tokenizer, "qwen", None, "sft", domains)


def test_a_token_beyond_the_embeddings_names_the_way_out() -> None:
    sound = rows("train", [1, 9], [9])
    check_vocabulary(model(10), data(sound, rows("t", [3])))
    odd = rows("t", [1], [10, 12, 10], sources=(("a", 0), ("a", 7)))
    said = r"embeddings for 10 tokens.*'t'.*10 \('<10>'\), 12 \('<12>'\), first data set 'a', row 7"
    with pytest.raises(BadInput, match=rf"{said}.*'qwen'.*resize_vocab: true"):
        check_vocabulary(model(10), data(sound, odd))
    import numpy as np

    held = Domains(("a",), np.zeros(2, np.int64), {"a": rows("held", [30])})
    with pytest.raises(BadInput, match="'held' has rows with the tokens 30"):
        check_vocabulary(model(10), data(sound, domains=held))


def test_a_token_that_stands_for_a_picture_needs_no_embedding() -> None:
    pictures = data(rows("train", [1, 10, 10]))
    check_vocabulary(model(10, image_token_id=10), pictures)
    with pytest.raises(BadInput, match="tokens 11"):
        check_vocabulary(model(10, image_token_id=10), data(rows("train", [10, 11])))
