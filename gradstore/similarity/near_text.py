"""Texts that repeat earlier ones: equal, or nearly, by hashed 5-grams (MinHash).

A text is compared without regard to case, Unicode form and white space. Two texts are nearly equal
where the Jaccard similarity of their sets of 5 characters in a row is high and their numbers are
the same: another number asks another question. MinHash (Broder 1997) in bands only finds whom to
compare; the similarity itself is exact.

Letters: s distinct 5-grams of a text, h hashes of a signature.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput

Hashes = npt.NDArray[np.uint64]

_GRAM = 5
#: 16 bands of 4: texts of similarity 0.8 share a band with probability 0.9998, of 0.5 with 0.64.
_BANDS, _BAND = 16, 4
#: Earlier texts compared exactly with one text, those with the most similar signatures.
_COMPARED = 64
#: 5-grams hashed at a time: 64 x 4,096 x 8 bytes.
_AT_ONCE = 4096

_random = np.random.default_rng(20240229)
_FACTORS: Hashes = _random.integers(0, 1 << 63, _BANDS * _BAND, dtype=np.uint64) * 2 + 1
_SHIFTS: Hashes = _random.integers(0, 1 << 63, _BANDS * _BAND, dtype=np.uint64)


def plain_text(text: str) -> str:
    """Normalise a text: one Unicode form (NFKC), no case, single spaces.

    Examples:
        >>> plain_text(" Add  the Numbers. ")
        'add the numbers.'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def equal_texts(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Find the first text that each one equals after `plain_text`.

    Returns:
        (n,) int64, the position of the first equal text, a text's own where it is the first.
    """
    first: dict[str, int] = {}
    return np.array([first.setdefault(plain_text(text), i) for i, text in enumerate(texts)], int)


def repeated_texts(texts: Sequence[str], similarity: float) -> npt.NDArray[np.int64]:
    """Find the first text that each one repeats, equal or nearly.

    Texts are gone through in order and each is compared with earlier ones that repeat none
    themselves. Equal texts are always found; of nearly equal ones, as good as all.

    Args:
        texts: n of them; an empty one repeats none.
        similarity: Jaccard similarity from which on texts are nearly equal, above 0 and at most 1.

    Returns:
        (n,) int64, the position of the earlier text; -1 where there is none.

    Raises:
        BadInput: `similarity` is out of range.

    Examples:
        >>> texts = ["Which of the vowels occur?", "which of the  vowels occur", "Add 1 and 2."]
        >>> repeated_texts(texts, 0.8).tolist()
        [-1, 0, -1]
    """
    if not 0 < similarity <= 1:
        raise BadInput(f"text_similarity is {similarity}; choose one above 0 and at most 1")
    found = np.full(len(texts), -1, dtype=np.int64)
    buckets: defaultdict[tuple[int, bytes], list[int]] = defaultdict(list)
    signatures: dict[int, Hashes] = {}
    equal = equal_texts(texts)

    @lru_cache(maxsize=4 * _COMPARED)
    def grams_of(row: int) -> Hashes:
        return _grams(plain_text(texts[row]))

    for row, text in enumerate(texts):
        plain = plain_text(text)
        if not plain:
            continue
        if equal[row] != row:
            first = int(equal[row])
            found[row] = first if found[first] < 0 else found[first]
            continue
        grams = _grams(plain)
        signature = _signature(grams)
        keys = [(band, part.tobytes()) for band, part in enumerate(signature.reshape(_BANDS, -1))]
        earlier = sorted({other for key in keys for other in buckets.get(key, ())})
        numbers = _numbers(plain)
        for other in _most_similar(signature, earlier, signatures):
            if (
                _jaccard(grams, grams_of(other)) >= similarity
                and _numbers(plain_text(texts[other])) == numbers
            ):
                found[row] = other
                break
        else:
            signatures[row] = signature
            for key in keys:
                buckets[key].append(row)
    return found


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def _most_similar(
    signature: Hashes, earlier: list[int], signatures: dict[int, Hashes]
) -> list[int]:
    """Keep the `_COMPARED` texts whose signatures are most alike, in ascending order."""
    if len(earlier) <= _COMPARED:
        return earlier
    alike = (np.stack([signatures[row] for row in earlier]) == signature).sum(axis=1)
    kept = np.argsort(-alike, kind="stable")[:_COMPARED]
    return sorted(earlier[i] for i in kept)


def _grams(text: str) -> Hashes:
    """Return the s distinct 5-grams of a text's bytes as numbers; a short text is one gram."""
    data = np.frombuffer(text.encode(errors="surrogatepass"), dtype=np.uint8).astype(np.uint64)
    if len(data) < _GRAM:
        data = np.pad(data, (0, _GRAM - len(data)))
    windows = np.lib.stride_tricks.sliding_window_view(data, _GRAM)
    packed = np.zeros(len(windows), dtype=np.uint64)
    for column in range(_GRAM):
        packed |= windows[:, column] << np.uint64(8 * column)
    return np.unique(packed)


def _signature(grams: Hashes) -> Hashes:
    """Compute the MinHash signature (h,) of s grams: the least of each hash, by multiplication."""
    least = np.full(len(_FACTORS), np.iinfo(np.uint64).max, dtype=np.uint64)
    for start in range(0, len(grams), _AT_ONCE):
        part = grams[start : start + _AT_ONCE, None]
        # Mixed first: products of packed letters differ in their high bits alone.
        mixed = (part ^ (part >> np.uint64(17))) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        hashed = (mixed * _FACTORS + _SHIFTS) >> np.uint64(20)
        least = np.minimum(least, hashed.min(axis=0))
    return least


def _jaccard(a: Hashes, b: Hashes) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)
