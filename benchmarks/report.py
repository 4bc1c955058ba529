"""What the benchmarks of the embedded example share: where and when, and one CSV per claim."""

from __future__ import annotations

import csv
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> dict[str, Any]:
    """Date, processor, cores, threads of torch, its version, load: first columns of a result.

    `load` is the machine's average over the last minute, this benchmark included; `cpu_s` of a
    result, where it has one, are processor seconds, which other work on the machine changes less.
    """
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 1),
    }


def processor() -> str:
    """Read the processor's name in Linux, with family and model: some names say little."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    name = found.get("model name", "unknown CPU")
    return f"{name} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
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
