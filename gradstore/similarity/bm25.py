"""BM25: how well texts answer for the words of a query, without a model.

A baseline that gradients and embeddings have to beat. The formula is Lucene's (Kamphuis et al.
2020, "Which BM25 do you mean?"): a document d scores, for a query, the sum over its words t of

    ln(1 + (n - n_t + 0.5) / (n_t + 0.5)) * f / (f + k1 * (1 - b + b * |d| / mean |d|))

where n_t of n documents have t, d has it f times, and |d| counts the words of d. A word that the
query has twice counts twice. Computed by bm25s, which keeps each word's part of each document.

Letters: n documents, q queries.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, expect
from gradstore.similarity.near_text import plain_text

#: Scripts written without spaces between words: each sign is a word (as in Unicode's UAX 29).
_SINGLE = "\u3040-\u309f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"

#: The same words as `_word` finds, several times as fast.
_ASCII_WORD = re.compile(r"\w+", re.ASCII)


def words_of(text: str) -> list[str]:
    """Split a text into words: letters, digits and their marks, one Unicode form, no case.

    Nothing is left out or cut to a stem, since rows may be of any language. A Chinese sign, and a
    Hiragana one, is a word of its own; digits and letters in a row are one word.

    Examples:
        >>> words_of("Sort the LETTERS: b, A3!")
        ['sort', 'the', 'letters', 'b', 'a3']
        >>> words_of("数字 हिन्दी")
        ['数', '字', 'हिन्दी']
    """
    plain = plain_text(text)
    return (_ASCII_WORD if plain.isascii() else _word()).findall(plain)


@cache
def _word() -> re.Pattern[str]:
    # Vowel signs and accents of many scripts are marks, which \w does not match.
    marks = "".join(
        re.escape(chr(code))
        for code in range(0x300, min(0x20000, sys.maxunicode))
        if unicodedata.category(chr(code)).startswith("M")
    )
    letters = rf"[^\W{_SINGLE}]"
    return re.compile(rf"[{_SINGLE}][{marks}]*|{letters}+(?:[{marks}]+{letters}*)*")


class Bm25:
    """Index of n documents that scores them for one query at a time."""

    def __init__(self, documents: Iterable[str], *, k1: float = 1.5, b: float = 0.75) -> None:
        """Split the documents into words and count them.

        Args:
            documents: n texts; one without a word scores 0 for every query.
            k1: how soon a repeated word stops to count, 0 or more; at 0 it counts once.
            b: how much long documents are marked down, 0 to 1.

        Raises:
            BadInput: `k1` or `b` out of range, or no document has a word.
        """
        expect(0 <= k1 < math.inf, "k1", k1, "a number of 0 or more")
        expect(0 <= b <= 1, "b", b, "a number from 0 to 1")
        vocabulary: dict[str, int] = {}
        numbers = [
            [vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)]
            for text in documents
        ]
        if not vocabulary:
            raise BadInput(f"none of {len(numbers)} documents has a word; check their texts.")
        import bm25s

        # It logs at DEBUG, to whatever handlers the program has.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        self._index.index((numbers, vocabulary), create_empty_token=False, show_progress=False)
        self._vocabulary = vocabulary
        #: n.
        self.documents = len(numbers)

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """Score every document: (n,) float32, 0 where it has no word of the query."""
        known = [self._vocabulary.get(word) for word in words_of(query)]
        numbers = [number for number in known if number is not None]
        found: npt.NDArray[np.float32] = self._index.get_scores_from_ids(numbers)
        return found


def bm25_scores(
    documents: Sequence[str], queries: Sequence[str], *, k1: float = 1.5, b: float = 0.75
) -> npt.NDArray[np.float32]:
    """Score n documents for q queries by BM25, in the form that `gradstore.evaluation` takes.

    Args:
        documents: n texts, such as the prompts and responses of training rows.
        queries: q texts.
        k1: how soon a repeated word stops to count, 0 or more.
        b: how much long documents are marked down, 0 to 1.

    Returns:
        (q, n) float32, 0 or more; those of different queries are no common measure, since a longer
        query sums over more words.

    Raises:
        BadInput: `k1` or `b` out of range, no query, or no document with a word.

    Examples:
        >>> bm25_scores(["red fish", "blue fish", "bird"], ["a red bird"]).argsort()[0, ::-1]
        array([2, 0, 1])
    """
    for name, texts in (("documents", documents), ("queries", queries)):
        whole = not isinstance(texts, str) and all(isinstance(text, str) for text in texts)
        expect(whole and len(texts) > 0, name, texts, "a list of at least one text")
    index = Bm25(documents, k1=k1, b=b)
    return np.stack([index.scores(query) for query in queries])
