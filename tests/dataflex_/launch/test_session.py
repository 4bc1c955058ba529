"""The end of a run: whatever its pages or table do, files stay, and so does exit code 0."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from dataflex.launch import session as module
from dataflex.launch.session import TrainSession
from dataflex.run.log import RunLog
from gradstore.errors import BadInput

#: Ends as the interpreter does, with 120 where stdout cannot be flushed.
SHOWS = """
import ctypes, os, sys
from pathlib import Path
from dataflex.launch.session import TrainSession
from dataflex.run.log import RunLog
from dataflex.run.messages import set_up_logging

reading, writing = os.pipe()
os.dup2(writing, 1)
if sys.argv[2] == "closed by its reader":
    os.close(reading)
sys.stdout.reconfigure(encoding="ascii", errors="strict", line_buffering=False)
set_up_logging()
session = object.__new__(TrainSession)
session._log = RunLog(Path(sys.argv[1]))
session._log.update("select", 2, "less", "chose 4 rows", pause_seconds=1.0)
if sys.argv[2] == "ascii":
    session._log.update("select", 4, "less", "chose 4 rows (d\u00e9j\u00e0 4)", pause_seconds=1.0)
session.show()
ctypes.pythonapi.Py_Exit(0)
"""


@pytest.fixture
def ended(tmp_path: Path) -> TrainSession:
    session = object.__new__(TrainSession)
    session._log = RunLog(tmp_path)
    session._log.receipt.begin("a", {}, {}, 0)
    session._log.update("select", 2, "less", "chose 4 rows", pause_seconds=1.0)
    return session


@pytest.mark.parametrize(
    ("place", "what"),
    [("picture.draw", "picture of the run was not drawn"),
     ("page.draw", "report of the run was not drawn"),
     ("receipt.end", "receipt of the run was not written"), ("table", "table of updates")],
)  # fmt: skip
def test_a_failure_of_a_page_or_the_table_is_a_warning(
    place: str,
    what: str,
    ended: TrainSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such font")

    owners = {"picture": module.picture, "page": module.page, "receipt": ended._log.receipt}
    owner, _, name = place.rpartition(".")
    monkeypatch.setattr(owners[owner] if owner else RunLog, name, fail)
    monkeypatch.setattr(logging.getLogger("dataflex"), "propagate", True)
    with caplog.at_level(logging.INFO, "dataflex"):
        ended.show()
    (warning,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert what in warning
    assert "no such font" in warning
    assert ("chose 4 rows" in capsys.readouterr().out) == (place != "table")
    assert (tmp_path / "dataflex" / "events.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("error", "told"),
    [(KeyboardInterrupt(), "interrupted"), (BadInput("row 7 is bad"), "failed: row 7 is bad"),
     (ZeroDivisionError("by 0"), "ZeroDivisionError: by 0")],
)  # fmt: skip
def test_a_run_that_does_not_finish_is_shown_as_far_as_it_came(
    error: BaseException, told: str, ended: TrainSession, tmp_path: Path
) -> None:
    def train() -> None:
        logging.getLogger("dataflex").warning("be careful")
        raise error

    with pytest.raises(type(error)), ended.shown():
        train()
    report = (tmp_path / "dataflex/report.html").read_text()
    assert told in report
    assert "be careful" in report
    assert (tmp_path / "dataflex/picture.png").is_file() is False, "it has nothing to draw here"


def test_a_run_that_was_refused_leaves_an_earlier_ones_report(
    ended: TrainSession, tmp_path: Path
) -> None:
    ended.show()
    before = (tmp_path / "dataflex/report.html").read_bytes()
    refused = object.__new__(TrainSession)
    refused._log = RunLog(tmp_path)
    with pytest.raises(BadInput), refused.shown():
        raise BadInput("no such data set")
    assert (tmp_path / "dataflex/report.html").read_bytes() == before
    assert "no such data set" not in (tmp_path / "dataflex/receipt.json").read_text()


@pytest.mark.parametrize("stdout", ["closed by its reader", "ascii"])
def test_a_stdout_that_takes_no_table_changes_no_exit_code(
    stdout: str, cli: Any, tmp_path: Path
) -> None:
    """Python itself would end with 120 for a pipe that nobody reads."""
    result = cli("-c", SHOWS, tmp_path, stdout, program="python", heavy=True)
    assert result.code == 0, result.err
    assert "the table of updates was not printed" in result.err
    assert "Traceback" not in result.err
