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
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    )
    return text.encode("ascii")


def sha256_json(value: object) -> str:
    """Compute the sha256, in hex, of the canonical form of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def seal(document: Mapping[str, object]) -> dict[str, Json]:
    """Return `document` with the sha256 of its other fields added as `sha256`."""
    body = {key: value for key, value in plain(document).items() if key != SEAL}
    return {**body, SEAL: _seal_of(_members(body))}


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
    members = _members(document)
    if _joined(members) != data:
        raise ValueError("not in canonical form")
    found, expected = document.get(SEAL), _seal_of(members)
    if found != expected:
        raise ValueError(f"its seal is {found}, the sha256 of its content {expected}")
    return document


def _members(document: Mapping[str, Json]) -> dict[str, bytes]:
    """Serialize each member of a plain document: once, for the object with its seal and without."""
    return {key: _dump(key) + b":" + _dump(document[key]) for key in sorted(document)}


def _joined(members: Mapping[str, bytes]) -> bytes:
    """Join members, in order, to an object."""
    return b"{" + b",".join(members.values()) + b"}"


def _seal_of(members: Mapping[str, bytes]) -> str:
    body = {key: text for key, text in members.items() if key != SEAL}
    return hashlib.sha256(_joined(body)).hexdigest()


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
