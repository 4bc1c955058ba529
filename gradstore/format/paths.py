"""The files that a store may have, told by their paths; for who takes files from others.

>>> file_at("generations/a/train/8/features/c/3/0")
StorePath(path='generations/a/train/8/features/c/3/0', kind='chunk', name='a/train/8', number=3, ...
>>> file_at("generations/../secret")
Traceback (most recent call last):
...
gradstore.errors.BadInput: 'generations/../secret' is no file of a store...
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gradstore.errors import BadInput
from gradstore.format.layout import (
    COMMITS,
    CURVATURE,
    FORGOTTEN,
    GENERATIONS,
    METADATA,
    PLANS,
    SPACES,
)
from gradstore.format.names import GenerationName, check_space
from gradstore.format.text_table import TEXTS

#: root, group, generation and array are a zarr.json; a group lies above generations.
Kind = Literal["root", "group", "generation", "array", "chunk", "unit", "plan", "commit", "space",
               "text", "factors", "request", "receipt", "lock", "claim", "staging"]  # fmt: skip

#: What a store calls its folder of what is not published, and of what workers claim.
_STAGING, _LEASES = "staging", "staging/leases"
_LOCK = "writer.lock"

_LONGEST, _DEEPEST = 1000, 12
_PART = re.compile(r"[A-Za-z0-9%][A-Za-z0-9._%+=@-]{0,199}")
_NUMBER = r"(?P<number>0|[1-9][0-9]{0,17})"
_SHA = r"(?P<name>[0-9a-f]{64})"

_FORMS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("root", re.compile(re.escape(METADATA))),
    ("lock", re.compile(re.escape(_LOCK))),
    ("commit", re.compile(rf"{COMMITS}/{_NUMBER}\.json")),
    ("plan", re.compile(rf"{PLANS}/(?P<name>.+)\.json")),
    ("space", re.compile(rf"{SPACES}/(?P<name>[^/]+)/provenance\.json")),
    ("chunk", re.compile(rf"{GENERATIONS}/(?P<name>.+)/(?P<array>[a-z_]+)/c/{_NUMBER}(?:/0)?")),
    ("unit", re.compile(rf"{GENERATIONS}/(?P<name>.+)/units/{_NUMBER}\.json")),
    ("array", re.compile(rf"{GENERATIONS}/(?P<name>.+)/(?P<array>[a-z_]+)/{re.escape(METADATA)}")),
    ("generation", re.compile(rf"{GENERATIONS}/(?P<name>.+)/{re.escape(METADATA)}")),
    ("group", re.compile(rf"{GENERATIONS}(?P<above>(?:/[^/]+){{0,3}})/{re.escape(METADATA)}")),
    ("text", re.compile(rf"{TEXTS}/{_SHA}/{_NUMBER}\.parquet")),
    ("factors", re.compile(rf"{CURVATURE}/{_SHA}\.safetensors")),
    ("request", re.compile(rf"{FORGOTTEN}/{_NUMBER}\.request\.json")),
    ("receipt", re.compile(rf"{FORGOTTEN}/{_NUMBER}\.receipt\.json")),
    ("claim", re.compile(rf"{_LEASES}/.+")),
    ("staging", re.compile(rf"{_STAGING}/.+")),
)


@dataclass(frozen=True)
class StorePath:
    """A file's path, and what it says.

    Attributes:
        path: relative to the store.
        kind: of the file.
        name: full name of the generation; of a space; sha256 of a row set or of factors.
        number: of a commit, a unit, a part of a text, a request.
        array: name of the array.
    """

    path: str
    kind: Kind
    name: str = ""
    number: int = 0
    array: str = ""


def check_parts(path: str) -> str:
    """Return a path whose every name is one that a store makes; "" is the store itself.

    Raises:
        BadInput: a name leads elsewhere, or is none of a store's.
    """
    parts = path.split("/") if path else []
    if len(path) > _LONGEST or len(parts) > _DEEPEST or not all(map(_PART.fullmatch, parts)):
        raise _no_file(path)
    return path


def file_at(path: str) -> StorePath:
    """Tell what file of a store has a path.

    Raises:
        BadInput: none has.
    """
    check_parts(path)
    for kind, form in _FORMS:
        found = form.fullmatch(path)
        if found is None:
            continue
        given = found.groupdict()
        name, number = given.get("name") or "", int(given.get("number") or 0)
        check = _NAMES.get(kind)
        try:
            if check is not None:
                check(name or given.get("above") or "")
        except BadInput:
            continue
        return StorePath(path, kind, name, number, given.get("array") or "")
    raise _no_file(path)


def _check_above(above: str) -> None:
    """Reject a folder that no generation lies in."""
    for rest in ("", "/train", "/a", "/target/a") if above else ():
        try:
            GenerationName.parse(f"{above[1:]}{rest}/0")
        except BadInput:
            continue
        return
    if above:
        raise _no_file(above)


_NAMES: dict[Kind, Callable[[str], object]] = {
    "plan": GenerationName.parse,
    "chunk": GenerationName.parse,
    "unit": GenerationName.parse,
    "array": GenerationName.parse,
    "generation": GenerationName.parse,
    "group": _check_above,
    "space": check_space,
}


def _no_file(path: str) -> BadInput:
    shown = path if len(path) <= 200 else f"{path[:200]}..."
    return BadInput(
        f"{shown!r} is no file of a store: none is written there. See that reader and writer are "
        "of the same release"
    )
