"""Committed notebooks show what running them gives."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = runpy.run_path(str(ROOT / ".ci" / "check_notebooks.py"), run_name="check")


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


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebooks' own module in a clone, where a script stands for Python."""
    found = importlib.util.spec_from_file_location(
        "shared", ROOT / "examples" / "notebooks" / "shared.py"
    )
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    here = tmp_path / "clone" / "examples" / "notebooks"
    here.mkdir(parents=True)
    program = tmp_path / "python"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    monkeypatch.setattr(module, "HERE", here)
    monkeypatch.setattr(sys, "executable", str(program))
    return module


#: Notes where it was called and how, and leaves what a run does, unless it is to fail.
PROGRAM = """#!/usr/bin/env bash
echo "$PWD: $*" >>"$(dirname "$0")/calls"
echo "loading"
[ -z "${FAILS:-}" ] || { echo "error: no such key" >&2; exit 2; }
for word in "$@"; do
  case "$word" in output_dir=*) mkdir -p "${word#*=}"; touch "${word#*=}/train_results.json" ;; esac
done
"""


def test_the_notebooks_run_is_made_once_for_a_version_beside_them(
    shared: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shared.trained_run()
    assert run == shared.HERE / "runs" / shared.dataflex.__version__
    assert "loading" in capsys.readouterr().out
    assert shared.trained_run() == run
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call == (
        f"{tmp_path / 'clone'}: -m dataflex train examples/notebooks/run.yaml "
        f"output_dir={run} overwrite_output_dir=true"
    )
    (run / "train_results.json").unlink()  # as one that was killed leaves it
    shared.trained_run()
    assert (run / "train_results.json").exists()


def test_a_command_of_a_notebook_that_fails_is_shown_with_its_message(
    shared: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(RuntimeError, match="dataflex-cli train ended with exit code 2"):
        shared.trained_run()
    out = capsys.readouterr().out
    assert out.endswith("loading\nerror: no such key\n")
