"""Texts of an audit: rows that repeat an earlier text, and rows that answer one prompt unlike.

Letters: n rows.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradstore.similarity.near_text import equal_texts, plain_text, repeated_texts

if TYPE_CHECKING:
    from gradstore.store.texts import RowTexts

#: Signs that end a word, where they do not stand inside a number or a name.
_ENDS = re.compile(r"[.,;:!?]+(?=\s)")


@dataclass(frozen=True)
class TextSigns:
    """Signs that the texts of n rows give.

    Attributes:
        prompts: of every row.
        responses: of every row.
        repeats: (n,) int64, the earlier row whose prompt and response a row repeats; -1: none.
        conflict: (n,) int64, the first other row that asks the same (`plain_text` without the
            signs that end a word) and has another response; -1 where there is none.
        conflict_share: (n,) float64, share of the other rows of its prompt whose response is
            another; nan where no other row has the prompt.
    """

    prompts: Sequence[str]
    responses: Sequence[str]
    repeats: npt.NDArray[np.int64]
    conflict: npt.NDArray[np.int64]
    conflict_share: npt.NDArray[np.float64]


def text_signs(texts: RowTexts | None, similarity: float) -> TextSigns | None:
    """Compare the texts of all rows; None where the store has none.

    Args:
        texts: of a row set.
        similarity: Jaccard similarity of 5-grams from which on two texts are nearly equal.

    Raises:
        BadInput: `similarity` is out of range.
    """
    if texts is None:
        return None
    table = texts.table(["prompt", "response"])
    return compared(table["prompt"].to_pylist(), table["response"].to_pylist(), similarity)


def compared(prompts: Sequence[str], responses: Sequence[str], similarity: float) -> TextSigns:
    """Compare prompts and responses of n rows.

    Examples:
        >>> signs = compared(["Sum of 1 and 2?"] * 3, ["3", "3", "4"], 0.8)
        >>> signs.repeats.tolist(), signs.conflict.tolist(), signs.conflict_share.tolist()
        ([-1, 0, -1], [2, 2, 0], [0.5, 0.5, 1.0])
    """
    whole = [f"{prompt}\n{response}" for prompt, response in zip(prompts, responses, strict=True)]
    # No similarity here: a word of a short prompt that differs asks something else.
    asked = equal_texts([_ENDS.sub("", f"{prompt} ") for prompt in prompts])
    conflict, share = _conflicts(asked, prompts, responses)
    return TextSigns(prompts, responses, repeated_texts(whole, similarity), conflict, share)


def _conflicts(
    asked: npt.NDArray[np.int64], prompts: Sequence[str], responses: Sequence[str]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Find rows that share a prompt and differ in the response.

    Args:
        asked: (n,) first row with the prompt; that row itself where it is the first.
        prompts: n of them; rows with an empty one were not asked anything.
        responses: n of them.
    """
    conflict = np.full(len(responses), -1, dtype=np.int64)
    share = np.full(len(responses), np.nan)
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for row, first in enumerate(asked.tolist()):
        groups[first].append(row)
    for first, rows in groups.items():
        if len(rows) == 1 or not prompts[first].strip():  # plain text has no prompt
            continue
        answers = [plain_text(responses[row]) for row in rows]
        counts = Counter(answers)
        # Reversed: the first row with an answer is written last, and stays.
        having = dict(zip(reversed(answers), reversed(rows), strict=True))
        earliest = sorted(having.items(), key=lambda item: item[1])[:2]
        for row, answer in zip(rows, answers, strict=True):
            share[row] = (len(rows) - counts[answer]) / (len(rows) - 1)
            # Of the first two distinct answers at least one is not the row's own.
            others = [other for text, other in earliest if text != answer]
            conflict[row] = others[0] if others else -1
    return conflict, share
