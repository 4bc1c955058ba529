"""Checks of the values in a document, which whoever can write to a store may have chosen.

A seal says that bytes are as they were sealed, not who sealed them: so a value is of its type
before anything counts with it, spells it, or looks it up. Each check returns the value.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gradstore.format.canonical import Json

_HEX = re.compile(r"[0-9a-f]*")
#: Longest spelling of a refused value in a message.
_SHOWN = 60


def whole(value: Json, what: str, least: int = 0, most: int = (1 << 63) - 1) -> int:
    """Return a whole number from `least` to `most`; raise ValueError for another value.

    >>> whole(3, "unit")
    3
    >>> whole(True, "unit")
    Traceback (most recent call last):
    ...
    ValueError: unit is True, no whole number from 0 to 9223372036854775807
    """
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} is {_shown(value)}, no whole number from {least} to {most}")
    return value


def text(value: Json, what: str) -> str:
    """Return a text; raise ValueError for another value."""
    if type(value) is not str:
        raise ValueError(f"{what} is {_shown(value)}, no text")
    return value


def hexadecimal(value: Json, what: str, size: int) -> str:
    """Return `size` bytes in hex; raise ValueError for another value."""
    if type(value) is not str or len(value) != 2 * size or _HEX.fullmatch(value) is None:
        raise ValueError(f"{what} is {_shown(value)}, not {size} bytes in hex")
    return value


def sha256(value: Json, what: str) -> str:
    """Return a sha256 in hex; raise ValueError for another value."""
    return hexadecimal(value, what, 32)


def mapping(value: Json, what: str) -> dict[str, Json]:
    """Return a mapping; raise ValueError for another value."""
    if type(value) is not dict:
        raise ValueError(f"{what} is {_shown(value)}, no mapping")
    return value


def each_of(values: Json, what: str) -> Sequence[Json]:
    """Return a list, or the tuple that is kept of one; raise ValueError for another value."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{what} is {_shown(values)}, no list")
    return values


def _shown(value: Json) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    spelled = repr(value)
    return spelled if len(spelled) <= _SHOWN else f"{spelled[:_SHOWN]}..."
