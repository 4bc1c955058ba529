"""What benchmarks share: where and when, timed work, ratios with their spread, CSVs per claim.

Imports no library at its top: a benchmark of memory starts its measured processes from one that
has loaded none.
"""

from __future__ import annotations

import csv
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"

#: The machine's average over the minute before the benchmark began: what else runs there.
LOAD = round(os.getloadavg()[0], 1)


def machine(threads: int | None = None, chip: str | None = None) -> dict[str, Any]:
    """Date, processor, cores, threads, torch's version, load: the first columns of a result.

    Args:
        threads: of the measured process; None for this one's, by torch.
        chip: name of a GPU that the work ran on; None for the processor.

    `load` is that of other work, `LOAD`, not of this benchmark's; `cpu_s` columns are processor
    seconds, which other work on the machine changes less than wall-clock.
    """
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": version("torch"),
        "load": LOAD,
        "chip": chip or "",
    }


def processor() -> str:
    """Read the processor's name in Linux, with family and model: some names say little."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", "unknown CPU")
    return f"{name} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


@dataclass(frozen=True)
class Took:
    """Wall-clock and processor seconds of one call, all threads of the process together."""

    wall: float
    cpu: float


def timed(work: Callable[[], object], wait: Callable[[], object] = lambda: None) -> Took:
    """Time one call; `wait` waits for a device before and after it."""
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wait()
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


def compared(
    ours: Sequence[Took], beside: Sequence[Took], names: tuple[str, str], digits: int = 3
) -> dict[str, float | int]:
    """Compare two works timed in turns (A B A B): medians, and the ratio with its spread.

    Returns:
        `<name>_s` and `<name>_cpu_s`, medians in seconds; `ratio`, the median over the pairs of
        ours / beside, `ratio_min` and `ratio_max`; `pairs`.
    """
    ratios = [a.wall / b.wall for a, b in zip(ours, beside, strict=True)]
    found: dict[str, float | int] = {"pairs": len(ratios)}
    for name, times in zip(names, (ours, beside), strict=True):
        found[f"{name}_s"] = round(statistics.median(t.wall for t in times), digits)
        found[f"{name}_cpu_s"] = round(statistics.median(t.cpu for t in times), digits)
    return found | {
        "ratio": round(statistics.median(ratios), 4),
        "ratio_min": round(min(ratios), 4),
        "ratio_max": round(max(ratios), 4),
    }


def drop(folder: Path) -> None:
    """Drop the pages of every file of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def on_disk(*paths: Path) -> tuple[int, int]:
    """Sum what files, and folders with all below them, take: bytes, and bytes of their blocks.

    A folder has no bytes of its own, but blocks; on some file systems none.
    """
    found = [each for path in paths for each in (path, *path.rglob("*"))]
    stats = [(path.is_file(), path.stat()) for path in found]
    return (
        sum(stat.st_size for is_file, stat in stats if is_file),
        sum(512 * stat.st_blocks for _, stat in stats),
    )


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV file; columns that it lacks are added, empty in its older rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    older = read(path) if path.exists() else []
    columns = list(dict.fromkeys([*rows[0], *(older[0] if older else ())]))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*older, *rows])


def read(path: Path) -> list[dict[str, str]]:
    """Read a CSV file's rows, by column."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def echo(message: str) -> None:
    """Print one line and flush it."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()
