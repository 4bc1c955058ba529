"""What each subset rule costs at a million rows and a hundred target rows: seconds and peak memory.

    python benchmarks/subset_cost.py                        # about two minutes, no disk

Similarities are synthetic and made chunk by chunk, as they come from a store: 8 Gaussian topics a
row, a part of them common to all target rows, so that target rows share favourites. Each rule
chooses k rows (1% of them) in a process of its own. Seconds of the wall, and of the CPU, which
other work moves less, from the first chunk to the choice, what making the chunks took apart;
`ru_maxrss` at the end minus that after the imports. `none` only makes the chunks. Prints one line a
rule and appends to results/subset_cost.csv; returns 1 if a rule takes more than 60 s or 4 GB,
facility_location aside, whose limit is its number of rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from report import RESULTS, append, echo, machine

if TYPE_CHECKING:
    from gradstore.scoring.best_rows import Keep

LIMIT_SECONDS, LIMIT_MIB = 60, 4096
TOPICS, CHUNK = 8, 4096
RULES = ("none", "top", "drop_harmful", "round_robin", "knn_uniform", "transport",
         "facility_location")  # fmt: skip


class Synthetic:
    """Similarities (n, t) that no array holds."""

    def __init__(self, n: int, targets: int) -> None:
        import numpy as np

        self.n, self.targets = n, targets
        generator = np.random.default_rng(0)
        self._targets = 0.1 + generator.standard_normal((TOPICS, targets)).astype(np.float32)
        self.seconds = 0.0

    def stream(self, keep: Keep) -> None:
        """Make every chunk from its own seed."""
        import numpy as np

        for start in range(0, self.n, CHUNK):
            began = time.perf_counter()
            count = min(CHUNK, self.n - start)
            generator = np.random.default_rng([1, start])
            topics = generator.standard_normal((count, TOPICS), dtype=np.float32)
            sums = topics @ self._targets * np.float32(0.05)
            self.seconds += time.perf_counter() - began
            keep(start, sums)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Choose once; seconds and memory above the imports."""
    import numpy as np

    from gradstore.scoring.rules import PER_TARGET, Rule

    np.ones((64, 64)) @ np.ones((64, 64))  # BLAS allocates its buffers on first use
    before = peak_kib()
    table = Synthetic(options.rows, options.targets)
    scores = np.empty(options.rows, dtype=np.float32)
    usable = np.ones(options.rows, dtype=bool)

    def keep(start: int, sums: Any) -> None:  # noqa: ANN401 - (m, t) float32
        scores[start : start + len(sums)] = sums.mean(axis=1)

    began, cpu = time.perf_counter(), time.process_time()
    if options.rule not in PER_TARGET:
        table.stream(keep)
    chosen = np.empty(0, dtype=np.int64)
    if options.rule != "none":
        chosen = Rule(options.rule).choose(options.k, scores, table, usable=usable)
    seconds = time.perf_counter() - began
    if len(np.unique(chosen)) != (options.k if options.rule != "none" else 0):
        raise SystemExit("rows are missing; the figures mean nothing")
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "making_seconds": round(table.seconds, 1),
        "peak_mib": round((peak_kib() - before) / 1024),
    }


def peak_kib() -> int:
    """Highest RSS of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(rule: str, k: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one rule in a fresh interpreter."""
    command = [sys.executable, __file__, "--rule", rule, "--k", str(k), "--rows",
               str(options.rows), "--targets", str(options.targets)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> int:
    """Measure every rule, append to the CSV; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--k", type=int, default=10_000)
    parser.add_argument("--rule", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rule is not None:
        print(json.dumps(measure(options)))
        return 0
    lines = []
    for rule in RULES:
        line = {"rows": options.rows, "targets": options.targets, "rule": rule, "k": options.k}
        line |= child(rule, options.k, options)
        lines.append(machine(1) | line)
        echo(", ".join(f"{key} {value}" for key, value in line.items()))
    append(RESULTS / "subset_cost.csv", lines)
    bound = [line for line in lines if line["rule"] != "facility_location"]
    over = [li for li in bound if li["seconds"] > LIMIT_SECONDS or li["peak_mib"] > LIMIT_MIB]
    return int(bool(over))


if __name__ == "__main__":
    raise SystemExit(main())
