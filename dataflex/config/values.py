"""Types of YAML values: how what a user may write becomes what a program reads.

A list may be written as one, as a comma string, or as its only element; a whole number as 3, 3.0 or
"3". What no conversion helps stays as it is, for the type to refuse.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from annotated_types import Predicate, doc
from pydantic import BeforeValidator


def names(value: object) -> object:
    """Convert a list or a comma string of names to a tuple, blanks removed."""
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        return value
    return tuple(str(p).strip() for p in parts if str(p).strip())


def as_text(value: object) -> object:
    """Convert a single value to text."""
    return value if isinstance(value, list | tuple | dict) else str(value)


def as_tuple(value: object) -> tuple[Any, ...]:
    """Convert a list, a comma string or a single value to a tuple."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def names_a_folder(name: str) -> bool:
    """Return true where a model's name can only be a folder's path, not a hub id.

    A hub id is `name` or `organisation/name`; a path is absolute, begins with a dot or ~, or has
    more parts.
    """
    path = Path(name).expanduser()
    return path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2


def as_number(value: object) -> object:
    """Convert a number in quotes to a float."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def as_int(value: object) -> object:
    """Convert a whole number, written as a fraction or in quotes, to an int."""
    number = as_number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _is_not_blank(text: str) -> bool:
    return bool(text.strip())


_NotBlank = Predicate(_is_not_blank)
Name = Annotated[str, _NotBlank, doc("a name")]
ComponentName = Annotated[
    str, _NotBlank, doc("a preset's or strategy's name (`dataflex-cli components` lists them)")
]
PathText = Annotated[str, _NotBlank, doc("a path")]
Whole = Annotated[int, BeforeValidator(as_int)]
Number = Annotated[float, BeforeValidator(as_number)]

NameList = Annotated[tuple[Name, ...], BeforeValidator(as_tuple), doc("a name, or a list of them")]
PathList = Annotated[
    tuple[PathText, ...], BeforeValidator(as_tuple), doc("a path, or a list of them")
]
Wholes = Annotated[
    tuple[Whole, ...], BeforeValidator(as_tuple), doc("a whole number, or a list of them")
]
Numbers = Annotated[
    tuple[Number, ...], BeforeValidator(as_tuple), doc("a number, or a list of them")
]
