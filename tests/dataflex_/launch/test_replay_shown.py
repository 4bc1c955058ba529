"""The options of `gradstore replay`, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.launch.replay_shown import Shown, as_json, choices, parse_rows
from gradstore.errors import BadInput
from gradstore.replay.table import ReplayTable, Target


@pytest.mark.parametrize(
    ("text", "rows"),
    [("", None), ("7", [7]), ("0,3,10-12", [0, 3, 10, 11, 12]), ("2,1-3", [2, 1, 3])],
)
def test_rows_are_positions_and_ranges(text: str, rows: list[int] | None) -> None:
    assert parse_rows(text) == rows


@pytest.mark.parametrize("text", ["a", "1,,2", "-3", "4-", "1.5"])
def test_rows_that_are_no_positions_are_refused(text: str) -> None:
    with pytest.raises(BadInput, match="give positions such as 0,3,10-19"):
        Shown(rows=text)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"targets": "all"}, "--targets is 'all'; give sets or rows"),
        ({"hours": 0.0}, "--hours is 0.0"),
        ({"memory": -1.0}, "--memory is -1.0"),
        ({"segment": 0}, "--segment is 0"),
    ],
)
def test_choices_that_cannot_be_are_named(changed: dict[str, Any], named: str) -> None:
    given = {"targets": "sets", "float32": False, "segment": None, "hours": 1.0, "memory": 8.0}
    with pytest.raises(BadInput, match=named):
        choices(**{**given, **changed})


def test_a_file_of_no_known_format_is_refused_before_anything_is_computed() -> None:
    with pytest.raises(BadInput, match=r"replay.txt.*\.parquet"):
        Shown(output=Path("replay.txt"))


def test_hours_and_gib_become_limits() -> None:
    chosen = choices("rows", True, 3, 0.5, 2.0)
    assert (chosen.targets, chosen.float64, chosen.segment) == ("rows", False, 3)
    assert (chosen.limits.seconds, chosen.limits.state_bytes) == (1800.0, 2 << 30)


def test_json_has_the_scores_of_each_target() -> None:
    table = ReplayTable(
        (Target("a"), Target("b", 1)), np.array([[1.0, -2.0], [0.0, 4.0]]), np.array([1, 2]),
        np.zeros((2, 16), np.uint8), np.array([3.0, 2.0]), np.array([2.0, 1.0]), 5,
    )  # fmt: skip
    assert as_json(table, [1]) == {
        "steps": 5,
        "rows": [1],
        "times": [2],
        "targets": [
            {"target": "a", "row": None, "before": 3.0, "after": 2.0, "scores": [2.0]},
            {"target": "b", "row": 1, "before": 2.0, "after": 1.0, "scores": [-4.0]},
        ],
    }
