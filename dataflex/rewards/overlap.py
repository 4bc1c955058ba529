"""Rewards that compare a response with the reference answer, word by word."""

from __future__ import annotations

import re
from collections import Counter

_WORD = re.compile(r"\w+|[^\w\s]")


def token_f1(prompt: str, response: str, reference: str) -> float:
    """Compute the share of words that response and reference have in common: SQuAD's F1.

    Case is ignored.

    Examples:
        >>> token_f1("", "The capital is Paris.", "Paris")
        0.3333333333333333
        >>> token_f1("", "paris", "Paris"), token_f1("", "", "Paris")
        (1.0, 0.0)
    """
    found, wanted = (Counter(_WORD.findall(text.lower())) for text in (response, reference))
    common = (found & wanted).total()
    if not common:
        return float(found == wanted)
    return 2 * common / (found.total() + wanted.total())


def exact_match(prompt: str, response: str, reference: str) -> float:
    """Return 1 where response and reference are equal except for case and white space, else 0.

    Examples:
        >>> exact_match("", " New  York", "new york"), exact_match("", "York", "new york")
        (1.0, 0.0)
    """
    return float(response.lower().split() == reference.lower().split())
