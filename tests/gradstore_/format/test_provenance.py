"""Provenance: one spelling, all differences, a way out; the hash of a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.format import provenance as p
from gradstore.format.canonical import canonical_json, parse, plain, seal, unseal
from gradstore.format.records import RowSet, row_hash

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_a_sealed_document_reads_back_and_has_one_spelling(document: dict[str, Any]) -> None:
    sealed = seal(document)
    data = canonical_json(sealed)
    assert unseal(data) == sealed
    assert canonical_json(dict(reversed(sealed.items()))) == data


@given(st.data())
def test_any_changed_byte_of_a_sealed_document_is_seen(data: st.DataObject) -> None:
    document = canonical_json(seal({"a": [1, 2.5, None], "b": {"c": "text", "d": True}}))
    at = data.draw(st.integers(0, len(document) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = bytearray(document)
    damaged[at] ^= flip
    with pytest.raises(ValueError, match=r"."):
        unseal(bytes(damaged))


@pytest.mark.parametrize(
    "text", ["[" * 5000, '{"a":1e999}', '{"a":NaN}', '{"a":1,"a":1}', "[]", "9" * 5000, "\xff"]
)
def test_hostile_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse(text.encode("latin-1"))


def test_numpy_and_tuples_become_plain_and_the_rest_is_refused() -> None:
    assert plain({"a": (np.int64(1), np.float32(0.5), np.array([True]))}) == {"a": [1, 0.5, [True]]}
    with pytest.raises(BadInput, match=r"value\.a is nan"):
        plain({"a": float("nan")})
    with pytest.raises(BadInput, match=r"value\[0\] is of type object"):
        plain([object()])
    with pytest.raises(BadInput, match="keys must be strings"):
        plain({1: 2})


def test_all_differences_are_listed_by_dotted_name() -> None:
    stored = {"a": {"b": 1, "c": [1, 2]}, "gone": 1, "same": "x", "kind": 1}
    current = {"a": {"b": 2, "c": [1, 3, 4]}, "new": None, "same": "x", "kind": True}
    assert [d.field for d in p.compare(stored, current)] == [
        "a.b",
        "a.c[1]",
        "a.c[2]",
        "gone",
        "kind",
        "new",
    ]
    assert p.compare(stored, stored) == []


def test_the_refusal_reads_as_documented() -> None:
    differences = p.compare({"projection": {"seed": 0}}, {"projection": {"seed": 1}})
    error = p.refuse("runs/a/gradstore", differences)
    assert str(error) == (
        'projection.seed differs: store "runs/a/gradstore" has 0, this run has 1. Their features '
        "can't be compared. Choose another store with gradstore=PATH, or set "
        "component_params.seed=0."
    )
    assert error.exit_code == 3


def test_a_refusal_names_a_setting_only_if_settings_are_enough() -> None:
    stored, current = {"cutoff_len": 512, "base": "a"}, {"cutoff_len": 256, "base": "b"}
    assert "or set" not in str(p.refuse("s", p.compare(stored, current)))
    own = p.refuse("s", p.compare(stored, current, {"base": "model_name_or_path"}))
    assert 'or set model_name_or_path="a" cutoff_len=512' in str(own)


def test_many_differences_are_counted_in_the_message_and_kept_in_full() -> None:
    error = p.refuse("s", p.compare({"x": list(range(50))}, {"x": list(range(1, 51))}))
    assert len(error.differences) == 50
    assert "... and 30 more fields" in str(error)


def test_a_canary_of_another_length_or_kind_differs() -> None:
    for other in ([1.0], ["a", "b"], None, []):
        assert p.compare({"canary": [1.0, 2.0]}, {"canary": other})
    assert not p.compare({"canary": [1.0, 2.0]}, {"canary": [1.0, 2.0 + 1e-9]})
    (other,) = p.compare({"canary": [1.0, 2.0]}, {"canary": [1.0, 2.1]})
    assert "another random stream" in other.line("s")


def test_a_row_hash_is_pinned_and_separates_ids_from_labels() -> None:
    assert row_hash([1, 2], [-100, 2]).hex() == "5ff39fdccdf0541ad4e332799367a40c"
    assert row_hash([1], [2, 3]) != row_hash([1, 2], [3])
    rows = RowSet.from_hashes([row_hash([1], [1])] * 3 + [row_hash([2], [2])])
    assert rows.duplicates == 2
