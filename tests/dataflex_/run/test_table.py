"""The last table: a few rows of every kind of run, and lines of the log beside a bar."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest

from dataflex.run.log import TABLE_ROWS, RunLog, progress
from dataflex.run.messages import _BesideBars


def test_updates_are_shown_and_lines_that_are_none_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    log.update("weight", 1, "loss", "weights 0.5 to 2", in_table=False)
    log.update("pipeline", 2, "lego", "keeps 4 of 8", pause_seconds=1.25)
    log.table()
    shown = capsys.readouterr()
    assert "keeps 4 of 8" in shown.out
    assert "1.2 s" in shown.out
    assert "weights" not in shown.out
    assert shown.err == ""


def test_of_a_run_that_only_weights_a_few_lines_are_shown_from_first_to_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    for step in range(1, 301):
        log.update("weight", step, "loss", f"weights of {step}.", in_table=False)
    log.table()
    shown = capsys.readouterr().out
    assert shown.count("weights of ") == TABLE_ROWS
    assert "weights of 1." in shown
    assert "weights of 300." in shown
    assert f"{TABLE_ROWS} of 300; all are in events.jsonl" in shown
    assert "pause" not in shown, "no line has one"


def test_a_run_without_updates_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunLog(tmp_path).table()
    assert "no update was made" in capsys.readouterr().out


def test_a_logged_line_stands_alone_beside_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler = _BesideBars(stream)
    with progress("rows of a pass", 8) as advance:
        advance(3)
        handler.emit(logging.makeLogRecord({"msg": "step 4: less chose 16 rows"}))
        advance(5)
    lines = [line.rpartition("\r")[2] for line in stream.getvalue().split("\n")]
    assert "step 4: less chose 16 rows" in lines
    assert "rows of a pass" in stream.getvalue()
