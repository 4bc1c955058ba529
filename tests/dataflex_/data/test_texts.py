"""The text of rows for people: their own messages, or else their decoded tokens."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from dataflex.data.rows import IGNORED, SOURCE_ROW, Rows
from dataflex.data.texts import RowsText
from gradstore.errors import BadInput


class Letters:
    """A tokenizer whose token 0 is special, and whose others are letters."""

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(96 + i) for i in ids if i)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


MESSAGES = {
    "one": Dataset.from_dict(
        {
            "_prompt": [[user("a?")], [user("b?")], [user("c?")]],
            "_response": [[{"role": "assistant", "content": x}] for x in ("a!", "b!", "c!")],
            "_system": ["", "", ""],
            "_tools": ["", "", ""],
            SOURCE_ROW: [0, 1, 5],
        }
    ),
    "two": Dataset.from_dict(
        {
            "_prompt": [[user("hi"), {"role": "assistant", "content": "yes"}, user("more")]],
            "_response": [[{"role": "assistant", "content": "done"}]],
            "_system": ["be brief"],
            "_tools": ["[]"],
            SOURCE_ROW: [0],
        }
    ),
}


FILES = {
    "one": Dataset.from_dict({"q": ["a?", "b?", "c?"], "n": [1, 2, None], SOURCE_ROW: [0, 1, 5]}),
    "two": Dataset.from_dict({"chat": [[{"from": "human"}]], "raw": [b"x"], SOURCE_ROW: [0]}),
}


def rows(sources: Any) -> Rows:
    n = 4
    dataset = Dataset.from_dict(
        {"input_ids": [[0, 1, 2, 0]] * n, "labels": [[IGNORED, IGNORED, 2, 0]] * n}
    )
    return Rows("train", dataset, sources)


def test_a_row_of_a_file_is_shown_as_its_file_has_it() -> None:
    sources = (("one", 5), ("two", 0), ("one", 0), ("one", 1))
    found = RowsText(rows(sources), FILES, MESSAGES, Letters())
    assert [tuple(text) for text in found] == [
        ("c?", "c!", 4, '{"q": "c?", "n": null}'),
        ("system: be brief\ntools: []\nuser: hi\nassistant: yes\nuser: more", "done", 4, None),
        ("a?", "a!", 4, '{"q": "a?", "n": 1}'),
        ("b?", "b!", 4, '{"q": "b?", "n": 2}'),
    ]
    assert [text.prompt for text in found.read([3, 0, 3])] == ["b?", "c?", "b?"]


@pytest.mark.parametrize("sources", [None, (("elsewhere", 0),) * 4, (("one", 77),) * 4])
def test_a_row_of_unknown_origin_is_decoded_by_its_labels(sources: Any) -> None:
    found = RowsText(rows(sources), FILES, MESSAGES, Letters())
    assert found.read([2]) == [("a", "b", 4, None)]


def test_a_row_without_labels_is_all_response() -> None:
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]]})
    assert list(RowsText(Rows("train", dataset), {}, {}, Letters())) == [("", "abc", 3, None)]


def test_a_row_that_there_is_not_is_refused() -> None:
    with pytest.raises(BadInput, match="0 to 3"):
        RowsText(rows(None), {}, {}, Letters()).read([4])
