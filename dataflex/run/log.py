"""The records of a run: events.jsonl, selections/step_<g>.json, progress, a table."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.format.foreign import read_json
from gradstore.format.names import printable
from gradstore.pace import Pace, long_pass
from gradstore.storage.replace import replace_file

OnRows = Callable[[int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SelectionEvent:
    """A selection's line of events.jsonl. Seconds are wall-clock; tokens are those of all passes.

    `chosen` counts the chosen rows by data set.
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


class RunLog:
    """Writer of one run's files under `output_dir/dataflex/`; rank 0 alone writes."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "dataflex"
        self._updates: list[tuple[int, str, str, float | None]] = []

    def clear(self) -> None:
        """Forget what an earlier run left here; a new run in the same folder starts clean."""
        for name in ("selections", "plans"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in ("events.jsonl", "picture.png"):
            (self.folder / name).unlink(missing_ok=True)

    def selection(
        self,
        step: int,
        indices: npt.NDArray[np.int64],
        scores: npt.NDArray[np.floating[Any]] | None,
        manifest: Mapping[str, Any],
    ) -> None:
        """Write `selections/step_<g>.json`; `scores` (k,) in the order of `indices` (k,)."""
        listed = [] if scores is None else [_finite(s) for s in scores.tolist()]
        content = {
            "indices": indices.tolist(),
            "metric": {"score": listed},
            "manifest": dict(manifest),
        }
        path = self.folder / "selections" / f"step_{step}.json"
        replace_file(path, json.dumps(content).encode())

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
            in_table: whether the table at the end has a row for it.
            **values: the rest of the line in events.jsonl; `pause_seconds` is shown.
        """
        _log.info("step %d: %s %s", step, component, summary)
        if in_table:
            self._updates.append((step, component, summary, values.get("pause_seconds")))
        line = {"event": kind, "step": step, "component": component, **values}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def table(self) -> None:
        """Print what every update of this process did."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        if not self._updates:
            return
        table = Table(title="Updates of this run")
        for column in ("step", "component", "what changed", "pause"):
            table.add_column(column, justify="right" if column in ("step", "pause") else "left")
        for step, component, summary, pause in self._updates:
            # Texts, not markup: names of data sets are the user's.
            texts = (Text(printable(text)) for text in (component, summary))
            table.add_row(str(step), *texts, "" if pause is None else f"{pause:.1f} s")
        console = Console(stderr=True)
        console.print(table)
        console.print(f"all files: {self.folder}", soft_wrap=True, markup=False)


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
        with contextlib.suppress(ValueError):  # a kill may have cut the last line
            event = read_json(line)
            found[event["event"], event["step"]] = event
    return sorted(found.values(), key=lambda event: int(event["step"]))


@contextlib.contextmanager
def progress(
    description: str,
    work: int | npt.NDArray[np.int64],
    *,
    shown: bool = True,
    told: bool = True,
    stored_bytes: int = 0,
) -> Iterator[OnRows]:
    """Show a bar with rows, rows/s and time left, on stderr; yield `advance(rows_done)`.

    Of a long pass one line is logged after its first batches: hours, and GiB of the store.

    Args:
        description: what is done.
        work: rows of the pass, or the cost (n,) of each in the order they are taken.
        shown: whether there is a bar.
        told: whether this process logs the line.
        stored_bytes: bytes that the pass adds to the store.
    """
    from tqdm import tqdm

    rows = work if isinstance(work, int) else len(work)

    def tell(seconds: float) -> None:
        _log.info("%s", long_pass(description, rows, seconds, stored_bytes))

    pace = Pace(work, tell if told else lambda _: None)
    with tqdm(total=rows, desc=description, unit="row", disable=not shown, leave=False,
              dynamic_ncols=True) as bar:  # fmt: skip

        def advance(done: int) -> None:
            bar.update(done)
            pace.advance(done)

        yield advance


def _finite(value: float) -> float | None:
    """Return the value, or None if not finite: JSON has no NaN, a row without a score has null."""
    return value if math.isfinite(value) else None


def as_json(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers alone: JSON has no NaN, and a chart cannot show it."""
    return {k: float(v) for k, v in numbers.items() if np.isfinite(v)}
