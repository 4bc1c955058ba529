"""The command `gradstore replay`: prints a replay's price, prints or writes its table.

Letters: n training rows, q targets.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.config.keys import RunConfig
from dataflex.launch.replay_states import remove_states
from dataflex.launch.replayed import Replay, replay_run
from dataflex.run.forecast import Forecast, peak_memory, print_forecasts
from gradstore.cli.options import print_json, print_table
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.pace import duration, size
from gradstore.replay.price import Limits, ReplayCost
from gradstore.replay.run import TrainingRun
from gradstore.replay.table import ReplayTable
from gradstore.storage.tables import check_suffix, write_table

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Uses that the command makes of a table.

    Attributes:
        rows: training rows to list, as text such as 0,3,10-19; "" for all.
        output: file for the table.
        top: rows to show on each side, of each target.
        as_json: print JSON.
        dry_run: print the price alone.
    """

    rows: str = ""
    output: Path | None = None
    top: int = 5
    as_json: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Refuse, before anything is loaded, what could only fail later."""
        if self.output is not None:
            check_suffix(self.output)
        expect_whole(self.top, "--top")
        parse_rows(self.rows)


def choices(
    targets: str, float32: bool, segment: int | None, hours: float, memory: float
) -> Replay:
    """Return a replay's choices, its limits given in hours and GiB.

    Raises:
        BadInput: one that there is not; a limit that is not above 0.
    """
    expect(hours > 0, "--hours", hours, "a number above 0")
    expect(memory > 0, "--memory", memory, "a number of GiB above 0")
    if segment is not None:
        expect_whole(segment, "--segment")
    limits = Limits(3600 * hours, int(memory * (1 << 30)))
    return Replay(targets=targets, float64=not float32, segment=segment, limits=limits)


def parse_rows(text: str) -> list[int] | None:
    """Read positions such as "0,3,10-19"; None for "", which means all.

    Raises:
        BadInput: it is something else.
    """
    if not text:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise BadInput(f"--rows is {text!r}; give positions such as 0,3,10-19.")
        found += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(found))


class _ForecastOnly(Exception):
    """The end of a dry run, before the first step."""


def replay(config: RunConfig, asked: Replay, shown: Shown) -> None:
    """Replay a run, and print or write its table.

    With a file for the table, what is finished is kept beside it until the table is written: after
    Ctrl-C or a kill the same call goes on.

    Raises:
        BadInput: as `replay_run`; a row to list that there is not.
        ProvenanceMismatch: the states beside the table are those of another replay.
        DamagedData: they are not as they were written.
        StoreIOError: the table, or the states, cannot be written.
    """
    forecasts: list[Forecast] = []
    if shown.output is not None:
        states = shown.output.with_name(f"{shown.output.name}.states")
        asked = replace(asked, states=states)

    def told(run: TrainingRun, cost: ReplayCost) -> None:
        steps = len(run.steps)
        rows = steps * sum(len(batch.rows) for batch in run.steps[0].batches)
        states = f"{cost.kept_states} states, {size(cost.state_bytes)}"
        forecasts.append(Forecast(f"training and replay, {steps:,} steps", 1, rows,
                                  seconds=cost.seconds + cost.training_seconds,
                                  memory_bytes=peak_memory(), note=states))  # fmt: skip
        _log.info("replay of %d steps: %s beside the model and its activations, about %s", steps,
                  states, duration(cost.seconds + cost.training_seconds))  # fmt: skip
        if shown.dry_run:
            raise _ForecastOnly

    try:
        table = replay_run(config, asked, told=told, shows_progress=sys.stderr.isatty())
    except _ForecastOnly:
        print_forecasts(forecasts, world=1)
        return
    listed = parse_rows(shown.rows)
    if shown.output is not None:
        write_table(shown.output, table.to_arrow(listed))
        assert asked.states is not None
        remove_states(asked.states)
        _log.info("table: %s", shown.output)
    if shown.as_json:
        print_json(as_json(table, listed))
    else:
        _show(table, listed, shown.top)


def as_json(table: ReplayTable, rows: Sequence[int] | None = None) -> dict[str, Any]:
    """Return a table as plain JSON values.

    Args:
        table: of a replay.
        rows: positions (m,) of the training rows to list; None for all.
    """
    columns = table.to_arrow(rows).to_pydict()
    count = len(columns["row"]) // len(table.targets)
    return {
        "steps": table.steps,
        "rows": columns["row"][:count],
        "times": columns["times"][:count],
        "targets": [
            {
                "target": target.name,
                "row": target.row,
                "before": float(table.before[q]),
                "after": float(table.after[q]),
                "scores": columns["score"][q * count : (q + 1) * count],
            }
            for q, target in enumerate(table.targets)
        ],
    }


def _show(table: ReplayTable, rows: Sequence[int] | None, top: int) -> None:
    """Print the rows that helped and that hurt each target most."""
    chosen = np.arange(len(table.times)) if rows is None else np.array(rows)
    lines: list[Sequence[Any]] = []
    for q, target in enumerate(table.targets):
        loss = f"{table.before[q]:.4f} to {table.after[q]:.4f}"
        order = chosen[np.argsort(-table.scores[q, chosen], kind="stable")]
        sides = [("helped", row) for row in order[:top] if table.scores[q, row] > 0]
        sides += [("hurt", row) for row in order[::-1][:top] if table.scores[q, row] < 0]
        for side, row in sides:
            lines.append((target, loss, side, row, table.times[row], f"{table.scores[q, row]:.3g}"))
    print_table(("target", "loss", "", "row", "times trained on", "score"), lines)
