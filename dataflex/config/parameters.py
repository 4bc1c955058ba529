"""Whether a YAML value is of the type that a constructor's signature asks for.

Most values are used only when training has begun: a word in the place of a number would end a run
at its first update, with a TypeError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

#: What to write for each type that is checked; others are left to the constructor.
EXPECTED: Mapping[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Mapping: "a mapping",
    Sequence: "a list",
}


def mistyped(constructor: Callable[..., None], values: Mapping[str, Any]) -> list[str]:
    """One sentence for each value whose type is none of those its parameter is annotated with.

    Args:
        constructor: its annotations say what is accepted; a name that they mention but that does
            not exist at run time leaves all of them unchecked.
        values: keywords for it; others are skipped.
    """
    try:
        hints = get_type_hints(constructor)
    except NameError:
        return []
    faults = []
    for name, value in values.items():
        wanted, element = _plain(hints.get(name, Any)), _element(hints.get(name, Any))
        if wanted and value is not None and not any(_is(value, kind) for kind in wanted):
            expected = " or ".join(EXPECTED[kind] for kind in wanted)
            faults.append(f"{name} is {value!r}; expected {expected}")
        elif element and isinstance(value, list) and not all(_is(v, element) for v in value):
            faults.append(f"{name} is {value!r}; expected a list, each {EXPECTED[element]}")
        elif name == "seed" and isinstance(value, int) and value < 0:
            faults.append(f"seed is {value}; expected 0 or more")
        elif wanted and value is None and type(None) not in get_args(hints[name]):
            faults.append(f"{name} is null; expected {EXPECTED[wanted[0]]}")
    return faults


def _plain(hint: object) -> list[Any]:
    """The types a hint allows beside None; empty where one of them is not checked here."""
    kinds = [get_origin(option) or option for option in _options(hint)]
    return kinds if all(kind in EXPECTED for kind in kinds) else []


def _element(hint: object) -> Any:  # noqa: ANN401 - a type
    """The type of a list's elements; None where the hint says nothing that is checked."""
    inner = [get_args(o)[0] for o in _options(hint) if get_origin(o) is Sequence and get_args(o)]
    return inner[0] if len(inner) == 1 and inner[0] in EXPECTED else None


def _options(hint: object) -> list[Any]:
    """The types a hint allows beside None."""
    union = hint not in EXPECTED and get_origin(hint) not in EXPECTED
    return [option for option in (get_args(hint) if union else (hint,)) if option is not type(None)]


def _is(value: object, kind: type) -> bool:
    """A boolean is no number, a whole number is a number, a word is no list."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float)
    return isinstance(value, kind) and not (kind is Sequence and isinstance(value, str))


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a parameter is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_count(value: object) -> bool:
    """Whether a parameter is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
