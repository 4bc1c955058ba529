"""One spelling for every JSON document of a store, and the seal that guards it.

A document has exactly one valid byte string (sorted keys, no spaces, ASCII, no NaN), and carries
the sha256 of everything else it says under `sha256`. So every changed byte, a space included, is
seen: either the bytes are no longer canonical, or the seal no longer fits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.foreign import read_object

#: Plain JSON: dict with str keys, list, str, int, float, bool or None.
Json: TypeAlias = Any

SEAL = "sha256"

_SPELLING = json.JSONEncoder(
    sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
)
_OTHER_FORM = "not in canonical form"
_OTHER_SEAL = "its seal is {}, the sha256 of its content {}"


def plain(value: object, where: str = "value") -> Json:
    """Convert tuples, NumPy scalars, arrays and mappings to plain JSON values.

    Args:
        value: what to convert.
        where: dotted name of the value, for the error message.

    Raises:
        BadInput: a number is not finite, a key is not a string, or a type has no JSON form.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if not math.isfinite(number):
            raise BadInput(
                f"{where} is {number}; only finite numbers can be recorded; "
                "leave it out, or give None"
            )
        return number
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise BadInput(f"{where} has the key {key!r}; keys must be strings")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise BadInput(
        f"{where} is of type {type(value).__name__}, which has no JSON form; "
        "give numbers, text, lists or mappings"
    )


def canonical_json(value: object) -> bytes:
    """Return the unique canonical byte string of `value`.

    >>> canonical_json({"b": (1, 2), "a": None})
    b'{"a":null,"b":[1,2]}'
    """
    return _dump(plain(value))


def _dump(value: Json) -> bytes:
    """Serialize a value that is already plain JSON."""
    return _SPELLING.encode(value).encode("ascii")


def sha256_json(value: object) -> str:
    """Compute the sha256, in hex, of the canonical form of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def seal(document: Mapping[str, object]) -> dict[str, Json]:
    """Return `document` with the sha256 of its other fields added as `sha256`."""
    body = {key: value for key, value in plain(document).items() if key != SEAL}
    return {**body, SEAL: sealed(body)[1]}


def sealed(document: Mapping[str, Json]) -> tuple[bytes, str]:
    """Spell a document of plain JSON values with its seal.

    Returns:
        The canonical bytes of `seal(document)`, and the seal.

    >>> sealed({"b": 1, "z": None})[0][:20]
    b'{"b":1,"sha256":"e7b'
    """
    around = around_seal(document)
    found = hashlib.sha256(_joined(*around)).hexdigest()
    return _joined(around[0], b'"%s":"%s"' % (SEAL.encode(), found.encode()), around[1]), found


def around_seal(document: Mapping[str, Json]) -> tuple[bytes, bytes]:
    """Spell the members of a plain document that come before its seal, and those after it."""
    before = {key: value for key, value in document.items() if key < SEAL}
    after = {key: value for key, value in document.items() if key > SEAL}
    return _dump(before)[1:-1], _dump(after)[1:-1]


def parse(data: bytes) -> dict[str, Json]:
    """Read one JSON object.

    Raises:
        ValueError: the bytes are not a JSON object, hold NaN or a doubled key, or nest too deeply.
    """
    return read_object(
        data.decode("ascii"),
        parse_float=_finite,
        parse_constant=_no_constant,
        object_pairs_hook=_no_doubles,
    )


def unseal(data: bytes) -> dict[str, Json]:
    """Read a sealed document and check that no byte of it has changed.

    Raises:
        ValueError: the bytes are not canonical JSON, or the seal does not fit.
    """
    document = parse(data)
    expected, fitting = sealed(document)
    if expected != data:
        if _dump(document) != data:
            raise ValueError(_OTHER_FORM)
        raise ValueError(_OTHER_SEAL.format(document.get(SEAL), fitting))
    return document


def unseal_head(data: bytes, last: str) -> tuple[dict[str, Json], int]:
    """Read a sealed document up to its last member, a list of objects without lists of objects.

    The list is neither parsed nor copied; that it is in canonical form is for the caller to see.

    Args:
        data: the document.
        last: key of the list; members sort before and after the seal, and all before this one.

    Returns:
        The other members, and where in `data` the first element of the list begins.

    Raises:
        ValueError: the bytes before the list are not canonical JSON, or the seal does not fit.
    """
    opening = b',"%s":[' % last.encode()
    cut = data.rfind(opening)
    if cut < 0:
        raise ValueError(f"it has no {last}")
    document = parse(data[:cut] + b"}")
    before, after = around_seal(document)
    lead = b"{" + before + b","
    given = b"%s:%s," % (_dump(SEAL), _dump(document.get(SEAL)))
    if lead + given + after != data[:cut]:
        raise ValueError(_OTHER_FORM)
    digest = hashlib.sha256(lead)
    digest.update(memoryview(data)[len(lead) + len(given) :])
    if document[SEAL] != digest.hexdigest():
        raise ValueError(_OTHER_SEAL.format(document[SEAL], digest.hexdigest()))
    return document, cut + len(opening)


def _joined(*members: bytes) -> bytes:
    """Join members, in order, to an object."""
    return b"{" + b",".join(filter(None, members)) + b"}"


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def _no_doubles(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    document = dict(pairs)
    if len(document) != len(pairs):
        raise ValueError("a key is given twice")
    return document
