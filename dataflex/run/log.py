"""The records of a run: events.jsonl, selections/, receipt.json, progress, a table."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dataflex.config.secrets import without_secrets
from dataflex.run.receipt import RECEIPT, Receipt
from gradstore.format.foreign import read_json
from gradstore.format.names import printable
from gradstore.pace import Pace, long_pass
from gradstore.storage.replace import replace_file

OnRows = Callable[[int], None]

#: Step, component, what changed, seconds of the pause.
Update = tuple[int, str, str, float | None]

#: Rows of the last table, and its width where it is not shown on a terminal.
TABLE_ROWS, TABLE_WIDTH = 20, 100

_log = logging.getLogger(__name__)


class Watch(Protocol):
    """One who is told how the passes of a process go, and shows it elsewhere."""

    def loaded(self) -> None:
        """Hear that the model is there, and that the store comes next."""

    def begins(self, name: str, rows: int) -> None:
        """Hear that a pass begins, and how many rows it has left."""

    def takes(self, name: str, unit: int) -> None:
        """Hear that this process begins to compute a unit of a pass."""

    def finished(self, name: str, unit: int, rows: int) -> None:
        """Hear, from any thread, that this process has finished a unit of a pass, and its rows."""


@dataclass(frozen=True)
class SelectionEvent:
    """A selection's line of events.jsonl. Seconds are wall-clock; tokens are those of all passes.

    `chosen` counts the chosen rows by data set, `train_sets` all training rows; `won` counts the
    chosen rows by the target that each helps most. `distinct` of the chosen rows are no copies.
    """

    step: int
    component: str
    train_rows: int
    target_rows: int = 0
    tokens: int = 0
    export_seconds: float = 0.0
    score_seconds: float = 0.0
    select_seconds: float = 0.0
    pause_seconds: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)
    chosen: Mapping[str, int] = field(default_factory=dict)
    train_sets: Mapping[str, int] = field(default_factory=dict)
    won: Mapping[str, int] = field(default_factory=dict)
    distinct: int = 0


class RunLog:
    """Writer of one run's files under `output_dir/dataflex/`; rank 0 alone writes."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "dataflex"
        self.receipt = Receipt(self.folder)
        self._updates: list[Update] = []
        self._lines: list[Update] = []

    def clear(self) -> None:
        """Forget what an earlier run left here; a new run in the same folder starts clean."""
        for name in ("selections", "plans"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("events.jsonl", "picture.png", "report.html", RECEIPT):
            (self.folder / name).unlink(missing_ok=True)

    def selection(
        self,
        step: int,
        indices: npt.NDArray[np.int64],
        scores: npt.NDArray[np.floating[Any]] | None,
        manifest: Mapping[str, Any],
    ) -> None:
        """Write `selections/step_<g>.json`; `scores` (k,) in the order of `indices` (k,)."""
        listed = [] if scores is None else [finite(s) for s in scores.tolist()]
        content = {
            "indices": indices.tolist(),
            "metric": {"score": listed},
            "manifest": without_secrets(manifest),
        }
        path = self.folder / "selections" / f"step_{step}.json"
        replace_file(path, json.dumps(content).encode())

    def rows(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write `selections/<name>.jsonl`, a line per row; readers see it whole or not at all."""
        # A lone surrogate, which a file may hold, is no character that could be written.
        parts = ((json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
                 for line in lines)  # fmt: skip
        replace_file(self.folder / "selections" / f"{name}.jsonl", parts)

    def plan(self, step: int, content: Mapping[str, Any]) -> None:
        """Write `plans/step_<g>.json`: the rows that each stage of a pipeline passed on."""
        replace_file(self.folder / "plans" / f"step_{step}.json", json.dumps(content).encode())

    def update(
        self,
        kind: str,
        step: int,
        component: str,
        summary: str,
        *,
        in_table: bool = True,
        **values: Any,  # noqa: ANN401 - JSON values
    ) -> None:
        """Log one update: a line on the screen, in events.jsonl, in the last table.

        Args:
            kind: select, mix, weight, reorder or pipeline.
            step: g, optimizer steps finished.
            component: name of the preset.
            summary: what changed, in a few words.
            in_table: whether the table at the end has a row for it in any case; otherwise only if
                the run makes no other updates.
            **values: the rest of the line in events.jsonl; `pause_seconds` is shown.
        """
        _log.info("step %d: %s %s", step, component, summary)
        kept = self._updates if in_table else self._lines
        kept.append((step, component, summary, values.get("pause_seconds")))
        line = {"event": kind, "step": step, "component": component, **without_secrets(values)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def table(self) -> None:
        """Print on stdout what the updates of this process did, or that there was none."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        made = self._updates or self._lines
        shown = _spread(made, TABLE_ROWS)
        paused = any(pause is not None for *_, pause in shown)
        table = Table(
            "step", "component", "what changed", *(["pause"] if paused else []),
            title="Updates of this run", caption=self._caption(len(shown), len(made)),
        )  # fmt: skip
        for column in table.columns[::3]:
            column.justify = "right"
        for step, component, summary, pause in shown:
            # Texts, not markup: names of data sets are the user's.
            texts = [Text(printable(text)) for text in (component, summary)]
            seconds = "" if pause is None else f"{pause:.1f} s"
            table.add_row(str(step), *texts, *([seconds] if paused else []))
        console = Console()
        if not console.is_terminal:
            console.width = TABLE_WIDTH
        with console.capture() as text:  # rich would end the process where nobody reads stdout
            console.print(table)
        sys.stdout.write(text.get())
        sys.stdout.flush()

    @staticmethod
    def _caption(shown: int, made: int) -> str | None:
        if not made:
            return "no update was made"
        return None if shown == made else f"{shown} of {made}; all are in events.jsonl"


def _spread(found: list[Update], most: int) -> list[Update]:
    """Take `most` entries evenly, the first and the last among them; all if there are no more."""
    if len(found) <= most:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Read `events.jsonl` by step; of a step that a resumed run logged again, the last line.

    Args:
        folder: `output_dir/dataflex`.
    """
    path = folder / "events.jsonl"
    if not path.is_file():
        return []
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        event = record_of(line)
        if event is not None and isinstance(event.get("event"), str):
            found[event["event"], event["step"]] = event
    return sorted(found.values(), key=lambda event: int(event["step"]))


def record_of(line: str) -> dict[str, Any] | None:
    """Read a step's line of a record; None where a kill has cut it, or it is damaged."""
    try:
        content = read_json(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) and type(content.get("step")) is int else None


@contextlib.contextmanager
def progress(
    description: str,
    work: int | npt.NDArray[np.int64],
    *,
    shown: bool = True,
    told: bool = True,
    stored_bytes: int = 0,
    unit: str = "row",
) -> Iterator[OnRows]:
    """Show a bar with rows, rows/s and time left, on stderr; yield `advance(rows_done)`.

    It takes the line of the bar of training, which stands still meanwhile. Of a long pass one line
    is logged after its first batches: hours, and GiB of the store.

    Args:
        description: what is done.
        work: rows of the pass, or the cost (n,) of each in the order they are taken.
        shown: whether there is a bar.
        told: whether this process logs the line.
        stored_bytes: bytes that the pass adds to the store.
        unit: what the bar counts.
    """
    from tqdm import tqdm

    rows = work if isinstance(work, int) else len(work)

    def tell(seconds: float) -> None:
        _log.info("%s", long_pass(description, rows, seconds, stored_bytes))

    pace = Pace(work, tell if told else lambda _: None)
    with tqdm(total=rows, desc=description, unit=unit, disable=not shown, leave=False,
              dynamic_ncols=True, position=0) as bar:  # fmt: skip

        def advance(done: int) -> None:
            bar.update(done)
            pace.advance(done)

        yield advance


def finite(value: float) -> float | None:
    """Return the value, or None if not finite: JSON has no NaN, a row without a score has null."""
    return value if math.isfinite(value) else None


def as_json(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers alone: JSON has no NaN, and a chart cannot show it."""
    return {k: float(v) for k, v in numbers.items() if np.isfinite(v)}
