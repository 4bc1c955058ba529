"""Names from data, stores and files are shown on a terminal, and do nothing to it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.run.log import RunLog
from dataflex.run.messages import set_up_logging
from gradstore.cli.options import print_table
from gradstore.format.names import printable

#: A tag that rich cannot close, a tag that it would obey, and one that a terminal would.
HOSTILE = ("[/]", "[bold]x", "evil\x1b[2J\x07", "\u202eright to left")


@given(st.text())
def test_what_is_printable_has_no_control_character_and_keeps_all_others(text: str) -> None:
    shown = printable(text)
    assert printable(shown) == shown
    assert all(c in "\t\n" or c.isprintable() or c.isspace() for c in shown if ord(c) < 0x250)
    if text.isprintable():
        assert shown == text


def test_what_hides_or_breaks_a_name_is_spelled_out() -> None:
    hidden = "\u2028\u2029\u061c\u00ad\u200b\ud800\U000e0041"
    assert printable(hidden) == hidden.encode("unicode_escape").decode()


@pytest.mark.parametrize("name", HOSTILE)
def test_the_last_table_shows_names_as_they_are(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path)
    log.update("select", step=2, component=name, summary=f"chose 4 rows ({name} 4)")
    log.table()
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    assert printable(name)[:6] in shown
    assert (tmp_path / "dataflex" / "events.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_of_a_store_shows_names_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    print_table(("generation", "rows"), [(name, 3)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert printable(name)[:6] in shown


def test_a_logged_name_is_shown_too(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("dataflex")
    before = list(logger.handlers), logger.propagate, logger.level
    try:
        logger.handlers = []
        set_up_logging()
        logging.getLogger("dataflex.anything").warning("data set %s", HOSTILE[2])
        for handler in logger.handlers:
            handler.flush()
        shown = capfd.readouterr().err
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])
    assert "\x1b" not in shown
    assert "\\x1b[2J" in shown
