"""Kinds of rows: the first column that names them, whatever else the files hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset

from dataflex.data.kinds import MOST, NONE, kinds_of
from dataflex.data.rows import SOURCE_ROW, RawRows


def raw(**files: dict[str, list[Any]]) -> RawRows:
    """Two files of four rows each, with their columns; training took rows 3 and 0 of each."""
    tables = {name: Dataset.from_dict({SOURCE_ROW: [0, 1, 2, 3], **columns})
              for name, columns in files.items()}  # fmt: skip
    return RawRows([(name, row) for name in files for row in (3, 0)], tables)


def test_the_kind_is_that_of_the_source_row() -> None:
    found = kinds_of(
        raw(a={"category": ["x", "y", "y", "z"]}, b={"category": ["z", "y", "y", "x"]})
    )
    assert found is not None
    assert (found.column, found.names) == ("category", ("x", "z"))
    assert [found.names[i] for i in found.of_row] == ["z", "x", "x", "z"]
    assert found.count(np.array([0, 3, 1])) == {"z": 2, "x": 1}


def test_a_row_without_a_kind_is_counted_as_that() -> None:
    found = kinds_of(raw(a={"kind": ["x", None, None, ""]}, b={"other": ["z"] * 4}))
    assert found is not None
    assert found.count(np.arange(4)) == {NONE: 3, "x": 1}


def test_a_column_that_tells_nothing_apart_is_passed_over() -> None:
    same, numbers = ["x"] * 4, [1, 2, 3, 4]
    found = kinds_of(raw(a={"kind": same, "category": numbers, "task": ["s", "t", "t", "u"]}))
    assert found is not None
    assert found.column == "task"
    assert kinds_of(raw(a={"kind": same, "category": numbers})) is None


def test_a_column_of_names_is_none_of_kinds() -> None:
    rows = list(range(MOST + 1))
    table = Dataset.from_dict({SOURCE_ROW: rows, "topic": [str(row) for row in rows]})
    assert kinds_of(RawRows([("a", row) for row in rows], {"a": table})) is None


def test_rows_of_unknown_origin_have_no_kinds() -> None:
    assert kinds_of(None) is None
