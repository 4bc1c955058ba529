"""The table of a replay."""

from __future__ import annotations

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.replay.table import ReplayTable, Target

TABLE = ReplayTable(
    targets=(Target("math"), Target("code", 7)),
    derivatives=np.array([[0.5, -2.0, 0.0], [1.0, 3.0, 0.0]]),
    times=np.array([1, 2, 0]),
    row_hashes=np.arange(48, dtype=np.uint8).reshape(3, 16),
    before=np.array([2.0, 3.0]),
    after=np.array([1.0, 2.5]),
    steps=4,
)


def test_a_line_is_one_target_and_one_row_and_helping_rows_score_above_zero() -> None:
    found = TABLE.to_arrow().to_pydict()
    assert found["target"] == ["math"] * 3 + ["code"] * 3
    assert found["target_row"] == [None] * 3 + [7] * 3
    assert found["row"] == [0, 1, 2] * 2
    assert found["times"] == [1, 2, 0] * 2
    assert found["score"] == [-0.5, 2.0, 0.0, -1.0, -3.0, 0.0]
    assert found["row_hash"][1] == bytes(range(16, 32)).hex()
    assert not np.signbit(found["score"][2])  # never trained on: 0, not -0
    assert [str(target) for target in TABLE.targets] == ["math", "code[7]"]


def test_some_rows_are_listed_in_the_order_asked_for() -> None:
    found = TABLE.to_arrow([2, 0]).to_pydict()
    assert found["row"] == [2, 0, 2, 0]
    assert found["score"] == [0.0, -0.5, 0.0, -1.0]


@pytest.mark.parametrize("row", [3, -1])
def test_a_row_that_there_is_not_is_named(row: int) -> None:
    with pytest.raises(BadInput, match=f"row {row} is not one of the 3 training rows"):
        TABLE.to_arrow([0, row])
