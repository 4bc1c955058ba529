"""Plans, unit records and commits: their bytes, and that no others are taken for them."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.format.canonical import canonical_json, sealed
from gradstore.format.commits import Commit
from gradstore.format.plans import Plan, UnitRange, seal_of_plan
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.format.sources import Sources
from gradstore.format.unit_records import FileSeal, UnitRecord

#: What a plan's bytes may be taken for when they are not a plan's.
Refused = (ValueError, BadInput)


def spelled(document: dict[str, Any]) -> bytes:
    """A sealed document, by Python's own means: what every release wrote."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    seal = hashlib.sha256(text_of(body)).hexdigest()
    return text_of({**body, "sha256": seal})


def text_of(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def document_of(plan: Plan) -> dict[str, Any]:
    """A plan as every release wrote it, unit by unit in lists of lists."""
    rows = plan.rows
    names = None if rows.sources is None else sorted({name for name, _ in rows.sources})
    units = []
    for start in range(0, len(rows), plan.unit_rows):
        stop = min(start + plan.unit_rows, len(rows))
        unit: dict[str, Any] = {"rows": [start, stop]}
        unit["row_hash"] = rows.hashes[start:stop].tobytes().hex()
        if rows.sources is not None and names is not None:
            unit["sources"] = [[names.index(name), at] for name, at in rows.sources[start:stop]]
        units.append(unit)
    document = {
        "schema_version": plan.schema_version,
        "generation": plan.name,
        "space": plan.space,
        "provenance_sha256": plan.provenance_sha256,
        "record": plan.record.to_dict(),
        "dim": plan.dim,
        "dtype": plan.dtype,
        "unit_rows": plan.unit_rows,
        "row_count": len(rows),
        "source_names": names,
        "units": units,
    }
    return {**document, "losses": True} if plan.losses else document


def plan_of(rows: RowSet, unit_rows: int, *, losses: bool = False, **options: Any) -> Plan:
    record = GenerationRecord(
        name="train/1",
        role="train",
        step=1,
        run_id="run",
        adapter_hash="aa",
        effective_seed=0,
        projection={"d": 4, "seed": 0},
        feature="sgd",
        feature_options=options,
    )
    dtype = "float16" if len(rows) % 2 else "1bit"
    return Plan("train/1", "gradient", "0" * 64, record, rows, 4, dtype, unit_rows, losses)


names = st.text(max_size=6)
indices = st.integers(-(2**63), 2**63 - 1)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    n = draw(st.integers(1, 40))
    hashes = np.frombuffer(draw(st.binary(min_size=16 * n, max_size=16 * n)), np.uint8)
    pairs = st.lists(st.tuples(names, indices), min_size=n, max_size=n)
    rows = RowSet(hashes.reshape(n, 16), draw(st.none() | pairs))
    gone = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    rows = rows.without(gone) if draw(st.booleans()) else rows
    # Nested members of the names that a reader looks for.
    options = {"units": [{"row_hash": "}"}], "t": draw(names), "sha256": "0" * 64}
    return plan_of(rows, draw(st.integers(1, 45)), losses=draw(st.booleans()), **options)


@given(plans())
@settings(deadline=None)
def test_a_plan_has_the_bytes_of_every_release_and_is_read_from_them(plan: Plan) -> None:
    data = plan.to_bytes()
    assert data == spelled(document_of(plan))
    found, seal = Plan.from_bytes(data)
    assert seal == plan.sha256 == found.sha256 == seal_of_plan(data) == json.loads(data)["sha256"]
    assert np.array_equal(found.rows.hashes, plan.rows.hashes)
    assert found.rows.sources == plan.rows.sources
    assert replace(found, rows=plan.rows) == plan
    assert found.to_bytes() == data


SMALL = RowSet(np.arange(16, dtype=np.uint8).reshape(1, 16))
MANY = RowSet(
    np.random.default_rng(0).integers(0, 256, (11, 16), np.uint8),
    [(("poems", "sums")[i % 2], 10 * i) for i in range(11)],
)


@pytest.mark.parametrize("rows", [SMALL, MANY], ids=["one unit", "three units"])
def test_every_flipped_bit_of_a_plan_is_noticed(rows: RowSet) -> None:
    data = plan_of(rows, 4).to_bytes()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(ValueError):  # noqa: PT011 - whatever is said of it
                Plan.from_bytes(bytes(flipped))
            with pytest.raises(ValueError):  # noqa: PT011
                seal_of_plan(bytes(flipped))


def resealed(data: bytes, old: bytes, new: bytes, count: int = 1) -> bytes:
    """Replaces text and then the seal, by one that fits the bytes as they are."""
    assert old in data
    seal = b'"sha256":"%s",' % json.loads(data)["sha256"].encode()
    head, tail = data.replace(old, new, count).split(seal)
    return head + b'"sha256":"%s",' % hashlib.sha256(head + tail).hexdigest().encode() + tail


FIRST = MANY.hashes[0].tobytes().hex().encode()
OTHER_FORMS = {
    "upper case": (FIRST, FIRST.upper()),
    "spaces in a hash": (FIRST, FIRST[:2] + b" " + FIRST[2:]),
    "a space": (b'"rows":[0,4]', b'"rows":[0, 4]'),
    "a space between units": (b"},{", b"}, {"),
    "a space at the end": (b"]]}]}", b"]]}]} "),
    "a space in the head": (b'"dim":4', b'"dim": 4'),
    "a number with a zero before it": (b"[[0,0]", b"[[0,00]"),
    "minus zero": (b"[[0,0]", b"[[0,-0]"),
    "a fraction": (b"[1,10]", b"[1,10.0]"),
    "an exponent": (b"[1,10]", b"[1,1e1]"),
    "a large number": (b"[1,10]", b"[1,18446744073709551626]"),
    "infinity": (b"[1,10]", b"[1,1e999]"),
    "not a number": (b"[1,10]", b"[1,NaN]"),
    "text": (b"[1,10]", b'[1,"10"]'),
    "nothing": (b"[1,10]", b"[1,null]"),
    "another name": (b"[1,10]", b"[2,10]"),
    "a name before the first": (b"[1,10]", b"[-1,10]"),
    "another grouping": (b"[0,0],[1,10]", b"[0,0,1],[10]"),
    "one source for all": (b"[[0,0],[1,10],[0,20],[1,30]]", b"[[0,0]]"),
    "a doubled key in the head": (b'"dim":4', b'"dim":4,"dim":4'),
    "a doubled key in a unit": (b'"rows":[0,4]', b'"rows":[0,4],"rows":[0,4]'),
    "an unknown key in a unit": (
        b'{"row_hash":"%s' % FIRST,
        b'{"a":1,"row_hash":"%s' % FIRST,
    ),
    "an unknown key": (b'"dim":4', b'"dim":4,"dimension":4'),
    "nested too deep": (b'"dim":4', b'"dim":' + b"[" * 50_000 + b"]" * 50_000),
    "nested too deep in a unit": (b"[1,10]", b"[1," + b'{"a":' * 50_000 + b"10]"),
    "a hash that is short": (FIRST, FIRST[:-2]),
    "a row more": (b'"row_count":11', b'"row_count":12'),
    "a row less": (b'"row_count":11', b'"row_count":10'),
    "very many rows": (b'"row_count":11', b'"row_count":%d' % 2**50),
    "rows before the first": (b'"row_count":11', b'"row_count":-1'),
    "units of none": (b'"unit_rows":4', b'"unit_rows":0'),
    "units of fewer": (b'"unit_rows":4', b'"unit_rows":-4'),
    "no list": (b'"units":[', b'"units":{['),
}


@pytest.mark.parametrize(("old", "new"), OTHER_FORMS.values(), ids=list(OTHER_FORMS))
def test_no_other_form_of_a_plan_is_taken_for_it(old: bytes, new: bytes) -> None:
    data = plan_of(MANY, 4).to_bytes()
    assert resealed(data, old, old) == data
    with pytest.raises(Refused):
        Plan.from_bytes(resealed(data, old, new))


@pytest.mark.parametrize("rows", [[0, 4], [3, 8], [4, 7], [8, 4]])
def test_units_that_are_not_those_of_the_plan_are_told(rows: list[int]) -> None:
    document = document_of(plan_of(MANY, 4))
    document["units"][1]["rows"] = rows
    with pytest.raises(BadInput, match="exactly once"):
        Plan.from_bytes(spelled(document))


@pytest.mark.parametrize(("sourced", "most"), [(False, 24), (True, 40)])
def test_a_plan_is_written_and_read_in_little_more_memory_than_its_rows(
    sourced: bool, most: int
) -> None:
    n = 50_000
    hashes = np.random.default_rng(0).integers(0, 256, (n, 16), np.uint8)
    rows = RowSet(hashes, [(("poems", "sums")[i % 2], i) for i in range(n)] if sourced else None)
    data = plan_of(rows, 256).to_bytes()
    tracemalloc.start()
    try:
        written = plan_of(rows, 256).to_bytes()
        assert tracemalloc.get_traced_memory()[1] < 1.3 * len(data) + 10 * n
        assert written == data
        del written
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        assert Plan.from_bytes(data)[0].rows.sources == rows.sources
        assert tracemalloc.get_traced_memory()[1] - before < most * n
    finally:
        tracemalloc.stop()


RECORD = UnitRecord(
    "train/1",
    UnitRange(1, 4, 8),
    "0" * 64,
    {"status/c/1": FileSeal(8, 7, "1" * 64), "features/c/1/0": FileSeal(20, 5, "2" * 64)},
    {"ok": 3, "masked": 1},
)


def test_a_unit_record_is_read_from_its_bytes_and_every_flipped_bit_noticed() -> None:
    data, seal = sealed(RECORD.to_dict())
    assert data == spelled(json.loads(data)) == canonical_json(RECORD.to_dict())
    assert UnitRecord.from_bytes(data) == (RECORD, seal)
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(ValueError):  # noqa: PT011 - whatever is said of it
                UnitRecord.from_bytes(bytes(flipped))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"unit":1', b'"unit": 1'),
        (b'"masked":1', b'"masked":1,"masked":1'),
        (b'"masked":1', b'"masked":NaN'),
        (b'"masked":1', b'"masked":1e0'),
        (b'"bytes":20', b'"bytes":20,"size":20'),
        (b'"schema_version":1', b'"schema_version":9'),
        (b'"masked":1', b'"masked":' + b"[" * 50_000 + b"]" * 50_000),
    ],
)
def test_no_other_form_of_a_unit_record_is_taken_for_it(old: bytes, new: bytes) -> None:
    data = sealed(RECORD.to_dict())[0]
    with pytest.raises(ValueError):  # noqa: PT011 - whatever is said of it
        UnitRecord.from_bytes(resealed(data, old, new))


def test_a_commit_is_read_from_its_bytes_and_every_flipped_bit_noticed() -> None:
    commit = Commit(2, "uuid", "3" * 64, "generation", ("train/1",), "4" * 64, ("5" * 64,) * 3, 9)
    data = commit.to_bytes()
    assert data == spelled(json.loads(data))
    found = Commit.from_bytes(data)
    assert found == commit
    assert found.sha256 == json.loads(data)["sha256"]
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        with pytest.raises(ValueError):  # noqa: PT011 - whatever is said of it
            Commit.from_bytes(bytes(flipped))


# ---- sources ---------------------------------------------------------------------------------


@given(st.lists(st.tuples(names, indices), min_size=1, max_size=20))
def test_sources_are_read_as_the_pairs_they_were_made_of(pairs: list[tuple[str, int]]) -> None:
    sources = Sources.of(pairs)
    assert list(sources) == pairs == [sources[i] for i in range(len(pairs))]
    assert sources == tuple(pairs) == sources[:]
    assert hash(sources) == hash(tuple(pairs))
    assert sources[-1] == pairs[-1]
    assert sources[1:3] == tuple(pairs[1:3])
    assert list(reversed(sources)) == pairs[::-1]
    assert all(type(at) is int for _, at in sources)
    assert sources != [*pairs, ("", 0)]
    assert sources != pairs[:-1]
    assert sources != 5
    assert Sources.of(sources) is sources
    with pytest.raises(IndexError):
        sources[len(pairs)]


@pytest.mark.parametrize(
    "pairs",
    [[("a", 0), ("b",)], [("a", 0), ("b", 1.5)], [("a", 0), (1, 1)], [("a", 0), ("b", 2**63)],
     [(1, 0), (2, 1)], [("a", 0), None]],
)  # fmt: skip
def test_what_are_no_sources_is_told(pairs: Any) -> None:
    with pytest.raises(BadInput, match="sources are no pairs"):
        RowSet(MANY.hashes[:2], pairs)
