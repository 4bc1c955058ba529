"""Comparison of features by their provenance, and the error message for a mismatch.

A space's MUST-EQUAL fields are a mapping, kept once in `spaces/<space>/provenance.json`. Another
run's fields are compared with them leaf by leaf; every differing field is listed, with the way out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.canonical import Json, canonical_json, plain, seal, unseal
from gradstore.format.layout import SCHEMA_VERSION

CANARY = "canary"
#: Largest difference of two canaries, relative to the largest entry, that is only rounding.
CANARY_TOLERANCE = 1e-5

#: Field -> the YAML key that sets it, where there is one.
SETTING_KEYS: Mapping[str, str] = {
    "projection.method": "component_params.proj_method",
    "projection.seed": "component_params.seed",
    "projection.d": "component_params.proj_dim",
    "dim": "component_params.proj_dim",
    "cutoff": "cutoff_len",
    "cutoff_len": "cutoff_len",
    "template": "template",
    "chat_template": "template",
}

_SHOWN = 20
_ABSENT = object()


@dataclass(frozen=True)
class Difference:
    """One field in which a run differs from the store.

    Attributes:
        field: dotted name, list positions in brackets.
        stored: the store's value.
        current: this run's value.
        note: text in place of the two values, where they would not help.
        setting: YAML key that sets the field, "" if none is known.
    """

    field: str
    stored: object
    current: object
    note: str = ""
    setting: str = ""

    def line(self, store: str) -> str:
        """Format the difference as one sentence."""
        if self.note:
            return f"{self.field} differs: {self.note}"
        return (
            f'{self.field} differs: store "{store}" has {_show(self.stored)}, '
            f"this run has {_show(self.current)}"
        )


def compare(
    stored: Mapping[str, object],
    current: Mapping[str, object],
    setting_keys: Mapping[str, str] | None = None,
) -> list[Difference]:
    """List every field in which two provenances differ, in the order of the names.

    A field called `canary` is compared number by number with `CANARY_TOLERANCE`.

    Args:
        stored: the store's MUST-EQUAL fields.
        current: this run's.
        setting_keys: field -> YAML key, beside `SETTING_KEYS`.
    """
    keys = {**SETTING_KEYS, **(setting_keys or {})}
    return list(_walk("", plain(stored, "stored"), plain(current, "provenance"), keys))


def _walk(name: str, stored: Json, current: Json, keys: Mapping[str, str]) -> Iterator[Difference]:
    if name.rpartition(".")[2] == CANARY:
        note = _canary_note(stored, current)
        if note:
            yield Difference(name, stored, current, note)
    elif isinstance(stored, dict) and isinstance(current, dict):
        for key in sorted(stored.keys() | current.keys()):
            below = f"{name}.{key}" if name else key
            yield from _walk(below, stored.get(key, _ABSENT), current.get(key, _ABSENT), keys)
    elif isinstance(stored, list) and isinstance(current, list):
        for i in range(max(len(stored), len(current))):
            left, right = (side[i] if i < len(side) else _ABSENT for side in (stored, current))
            yield from _walk(f"{name}[{i}]", left, right, keys)
    elif type(stored) is not type(current) or stored != current:
        yield Difference(name, stored, current, setting=keys.get(name, ""))


def _canary_note(stored: Json, current: Json) -> str:
    both = isinstance(stored, list) and isinstance(current, list)
    if not both or len(stored) != len(current) or not stored:
        return "one of the two has no canary of the same length" if stored != current else ""
    try:
        size = max(abs(float(value)) for value in (*stored, *current)) or 1.0
        largest = max(abs(float(a) - float(b)) for a, b in zip(stored, current, strict=True))
    except (TypeError, ValueError, OverflowError):
        return "one of the two is not a list of numbers"
    if largest <= CANARY_TOLERANCE * size:
        return ""
    return (
        f"the projection of a fixed vector differs by up to {largest:.3g} "
        f"(tolerance {CANARY_TOLERANCE * size:.3g}): same seed, another random stream"
    )


def refuse(store: str, differences: Sequence[Difference], *, hint: str = "") -> ProvenanceMismatch:
    """Build the ProvenanceMismatch error that lists all differences and the possible fixes.

    Args:
        store: path of the store.
        differences: at least one.
        hint: another way out, as `gradstore_run=NAME`.
    """
    lines = [difference.line(store) for difference in differences]
    shown = lines[:_SHOWN]
    if len(lines) > _SHOWN:
        shown.append(f"... and {len(lines) - _SHOWN:,} more fields")
    ways = ["Choose another store with gradstore=PATH"]
    settings = {}
    for each in differences:
        if each.setting and each.stored is not _ABSENT:
            settings[each.setting] = f"{each.setting}={_show(each.stored)}"
    if settings and all(each.setting for each in differences):
        ways.append("or set " + " ".join(settings.values()))
    if hint:
        ways.append(f"or {hint}")
    text = f"{shown[0]}." if len(shown) == 1 else "\n  " + "\n  ".join(shown) + "\n"
    message = f"{text} Their features can't be compared. {', '.join(ways)}."
    return ProvenanceMismatch(message.lstrip(" "), lines)


def provenance_bytes(space: str, provenance: Mapping[str, object]) -> bytes:
    """Build the sealed `provenance.json` of a space."""
    body = {"schema_version": SCHEMA_VERSION, "space": space, "fields": provenance}
    return canonical_json(seal(body))


def read_provenance(data: bytes, space: str) -> tuple[dict[str, Json], str]:
    """Read the fields and the seal of a `provenance.json`.

    Raises:
        ValueError: the bytes are not that space's provenance.
    """
    document = unseal(data)
    if document.get("space") != space or not isinstance(document.get("fields"), dict):
        raise ValueError(f"not the provenance of space {space}")
    version = document.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise BadInput(
            f"provenance of schema {version}; this release reads "
            f"{SCHEMA_VERSION}: open it with the release that wrote it"
        )
    return document["fields"], document["sha256"]


def _show(value: object) -> str:
    if value is _ABSENT:
        return "nothing"
    text = canonical_json(value).decode()
    return text if len(text) <= 120 else f"{text[:117]}..."
