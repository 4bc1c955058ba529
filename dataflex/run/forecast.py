"""Forecast of a run's passes, from a few rows measured.

Letters: n rows, b rows of a batch, t tokens of its longest row.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradstore.format.layout import UNIT_ROWS
from gradstore.pace import duration, size

if TYPE_CHECKING:
    from dataflex.run.context import RunContext

Positions = npt.NDArray[np.int64]

#: Seconds of one row from which on no further row is measured.
SLOW_ROW_SECONDS = 10.0


@dataclass(frozen=True)
class Forecast:
    """Cost of one kind of pass.

    Attributes:
        what: the pass, such as "gradients of train".
        times: how often it is made in the run.
        rows: of one pass; 0 where it is not known.
        tokens: of one pass; 0 where it is not known, or none goes through a model.
        seconds: of one pass, in this process alone; None where it was not measured.
        stored_bytes: of one pass, in the store.
        kept: how many of the passes the store keeps at once; None keeps all.
        memory_bytes: the process's peak after it was measured; 0 where it was not.
        note: why it was not measured.
        shared: whether processes share a pass; false where each of them makes the whole of it.
    """

    what: str
    times: int
    rows: int = 0
    tokens: int = 0
    seconds: float | None = None
    stored_bytes: int = 0
    kept: int | None = None
    memory_bytes: int = 0
    note: str = ""
    shared: bool = True

    @property
    def all_bytes(self) -> int:
        """Bytes that all passes leave in the store."""
        return self.stored_bytes * min(self.times, self.kept or self.times)


def padded_tokens(lengths: npt.NDArray[np.int64], budget: int, unit_rows: int = UNIT_ROWS) -> int:
    """Count the tokens of padded batches, b x t each, which a model's time is proportional to.

    Args:
        lengths: (n,) tokens of each row.
        budget: tokens of a padded batch.
        unit_rows: rows that are put into batches together.

    Examples:
        >>> padded_tokens(np.array([10, 6, 4, 4]), budget=12)
        24
    """
    from gradstore.export.units import plan_batches

    total = 0
    for start in range(0, len(lengths), unit_rows):
        unit = lengths[start : start + unit_rows]
        total += sum(len(rows) * int(unit[rows].max()) for rows in plan_batches(unit, budget))
    return total


def measured_seconds(
    work: Callable[[Positions], object],
    lengths: npt.NDArray[np.int64],
    budget: int,
    unit_rows: int = UNIT_ROWS,
) -> float:
    """Forecast the seconds of a pass over all rows from one over some, spread over the lengths.

    A first row is taken to warm up; it counts alone where it takes long.

    Args:
        work: makes the pass over the rows at positions (m,).
        lengths: (n,) tokens of each row.
        budget: tokens of a padded batch; rows of about four batches are measured.
        unit_rows: rows that the pass puts into batches together.
    """
    order = np.argsort(lengths, kind="stable")
    chosen = order[[len(order) // 2]]
    seconds = timed(lambda: work(chosen))
    if seconds < SLOW_ROW_SECONDS:
        mean = max(float(lengths.mean()), 1.0)
        most = max(1, min(len(lengths), unit_rows, round(4 * budget / mean)))
        chosen = np.sort(order[np.linspace(0, len(order) - 1, most).round().astype(np.int64)])
        seconds = timed(lambda: work(chosen))
    measured = padded_tokens(lengths[chosen], budget, unit_rows)
    return seconds * padded_tokens(lengths, budget, unit_rows) / measured


def batches_forecast(
    what: str, times: int, lengths: Sequence[Positions], work: Callable[[Sequence[int]], object]
) -> Forecast:
    """Forecast passes over planned batches from up to four of them, spread over the plan.

    The first of these is taken once before, to warm up; it counts alone where it takes long.

    Args:
        what: the pass.
        times: how often it is made in the run.
        lengths: (b,) tokens of the rows of each batch; at least one batch.
        work: makes the pass over the batches with these numbers.
    """
    padded = [len(each) * int(each.max()) for each in lengths]
    chosen = np.unique(np.linspace(0, len(lengths) - 1, 4).round().astype(np.int64)).tolist()
    measured = chosen[:1]
    seconds = timed(lambda: work(measured))
    if seconds < SLOW_ROW_SECONDS:
        measured = chosen
        seconds = timed(lambda: work(measured))
    seconds *= sum(padded) / max(sum(padded[i] for i in measured), 1)
    rows, tokens = sum(map(len, lengths)), sum(int(each.sum()) for each in lengths)
    return Forecast(what, times, rows, tokens, seconds, memory_bytes=peak_memory())


def losses_forecast(run: RunContext, times: int) -> Forecast:
    """Forecast passes that take the losses of all training rows from the run's board.

    Args:
        run: with a board.
        times: how often the model they are taken under is another one.
    """
    board, rows = run.board, run.data.train
    if board is None:
        raise RuntimeError("a run without a board has no losses to forecast")
    # The board keeps no loss of a step below 0: every row asked for goes through the model.
    seconds = measured_seconds(
        lambda positions: board.losses(-1, positions), rows.lengths, board.batch_tokens
    )
    return Forecast(f"losses of {rows.name}", times, len(rows), int(rows.lengths.sum()), seconds,
                    memory_bytes=peak_memory())  # fmt: skip


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes, those of a GPU's queue included."""
    import torch

    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory() -> int:
    """Return the bytes this process has held at most, of the GPU if there is one, else of RAM."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def print_forecasts(forecasts: Sequence[Forecast], world: int) -> None:
    """Print a table of passes on stdout, and what they take together.

    Args:
        forecasts: measured in this process.
        world: processes of the run.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Forecast" + (f" for {world} processes" if world > 1 else ""))
    for column in ("pass", "times", "rows", "tokens", "seconds", "stored", "peak memory"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    total = stored = 0.0
    for f in forecasts:
        seconds = (f.seconds or 0.0) / (world if f.shared else 1)
        shown = "not measured" if f.seconds is None else duration(seconds)
        total += seconds * f.times
        stored += f.all_bytes
        what = Text(f"{f.what}: {f.note}" if f.note else f.what)
        rows, tokens = (f"{n:,}" if n else "" for n in (f.rows, f.tokens))
        table.add_row(what, f"{f.times:,}", rows, tokens, shown,
                      size(f.stored_bytes) if f.stored_bytes else "",
                      size(f.memory_bytes) if f.memory_bytes else "")  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(f"in all about {duration(total)} and {size(stored)} in the store", markup=False)


def print_nothing_to_forecast(rows: int | None) -> None:
    """Say on stdout that LlamaFactory's own training was checked.

    Args:
        rows: of the training set; None for a stream.
    """
    from rich.console import Console

    loaded = "a stream" if rows is None else f"{rows:,} rows"
    told = (
        "train_type static is LlamaFactory's own training, which has no pass of ours to "
        f"forecast: its configuration was checked, {loaded} loaded"
    )
    Console().print(told, markup=False, highlight=False, soft_wrap=True)
