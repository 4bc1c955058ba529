"""How long a run's report takes to make, and how large it is, for a long run of many rows.

uv run python benchmarks/report_page.py
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, append, echo, machine, timed

from dataflex.report.page import REPORT, draw
from dataflex.run.log import RunLog
from dataflex.run.spread import spread_of

ROWS, CHOSEN, UPDATES, REPEATS = 100_000, 5_000, 20, 5
LIMIT_SECONDS, LIMIT_BYTES = 3.0, 1_500_000
WORDS = ["river", "<b>", "&", "seven", "blue", "数据", "loss", "add", "the"]


def record(folder: Path) -> None:
    """Write the files of a run: rows with some 800 characters of text, four sets, eight kinds."""
    log, generator = RunLog(folder), np.random.default_rng(0)
    words, n = random.Random(0), np.ones(ROWS, dtype=bool)
    log.receipt.begin("benchmark", {"seed": 0}, {"train_rows": ROWS}, 0)
    texts = [" ".join(words.choices(WORDS, k=80)) for _ in range(1000)]

    def lines(rows: list[int], scores: list[float]) -> list[dict[str, Any]]:
        return [
            {"rank": i, "row": row, "score": score, "source": [f"set_{row % 4}", row],
             "prompt": texts[row % 1000], "response": texts[row % 999]}
            for i, (row, score) in enumerate(zip(rows, scores, strict=True), 1)
        ]  # fmt: skip

    for step in range(10, 10 * UPDATES + 1, 10):
        scores = generator.normal(size=ROWS)
        rows = np.argsort(-scores)[:CHOSEN]
        spread = spread_of(scores, n, rows)
        kinds = {f"kind_{i}": int((rows % 8 == i).sum()) for i in range(8)}
        everyone = {f"kind_{i}": ROWS // 8 for i in range(8)}
        manifest = {"all_scores": spread,
                    "kinds": {"column": "kind", "chosen": kinds, "all": everyone}}  # fmt: skip
        log.selection(step, rows, scores[rows], manifest)
        log.rows(f"step_{step}", lines(rows.tolist(), scores[rows].tolist()))
        log.rows(f"lowest_{step}", lines(spread["lowest_rows"], spread["lowest_scores"]))
        log.update("select", step, "less", "", train_rows=ROWS, pause_seconds=3.0, tokens=10**6,
                   chosen={f"set_{i}": CHOSEN // 4 for i in range(4)},
                   train_sets={f"set_{i}": ROWS // 4 for i in range(4)})  # fmt: skip
    log.receipt.end("finished", [])


def main() -> int:
    """Write the figures, print them; 1 if a limit is missed."""
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
        took = [timed(lambda: draw(Path(folder) / "dataflex")) for _ in range(REPEATS)]
        size = (Path(folder) / "dataflex" / REPORT).stat().st_size
    cpu = statistics.median(each.cpu for each in took)
    line = {
        "rows": ROWS, "chosen": CHOSEN, "updates": UPDATES,
        "seconds": round(statistics.median(each.wall for each in took), 2),
        "seconds_min": round(min(each.wall for each in took), 2),
        "seconds_max": round(max(each.wall for each in took), 2),
        "cpu_s": round(cpu, 2), "kb": round(size / 1000),
    }  # fmt: skip
    append(RESULTS / "report_page.csv", [machine() | line])
    echo(", ".join(f"{key} {value}" for key, value in line.items()))
    return int(cpu > LIMIT_SECONDS or size > LIMIT_BYTES)


if __name__ == "__main__":
    sys.exit(main())
