"""Repeated texts, against exact similarities of all pairs; answers that conflict."""

from __future__ import annotations

import random

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.similarity.audit_texts import compared
from gradstore.similarity.near_text import equal_texts, repeated_texts

WORDS = "lamp river stone bird house garden letter road boat child teacher baker winter".split()


def sentence(seed: int, words: int = 30) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + rng.choice("abcdefgh") for _ in range(words))


def grams(text: str) -> set[bytes]:
    data = text.encode()
    return {data[i : i + 5] for i in range(len(data) - 4)}


def test_equal_texts_are_found_whatever_their_case_spaces_and_unicode_form() -> None:
    texts = ["One  two\n", "one two", "\uff2f\uff2e\uff25 TWO", "one three", ""]
    assert equal_texts(texts).tolist() == [0, 0, 0, 3, 4]
    assert repeated_texts(texts, 1.0).tolist() == [-1, 0, 0, -1, -1]


def test_nearly_equal_texts_are_those_of_high_exact_similarity() -> None:
    texts = []
    for seed in range(60):
        text = sentence(seed)
        cut = random.Random(seed).randint(1, 100)
        texts += [text, text[:-cut] + "zq"]
    found = repeated_texts(texts, 0.8)
    for row in range(1, len(texts), 2):
        a, b = grams(texts[row - 1]), grams(texts[row])
        near = len(a & b) / len(a | b) >= 0.8
        assert found[row] == (row - 1 if near else -1), row
    assert (found[::2] == -1).all()
    assert 0 < (found[1::2] >= 0).sum() < 60


def test_another_number_is_another_question() -> None:
    long = sentence(1)
    texts = [f"{long} 17?", f"{long} 18?", f"{long} 17 ?"]
    assert repeated_texts(texts, 0.8).tolist() == [-1, -1, 0]


def test_hundreds_of_texts_that_share_a_long_frame_are_told_apart() -> None:
    frame = sentence(3, 12)
    texts = [f"{frame} {sentence(100 + i, 12)}" for i in range(300)]
    assert (repeated_texts([*texts, *texts], 0.8)[300:] == np.arange(300)).all()
    assert (repeated_texts(texts, 0.8) == -1).all()


def test_short_texts_markup_and_half_characters_are_texts() -> None:
    texts = ["a", "A ", "<b>", "\ud800 x", "\ud800 x", "\x00"]
    assert repeated_texts(texts, 0.8).tolist() == [-1, 0, -1, -1, 3, -1]


@pytest.mark.parametrize("similarity", [0.0, 1.5, float("nan")])
def test_a_similarity_that_is_none_is_refused(similarity: float) -> None:
    with pytest.raises(BadInput, match="text_similarity is"):
        repeated_texts(["a"], similarity)


def test_rows_of_one_prompt_with_other_answers_conflict() -> None:
    prompts = ["Capital of France?", "Sum?", "capital of  France?", "CAPITAL of France?", "Sum"]
    signs = compared(prompts, ["Paris", "3", "paris", "Lyon", "3"], 0.8)
    assert signs.conflict.tolist() == [3, -1, 3, 0, -1]
    np.testing.assert_array_equal(signs.conflict_share, [0.5, 0.0, 0.5, 1.0, 0.0])
    assert signs.repeats.tolist() == [-1, -1, 0, -1, -1]


def test_prompts_that_differ_in_a_word_or_a_number_ask_something_else() -> None:
    prompts = ["Give each letter. fupodor", "Give each letter. fupodi", "Is 1.5 more?"]
    prompts += ["Is 15 more?", "", " "]  # the last two are rows of plain text
    signs = compared(prompts, list("abcdef"), 0.8)
    assert (signs.conflict == -1).all()
    assert np.isnan(signs.conflict_share).all()
