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
    """Date, processor, cores, threads of torch and its version: the first columns of a result."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
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
    """Append rows to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def echo(message: str) -> None:
    """Print one line and flush it."""
    sys.stdout.write(message + "\n")
    sys.stdout.flush()
