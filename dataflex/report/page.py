"""The report of a run: one page of HTML, which needs no network and no script.

Drawn from `events.jsonl`, `selections/`, `receipt.json` and the Trainer's log, so the report of a
resumed run shows the whole run. Text of rows, names and messages are data: escaped, and control
characters spelled out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dataflex.report.charts import number
from dataflex.report.picture import heading
from dataflex.report.records import Records
from dataflex.report.sections import sections_of, wall_seconds
from gradstore.format.names import printable
from gradstore.storage.replace import replace_file

REPORT = "report.html"

#: Characters of a row's prompt or response, of a value of the receipt, and of a warning.
TEXT, VALUE, WARNING = 600, 300, 500

#: Warnings that are listed.
MOST_WARNINGS = 50


def draw(folder: Path) -> Path | None:
    """Write `report.html` into a run's `dataflex` folder.

    Args:
        folder: `output_dir/dataflex`.

    Returns:
        The page, or None where the run has logged nothing.
    """
    run = Records.read(folder)
    if not run.events:
        return None
    path = folder / REPORT
    replace_file(path, render(run).encode())
    return path


@cache
def templates() -> Environment:
    """Return the page's templates, each compiled once in a process."""
    environment = Environment(
        loader=PackageLoader("dataflex.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_plain,
    )
    environment.filters["cut"] = cut
    return environment


def render(run: Records) -> str:
    """Write the page of a run with at least one event."""
    what, by = heading(run)
    warnings = _warnings(run)
    return (
        templates()
        .get_template("page.html.j2")
        .render(
            title=f"{what} by {by}",
            run=run.name,
            state=_state(run),
            facts=_facts(run),
            sections=sections_of(run),
            warnings=warnings[:MOST_WARNINGS],
            more_warnings=max(0, len(warnings) - MOST_WARNINGS),
            receipt=_receipt(run.receipt),
            text_limit=TEXT,
            warning_limit=WARNING,
        )
    )


def cut(text: str, limit: int) -> tuple[str, str]:
    r"""Cut a text that is too long: what is shown, and a note on what is not.

    >>> cut("abc", 3), cut("abcdef", 3)
    (('abc', ''), ('abc', 'first 3 of 6 characters'))
    >>> cut("\x00" * 3, 6)
    ('\\x00\\x', 'first 6 of 12 characters, control characters spelled out')
    """
    shown = printable(text[:limit])
    if len(text) <= limit and len(shown) <= limit:
        return shown, ""
    if len(text) <= limit:
        return shown[:limit], (
            f"first {limit:,} of {len(shown):,} characters, control characters spelled out"
        )
    return shown[:limit], f"first {limit:,} of {len(text):,} characters"


def _plain(value: Any) -> Any:  # noqa: ANN401 - what a template shows
    """Spell out control characters of data; markup has none, and is passed on."""
    return printable(value) if type(value) is str else value


def _state(run: Records) -> str:
    """Say how the run ended, as far as it wrote that."""
    sessions = run.receipt.get("sessions") or [{}]
    ended = sessions[-1].get("ended")
    return str(ended) if ended else "not ended when this page was made"


def _facts(run: Records) -> list[tuple[str, str]]:
    """List the numbers that come first."""
    found = [("optimizer steps", number(run.end))]
    if run.updates:
        found.append(("updates", number(len(run.updates))))
    if run.chosen or run.orders:
        found.append(("training rows", number(run.train_rows)))
    if wall := wall_seconds(run):
        found.append(("seconds", number(round(wall, 1))))
    if run.losses:
        found.append(("last training loss", number(run.losses[-1][1])))
    for name, points in list(run.evaluated.items())[:1]:
        if points:
            found.append((f"last loss of {name or 'evaluation'}", number(points[-1][1])))
    return found


def _warnings(run: Records) -> list[str]:
    sessions = run.receipt.get("sessions") or ()
    return list(dict.fromkeys(text for each in sessions for text in each.get("warnings", ())))


def _receipt(receipt: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """List the receipt's parts, each a caption and its lines."""
    if not receipt:
        return []
    parts: list[tuple[str, Mapping[str, Any]]] = [("Configuration", receipt["config"])]
    parts.append(("Rows", receipt["rows"]))
    for i, session in enumerate(receipt["sessions"], 1):
        told = {k: v for k, v in session.items() if k not in ("warnings", "versions")}
        told["command"] = " ".join(session["command"])
        told |= session["versions"]
        parts.append((f"Session {i}" if len(receipt["sessions"]) > 1 else "Session", told))
    return [(caption, _lines(values)) for caption, values in parts]


def _lines(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for key, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        shown, note = cut(text, VALUE)
        found.append((key, f"{shown}… ({note})" if note else shown))
    return found
