"""JSON from outside: parsed as usual, refused with words where it nests too deeply."""

from __future__ import annotations

import json

import pytest

from gradstore.format import canonical
from gradstore.format.foreign import MOST_NESTED, read_json


def test_json_is_what_the_parser_of_python_makes_of_it() -> None:
    text = '{"a": [1, 2.5, {"b": null}], "c": "\\u00e9"}'
    assert read_json(text) == read_json(text.encode()) == json.loads(text)
    assert read_json("[0.5]", parse_float=str) == ["0.5"]


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}")])
def test_the_deepest_document_is_read_and_a_deeper_one_refused(opened: str, closed: str) -> None:
    assert read_json(opened * MOST_NESTED + "1" + closed * MOST_NESTED)
    for depth in (MOST_NESTED + 1, 50_000):
        with pytest.raises(ValueError, match="nests more than 100"):
            read_json(opened * depth + "1" + closed * depth)
    with pytest.raises(ValueError, match="nests more than 100"):
        read_json(opened * 50_000)


@pytest.mark.parametrize("depth", [200, 500, 50_000])
def test_a_document_of_a_store_is_refused_as_one(depth: int) -> None:
    with pytest.raises(ValueError, match="nests more than 100"):
        canonical.unseal(b'{"a":' + b"[" * depth + b"]" * depth + b"}")
