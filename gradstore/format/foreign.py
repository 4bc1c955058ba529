"""JSON from outside: of a user, a server, another program, or a disk that may have changed it.

Python's parser gives up at a depth of its own with RecursionError, and whatever walks through a
value that is nested just less deeply does so later. No document that anyone writes by hand or that
this project writes is nested a hundredth as deeply.
"""

from __future__ import annotations

import json
from typing import Any

#: Lists and mappings inside each other that a document may have.
MOST_NESTED = 100

#: What ValueError says of a document that has more.
TOO_DEEP = f"it nests more than {MOST_NESTED} lists or mappings inside each other"


def read_json(document: str | bytes, **rules: Any) -> Any:  # noqa: ANN401 - JSON
    """Parse JSON that was not made by this process.

    Args:
        document: the text, or its bytes in UTF-8.
        rules: hooks of `json.loads`.

    Raises:
        ValueError: it is not JSON or UTF-8, or nests more than `MOST_NESTED` levels.
    """
    try:
        value = json.loads(document, **rules)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_NESTED):
        below = (
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        )
        level = [inner for inner in below if isinstance(inner, dict | list)]
        if not level:
            return value
    raise ValueError(TOO_DEEP)


def read_object(document: str | bytes, **rules: Any) -> dict[str, Any]:  # noqa: ANN401 - hooks
    """Parse one JSON object that was not made by this process.

    Raises:
        ValueError: as `read_json`, or it is another value.
    """
    value = read_json(document, **rules)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value
