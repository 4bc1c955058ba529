"""What a run shows and leaves: events.jsonl, selections/step_<g>.json, progress, a table."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.disk.replace import replace_file

OnRows = Callable[[int], None]


@dataclass(frozen=True)
class SelectionEvent:
    """One line of events.jsonl. Seconds are wall-clock; tokens are those a pass went through."""

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
    """Writes one run's files under `output_dir/dataflex/`. Rank 0 alone owns one."""

    def __init__(self, output_dir: Path) -> None:
        self.folder = output_dir / "dataflex"
        self.events: list[SelectionEvent] = []

    def clear(self) -> None:
        """Forget what an earlier run left here; a new run in the same folder starts clean."""
        shutil.rmtree(self.folder / "selections", ignore_errors=True)
        (self.folder / "events.jsonl").unlink(missing_ok=True)

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

    def event(self, event: SelectionEvent) -> None:
        """Append one line to events.jsonl and remember it for the table at the end."""
        self.events.append(event)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(event)) + "\n")

    def table(self) -> None:
        """Print what every selection of this process did."""
        from rich.console import Console
        from rich.table import Table

        if not self.events:
            return
        table = Table(title="Selections of this run")
        for column in ("step", "component", "scored rows", "skipped", "pause"):
            table.add_column(column, justify="left" if column == "component" else "right")
        table.add_column("chosen, by data set")
        for e in self.events:
            chosen = ", ".join(f"{name} {count}" for name, count in e.chosen.items())
            skipped = str(sum(e.skipped.values()))
            pause = f"{e.pause_seconds:.1f} s"
            table.add_row(str(e.step), e.component, f"{e.train_rows:,}", skipped, pause, chosen)
        console = Console(stderr=True)
        console.print(table)
        console.print(f"rows and scores: {self.folder / 'selections'}", soft_wrap=True)


@contextlib.contextmanager
def progress(description: str, rows: int, *, shown: bool = True) -> Iterator[OnRows]:
    """A bar with rows, rows/s and time left, on stderr; yields `advance(rows_done)`."""
    from tqdm import tqdm

    with tqdm(total=rows, desc=description, unit="row", disable=not shown, leave=False,
              dynamic_ncols=True) as bar:  # fmt: skip
        yield lambda done: bar.update(done) and None


def _finite(value: float) -> float | None:
    """JSON has no NaN: a row without a score has null."""
    return value if math.isfinite(value) else None
