"""A document whose seal fits and whose values are of other types is refused, in every place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.format.canonical import canonical_json, parse, seal
from gradstore.format.commits import Commit
from gradstore.format.forgotten import Receipt, Request
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.provenance import compare, provenance_bytes, read_provenance
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.format.text_table import TextPart, TextTable
from gradstore.format.unit_records import FileSeal, UnitRecord

A, B, C = "a" * 64, "b" * 64, "c" * 64
Place = tuple[str | int, ...]
ROWS = RowSet(
    np.random.default_rng(0).integers(0, 256, (11, 16), np.uint8),
    [(("poems", "sums")[i % 2], 10 * i) for i in range(11)],
)
RECORD = UnitRecord(
    "train/1",
    UnitRange(1, 4, 8),
    A,
    {"status/c/1": FileSeal(8, 7, B), "features/c/1/0": FileSeal(20, 5, C)},
    {"ok": 3, "masked": 1},
)


def spelled(document: dict[str, Any]) -> bytes:
    return canonical_json(seal(document))


def plan() -> Plan:
    curvature = {"kind": "ekfac", "damping": 0.1, "rows": 4, "sample": A, "sha256": B}
    record = GenerationRecord(
        name="train/1", role="train", step=1, run_id="run", adapter_hash="aa", effective_seed=0,
        projection={"d": 4}, feature="sgd", optimizer_hash="bb", learning_rate=0.5,
        feature_options={"curvature": curvature, "share": {"rows": 1}},
    )  # fmt: skip
    return Plan("train/1", "gradient", C, record, ROWS, 4, "1bit", 4, losses=True)


def provenance(data: bytes) -> object:
    fields, sha = read_provenance(data, "gradient")
    compare(fields, {"canary": [0.5, 1.0], "dim": 4, "names": ["a"]})
    return sha


DOCUMENTS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "unit": (spelled(RECORD.to_dict()), UnitRecord.from_bytes),
    "generation": (
        Commit(2, "uuid", A, "generation", ("train/1",), B, (C, C), 9).to_bytes(),
        Commit.from_bytes,
    ),
    "texts": (
        Commit(1, "u", None, "texts", (), texts=(TextTable(A, (TextPart(3, 9, B),)),)).to_bytes(),
        Commit.from_bytes,
    ),
    "retire": (
        Commit(3, "uuid", A, "retire", ("train/1",), texts=(TextTable(A),)).to_bytes(),
        Commit.from_bytes,
    ),
    "request": (Request(1, "u", "now", "1" * 32, ("2" * 32,), 4, A).to_bytes(), Request.from_bytes),
    "receipt": (
        Receipt(1, "u", A, "now", "then", B, C, {"train/1.2": 3}, ("train/1",), (A,), 9).to_bytes(),
        Receipt.from_bytes,
    ),
    "plan": (plan().to_bytes(), Plan.from_bytes),
    "provenance": (
        provenance_bytes("gradient", {"canary": [0.5, 1.0], "dim": 4, "names": ["a"]}),
        provenance,
    ),
}

#: What a document may say in other ways: where it has no type of its own, or none at all will do.
FREE = {
    "plan": (
        ("record", "projection", "d"), ("record", "feature_options"), ("record", "learning_rate"),
    ),
    "provenance": (("fields", "canary"), ("fields", "dim"), ("fields", "names")),
}  # fmt: skip
OR_NONE = {("parent",), ("commit_before",), ("commit_after",), ("record", "optimizer_hash")}

OTHERS = [None, True, False, 0, 1, -1, 2**70, 10**400, 0.5, 1.0, "", "x", "1", [], [1], ["x"],
          {}, {"a": 1}, {"sha256": 1}]  # fmt: skip
values = st.sampled_from(OTHERS) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["sha256", "rows", "a", ""]), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every place in a document, but for the seal."""
    if not isinstance(value, dict | list):
        return
    for key, below in value.items() if isinstance(value, dict) else enumerate(value):
        if (*at, key) != ("sha256",):
            yield (*at, key)
            yield from places(below, (*at, key))


def at_place(document: Any, place: Place) -> Any:
    for key in place:
        document = document[key]
    return document


def changed(document: dict[str, Any], place: Place, value: object) -> dict[str, Any]:
    found = deepcopy(document)
    at_place(found, place[:-1])[place[-1]] = value
    return found


def is_of_type(value: object, other: object) -> bool:
    return type(value) is type(other)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_value_of_another_type_is_refused_in_every_place_of_every_document(kind: str) -> None:
    data, read = DOCUMENTS[kind]
    document = parse(data)
    read(spelled(document))
    taken = []
    for place in places(document):
        for value in OTHERS:
            hostile = changed(document, place, value)
            try:
                read(spelled(hostile))
            except (ValueError, BadInput):
                continue
            free = any(place[: len(each)] == each for each in FREE.get(kind, ()))
            fits = is_of_type(value, at_place(document, place))
            if not (free or fits or (value is None and place in OR_NONE)):
                taken.append((place, value))
    assert taken == []


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_stands_in_a_sealed_document_it_is_read_or_refused(data: st.DataObject) -> None:
    original, read = DOCUMENTS[data.draw(st.sampled_from(sorted(DOCUMENTS)))]
    document = parse(original)
    place = data.draw(st.sampled_from(list(places(document))))
    hostile = changed(document, place, data.draw(values))
    try:
        found = read(spelled(hostile))
    except (ValueError, BadInput):
        return
    if isinstance(found, tuple) and isinstance(found[0], Plan):
        assert found[0].to_bytes() == spelled(hostile)
        assert found[0].identity()
        assert np.all(found[0].rows.forgotten == found[0].rows.forgotten)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        ({"ok": "4"}, "rows of status ok is '4', no whole number"),
        ({"ok": 5, "masked": -1}, "rows of status masked is -1"),
        ({"ok": 3, "odd": 1}, "'odd' is no status"),
        ([4], "status is a list, no mapping"),
    ],
)
def test_a_record_with_counts_that_are_none_is_refused_with_what_is_wrong(
    status: object, said: str
) -> None:
    document = {**RECORD.to_dict(), "status": status}
    with pytest.raises(ValueError, match=said):
        UnitRecord.from_bytes(spelled(document))
