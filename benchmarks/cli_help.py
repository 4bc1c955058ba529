"""How long `dataflex-cli --help` takes: the median of several starts, beside a bare interpreter.

uv run python benchmarks/cli_help.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

LIMIT_SECONDS = 1.0
STARTS = 7


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of one run that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def main() -> int:
    """Print both medians; 1 if the limit is missed."""
    cli = [str(Path(sys.executable).with_name("dataflex-cli")), "--help"]
    bare = [sys.executable, "-c", "pass"]
    pairs = [(seconds(cli), seconds(bare)) for _ in range(STARTS)]
    ours, interpreter = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"dataflex-cli --help {ours:.2f} s, python -c pass {interpreter:.2f} s, "
          f"limit {LIMIT_SECONDS:.1f} s")  # fmt: skip
    return int(ours > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
