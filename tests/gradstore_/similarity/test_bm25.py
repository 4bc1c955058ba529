"""BM25 against its formula in plain Python, and words of many scripts."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.similarity.bm25 import _ASCII_WORD, Bm25, _word, bm25_scores, words_of

DOCUMENTS = [
    "Sort the letters: c a b",
    "Sort the numbers 3 1 2, then sort them again",
    "Which letters of the word are vowels?",
    "",
    "a a a b",
]
QUERIES = ["sort letters", "Which numbers? Which letters?", "nothing known", "", "A b"]


def by_formula(documents: list[list[str]], query: list[str], k1: float, b: float) -> list[float]:
    """Lucene's BM25, one term after the other, repeated ones repeatedly."""
    mean = sum(map(len, documents)) / len(documents)
    found = []
    for document in documents:
        score = 0.0
        for term in query:
            having = sum(term in other for other in documents)
            times = document.count(term)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            if times:
                score += idf * times / (times + k1 * (1 - b + b * len(document) / mean))
        found.append(score)
    return found


@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.4), (0.0, 0.5), (2.0, 0.0), (1.2, 1.0)])
def test_scores_are_those_of_the_formula(k1: float, b: float) -> None:
    found = bm25_scores(DOCUMENTS, QUERIES, k1=k1, b=b)
    words = [[*map(str, words_of(text))] for text in DOCUMENTS]
    expected = [by_formula(words, words_of(query), k1, b) for query in QUERIES]
    assert found.shape == (5, 5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert found[0].max() > 0.1
    assert not found[2:4].any(), "no word of the query is known, or it has none"


texts = st.lists(st.text("ab é", max_size=12), min_size=1, max_size=6)


@given(texts, texts)
def test_scores_of_any_texts_are_those_of_the_formula(
    documents: list[str], asked: list[str]
) -> None:
    words = [words_of(text) for text in documents]
    if not any(words):
        with pytest.raises(BadInput, match="has a word"):
            bm25_scores(documents, asked)
        return
    expected = [by_formula(words, words_of(query), 1.5, 0.75) for query in asked]
    np.testing.assert_allclose(bm25_scores(documents, asked), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The CAT, the Cat!", ["the", "cat", "the", "cat"]),
        ("I am 3.5 m", ["i", "am", "3", "5", "m"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("e\u0301te\u0301 été", ["été", "été"]),
        ("排序字母", ["排", "序", "字", "母"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("Привет, мир", ["привет", "мир"]),
        ("\uff46\uff55\uff4c\uff4c \uff11\uff12", ["full", "12"]),
        (" ?! ", []),
    ],
)
def test_words_are_those_of_their_script(text: str, words: list[str]) -> None:
    assert words_of(text) == words


@given(st.text(st.characters(max_codepoint=127)))
def test_the_fast_way_for_ascii_finds_the_same_words(text: str) -> None:
    assert _ASCII_WORD.findall(text) == _word().findall(text)


def test_it_is_silent_and_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        Bm25(DOCUMENTS).scores("sort")
    assert not [record for record in caplog.records if record.name.startswith("bm25s")]
    code = (
        "import sys; import gradstore.similarity.bm25 as room; assert 'bm25s' not in sys.modules; "
        "room.bm25_scores(['a b'], ['a']); import bm25s.numba.selection as compiled; "
        "import bm25s.numba.retrieve_utils as more; "
        "found = [f for m in (compiled, more) for f in vars(m).values() "
        "if getattr(f, 'signatures', None)]; assert not found, found; "
        "assert not {'jax', 'torch.compile', 'Stemmer'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(BadInput, match="k1 is -1"):
        Bm25(DOCUMENTS, k1=-1)
    with pytest.raises(BadInput, match="b is 2"):
        Bm25(DOCUMENTS, b=2)
    with pytest.raises(BadInput, match="documents is 'one text'; give a list"):
        bm25_scores("one text", ["a"])
    with pytest.raises(BadInput, match="queries"):
        bm25_scores(DOCUMENTS, [])
    with pytest.raises(BadInput, match="none of 2 documents has a word"):
        bm25_scores(["?", ""], ["a"])
