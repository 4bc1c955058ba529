"""Committed notebooks show what running them gives."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

CHECK = runpy.run_path(
    str(Path(__file__).resolve().parents[1] / ".ci" / "check_notebooks.py"), run_name="check"
)


def cell(source: str, count: int | None, *outputs: dict[str, Any]) -> dict[str, Any]:
    return {"cell_type": "code", "source": [source], "execution_count": count,
            "outputs": list(outputs)}  # fmt: skip


SHOWN = {"output_type": "stream", "name": "stdout", "text": ["2"]}
FAILED = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
WARNED = {"output_type": "stream", "name": "stderr", "text": ["a warning"]}
TEXT = {"cell_type": "markdown", "source": ["# Title"]}


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ([TEXT, cell("a = 1", 1), cell("a + 1", 2, SHOWN), cell("", None)], None),
        ([TEXT, cell("a = 1", 1, SHOWN), cell("a", None)], "cell 3 was not run"),
        ([cell("a = 1", 2, SHOWN), cell("a", 1)], "cell 1 was run as number 2, not 1"),
        ([cell("a", 1, FAILED)], "cell 1 ended with ValueError: no"),
        ([cell("a", 1, SHOWN, WARNED)], "cell 1 wrote to stderr: 'a warning'"),
        ([cell("a = 1", 1)], "no cell has an output"),
    ],
)
def test_a_notebook_is_committed_as_it_ran(
    cells: list[dict[str, Any]],
    fault: str | None,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert CHECK["main"]([str(path)]) == (fault is not None)
    assert (fault or "") in capfd.readouterr().out


def test_every_committed_notebook_is_sound(capfd: pytest.CaptureFixture[str]) -> None:
    assert CHECK["main"]([]) == 0, capfd.readouterr().out
