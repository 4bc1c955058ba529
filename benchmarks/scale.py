"""Ten million rows of one bit a coordinate: build, exact scan and choice of the best 5%.

    OMP_NUM_THREADS=2 uv run python benchmarks/scale.py    # 9 GB of disk in 350,000 files
    OMP_NUM_THREADS=2 uv run python benchmarks/scale.py --unit-rows 4096    # in 22,000 files

Random signs, d = 4,096, 512 bytes a row, with losses, in units of 256 rows, as every command writes
them, beside a target set of 8 rows. The rows are given to the store as they are stored: rotating
and packing is the export's work, and `encode` is its rate, on one thread.

*build*: plan, every unit with checksums and fsync, commit. *bytes a row*: of all files of the
generation and its plan. *scan*: `influence_scores` of every row, in turns (A B A B) with reading
the same files into one buffer: `ratio` is the speed beside that. *first* is of a store just opened
(records, and every chunk's crc32c), *again* of one whose chunks have been checked; *cold* is
*first* where neither side's pages are in the page cache. *choice*: the best 5% of the scores.

*rerank*: the best 5% among 7.5%, by a second store, as `select --rerank-store` takes them: both
stores opened, compared and paired, and the candidates read and scored, no page in the page cache.
It is measured on fewer rows (`--rerank-rows`), because the second store, of random int8, has eight
times the bytes; `row_bytes` are that one's, and the candidates lie everywhere in it.

Prints a line for each and appends them to results/scale.csv. Exits 1 if *cold* is below 0.8.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, Took, append, compared, drop, echo, machine, on_disk, timed

from gradstore import checkpoint_features, open_store, select_top
from gradstore.format.codec import encode
from gradstore.format.layout import UNIT_ROWS, RowStatus, generation_path, plan_path
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.scoring.choose import Choice
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.rescored import Reranked, check_same_rows, rerank
from gradstore.scoring.rules import Rule
from gradstore.store.reader import Store
from gradstore.store.writer import StoreWriter

DIM, TARGET_ROWS, SHARE = 4096, 8, 0.05
LIMIT = 0.8
#: Bytes of a row's features.
WIDTHS = {"1bit": DIM // 8, "int8": DIM}


def record(name: str, role: str) -> GenerationRecord:
    """Describe a synthetic generation."""
    return GenerationRecord(
        name=name, role="train" if role == "train" else "target",
        set="" if role == "train" else "skill", step=0, run_id="benchmark", adapter_hash="0" * 64,
        effective_seed=0, projection={"method": "none", "d": DIM, "seed": 0}, feature="sgd",
    )  # fmt: skip


def build(path: Path, rows: int, unit_rows: int, dtype: str = "1bit") -> None:
    """Write and commit the target set and the rows."""
    draw = np.random.default_rng(0)
    stored, width = ("uint8" if dtype == "1bit" else dtype), WIDTHS[dtype]
    with StoreWriter(path, provenance={"benchmark": "scale"}) as writer:
        few = np.arange(2 * TARGET_ROWS, dtype=np.uint64).view(np.uint8).reshape(TARGET_ROWS, 16)
        target = writer.begin(record("target/skill/0", "target"), RowSet(few), dim=DIM)
        ones = np.ones(TARGET_ROWS, np.float32)
        features = draw.standard_normal((TARGET_ROWS, DIM), dtype=np.float32)
        target.write_unit(0, features, ones, np.zeros(TARGET_ROWS, np.uint8), ones)
        target.commit()
        hashes = np.arange(2 * rows, dtype=np.uint64).view(np.uint8).reshape(rows, 16)
        train = writer.begin(record("train/0", "train"), RowSet(hashes), dim=DIM, dtype=dtype,
                             unit_rows=unit_rows, losses=True)  # fmt: skip
        for unit in list(train.pending):
            k = unit.stop - unit.start
            ones = np.ones(k, np.float32)
            train.copy_unit(unit.index, {
                "features": np.frombuffer(draw.bytes(k * width), stored).reshape(k, width),
                "scale": ones, "norm": ones, "status": np.full(k, RowStatus.OK.value, np.uint8),
                "tokens": np.ones(k, np.int32), "row_hash": hashes[unit.start : unit.stop],
                "loss": ones,
            })  # fmt: skip
        train.commit()


def row_bytes(path: Path, rows: int) -> float:
    """Sum the files of the rows' generation and its plan: bytes a row."""
    return on_disk(path / generation_path("train/0"), path / plan_path("train/0"))[0] / rows


def score(store: Store) -> np.ndarray:
    """Score every row."""
    return np.asarray(influence_scores(checkpoint_features(store)).values)


def read(files: list[Path], buffer: bytearray) -> None:
    """Read the features' files, one after another."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            file.readinto(buffer)


def scans(path: Path, pairs: int) -> list[dict[str, Any]]:
    """Compare scans with reading the same bytes."""
    files = sorted((path / "generations/train/0/features/c").glob("*/0"), key=_number)
    buffer = bytearray(files[0].stat().st_size)
    checked = open_store(path)
    score(checked)
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "cold": (lambda: score(open_store(path)), partial(drop, path)),
        "first": (lambda: score(open_store(path)), lambda: None),
        "again": (lambda: score(checked), lambda: None),
    }
    found = []
    for what, (work, before) in sides.items():
        ours: list[Took] = []
        beside: list[Took] = []
        for number in range(pairs + 1):  # the first warms up, or not
            for side, times in ((work, ours), (partial(read, files, buffer), beside)):
                before()
                took = timed(side)
                if number:
                    times.append(took)
        found.append({"what": what, **compared(beside, ours, ("read", "scan"))})
    return found


def _number(path: Path) -> int:
    return int(path.parent.name)


def encoded(pairs: int) -> float:
    """Seconds of rotating and packing one unit's rows."""
    rows = np.random.default_rng(1).standard_normal((256, DIM), dtype=np.float32)
    usable = np.ones(256, bool)
    took = [timed(partial(encode, rows, usable, "1bit")).wall for _ in range(pairs + 1)]
    return statistics.median(took[1:])


def reranked(first: Path, second: Path) -> Reranked:
    """Take the best rows by the second store's scores of the first one's candidates."""
    pairs, again = (checkpoint_features(open_store(path)) for path in (first, second))
    check_same_rows(pairs, again)
    return rerank(Choice(Rule("top"), fraction=SHARE), influence_scores(pairs), again)


def rerank_line(folder: Path, rows: int, unit_rows: int, pairs: int) -> dict[str, Any]:
    """Measure a re-rank: what it takes beyond the first store's scan, which is measured beside."""
    first, second = folder / "first", folder / "second"
    build(first, rows, unit_rows)
    build(second, rows, unit_rows, "int8")
    both: list[Took] = []
    scanned: list[Took] = []
    found: list[Reranked] = []
    for _ in range(pairs):
        drop(folder)
        both.append(timed(lambda: found.append(reranked(first, second))))
        drop(folder)
        scanned.append(timed(lambda: score(open_store(first))))
    more = [Took(a.wall - b.wall, a.cpu - b.cpu) for a, b in zip(both, scanned, strict=True)]
    return {
        "what": "rerank", "rows": rows, "candidates": len(found[0].candidates), "pairs": pairs,
        "scan_s": round(statistics.median(took.wall for took in more), 2),
        "scan_cpu_s": round(statistics.median(took.cpu for took in more), 2),
        "row_bytes": round(row_bytes(second, rows), 1),
    }  # fmt: skip


def main() -> int:
    """Run all parts, print the lines, append them to the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--unit-rows", type=int, default=UNIT_ROWS)
    parser.add_argument("--rerank-rows", type=int, default=500_000, help="0 leaves it out")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", help="where the temporary store goes")
    parser.add_argument("--csv", type=Path, default=RESULTS / "scale.csv")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []

    def line(**found: object) -> None:
        lines.append({"rows": options.rows, "unit_rows": options.unit_rows, **found})
        echo(", ".join(f"{key} {value}" for key, value in lines[-1].items()))

    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scale-") as folder:
        path = Path(folder, "store")
        took = timed(partial(build, path, options.rows, options.unit_rows), os.sync)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        line(what="build", scan_s=round(took.wall, 1), scan_cpu_s=round(took.cpu, 1), peak_mib=peak)
        line(what="bytes a row", row_bytes=round(row_bytes(path, options.rows), 1))
        line(what="encode", scan_s=round(encoded(options.pairs) / 256 * 1e6, 2))
        for found in scans(path, options.pairs):
            line(**found)
        scores = score(open_store(path))
        took = timed(partial(select_top, scores, round(SHARE * options.rows)))
        line(what="choice", scan_s=round(took.wall, 2), scan_cpu_s=round(took.cpu, 2))
        if options.rerank_rows:
            small = Path(folder, "rerank")
            line(**rerank_line(small, options.rerank_rows, options.unit_rows, options.pairs))
    columns = dict.fromkeys(key for each in lines for key in each)
    where = machine()
    append(options.csv, [where | {key: each.get(key, "") for key in columns} for each in lines])
    return int(any(each["what"] == "cold" and each["ratio"] < LIMIT for each in lines))


if __name__ == "__main__":
    raise SystemExit(main())
