"""Receipts: what ran, for how long and how it ended, over all sessions and without secrets."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from dataflex.run.receipt import MOST_WARNINGS, RECEIPT, Receipt, read_receipt, warnings_kept


def opened(folder: Path, run_id: str = "a", step: int = 0) -> Receipt:
    receipt = Receipt(folder)
    receipt.begin(run_id, {"seed": 1, "hf_hub_token": "hf_abcdef"}, {"train_rows": 3}, step)
    return receipt


def sessions(folder: Path) -> list[dict[str, Any]]:
    found = read_receipt(folder)
    assert found is not None
    listed: list[dict[str, Any]] = found["sessions"]
    return listed


def test_a_session_says_what_ran_before_it_says_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/x/launch/worker.py", "my.yaml", "seed=1"])
    receipt = opened(tmp_path)
    (session,) = sessions(tmp_path)
    assert session["command"] == ["dataflex-cli", "train", "my.yaml", "seed=1"]
    assert session["versions"]["torch"].startswith("2.")
    assert session["from_step"] == 0
    assert "ended" not in session, "a kill would leave it so"
    assert "hf_abcdef" not in (tmp_path / RECEIPT).read_text()
    receipt.end("finished", ["careful"])
    (session,) = sessions(tmp_path)
    assert (session["ended"], session["warnings"]) == ("finished", ["careful"])
    assert 0 <= session["seconds"] < 60


def test_a_resume_adds_a_session_and_another_run_begins_anew(tmp_path: Path) -> None:
    opened(tmp_path).end("interrupted", [])
    opened(tmp_path, step=7)
    assert [s["from_step"] for s in sessions(tmp_path)] == [0, 7]
    assert [s.get("ended") for s in sessions(tmp_path)] == ["interrupted", None]
    opened(tmp_path, run_id="b")
    assert len(sessions(tmp_path)) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_damaged_receipt_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / RECEIPT).write_text(content)
    assert read_receipt(tmp_path) is None
    opened(tmp_path)
    assert len(sessions(tmp_path)) == 1


def test_warnings_are_kept_once_each_and_not_without_end() -> None:
    ours = logging.getLogger("gradstore.store.reader")
    with warnings_kept() as kept:
        for _ in range(3):
            ours.warning("rows %s", "a\x1b[2J")
        ours.info("no warning")
        logging.getLogger("elsewhere").warning("not ours")
        for i in range(MOST_WARNINGS + 5):
            ours.warning("number %d", i)
    ours.warning("too late")
    assert kept[:2] == ["rows a\\x1b[2J", "number 0"]
    assert len(kept) == MOST_WARNINGS
