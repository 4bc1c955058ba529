"""Frames of a run: what it selected, as it wrote it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import dataflex
from dataflex.run.log import RunLog
from gradstore.errors import BadInput


def test_selections_are_one_line_per_update_and_row(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.selection(20, np.array([5, 2]), None, {})
    log.selection(9, np.array([3, 1, 7]), np.array([0.5, 0.25, np.nan]), {})
    frame = dataflex.selections_frame(tmp_path)
    assert list(frame.columns) == ["step", "rank", "row", "score"]
    assert frame["step"].tolist() == [9, 9, 9, 20, 20]
    assert frame["rank"].tolist() == [1, 2, 3, 1, 2]
    assert frame["row"].tolist() == [3, 1, 7, 5, 2]
    assert frame["score"].fillna(-1).tolist() == [0.5, 0.25, -1, -1, -1]


def test_a_folder_without_a_selection_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no selection below"):
        dataflex.selections_frame(tmp_path)
