"""Cost of asking by HTTP: a query of a row above the scan itself, many clients, the first paint.

    uv run python benchmarks/serve.py                     # 2 GB of disk, a few minutes

*Query*: `POST /v1/query` of another target row each time (none is kept), alternating with
`query_influence` on the same store in this process; medians, page cache warm. *Clients*: 16 at
once, each with questions of its own; errors are counted, and the server's memory is read before and
after. *First paint*: a browser opens the table of 100,000 rows with text; the time from the request
to the first row on the screen, the scan of their scores included (needs playwright and chromium).
Appends to results/serve.csv.
"""

from __future__ import annotations

import argparse
import operator
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from report import RESULTS, append, machine

TOKEN = "a-token-for-the-benchmark"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
TARGET_ROWS = 512
TABLE_ROWS, TABLE_DIM = 100_000, 256


def main() -> int:
    """Run all parts, print the line, append it to the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--folder", default=None, help="where the temporary stores go")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="serve-") as folder:
        line = machine(1, "") | {"rows": options.rows, "dim": options.dim}
        write(Path(folder, "large"), options.rows, options.dim)
        line |= queries(Path(folder, "large"), options)
        write(Path(folder, "table"), TABLE_ROWS, TABLE_DIM, text=True)
        line |= {"table_rows": TABLE_ROWS, "first_paint_ms": first_paint(Path(folder, "table"))}
    for name, value in line.items():
        print(f"{name:20}{value}")
    append(RESULTS / "serve.csv", [line])
    return int(line["errors"] > 0)


def write(
    path: Path,
    rows: int,
    dim: int,
    *,
    text: bool = False,
    dtype: str = "float16",
    losses: bool = False,
) -> None:
    """Write a store with one train and one target generation."""
    import numpy as np

    from gradstore.format.records import GenerationRecord, RowSet
    from gradstore.format.text_table import Text
    from gradstore.store.writer import StoreWriter

    rng = np.random.default_rng(0)
    base = rng.standard_normal((256, dim), dtype=np.float32)
    with StoreWriter(path, provenance={"benchmark": "serve"}) as writer:
        for name, count, first in (("train/0", rows, 0), ("target/set/0", TARGET_ROWS, rows)):
            record = GenerationRecord(
                name=name, role="target" if first else "train", set="set" if first else "", step=0,
                run_id="benchmark", adapter_hash="0" * 64, effective_seed=0,
                projection={"method": "none", "d": dim, "seed": 0}, feature="sgd",
            )  # fmt: skip
            hashes = np.zeros((count, 16), dtype=np.uint8)
            hashes[:, :8] = (
                np.arange(first, first + count, dtype="<u8").view(np.uint8).reshape(count, 8)
            )
            kept = RowSet(hashes, tuple((f"set {i % 5}", i) for i in range(count)))
            generation = writer.begin(record, kept, dim=dim, dtype=dtype, losses=losses)
            for unit in list(generation.pending):
                size = unit.stop - unit.start
                # Fresh enough: no two units alike, and no time spent on drawing numbers.
                shift = int(rng.integers(dim))
                features = np.roll(base, shift, axis=1)[rng.permutation(256)[:size]]
                ok, tokens = np.zeros(size, dtype=np.uint8), np.arange(size, dtype=np.int32) + 1
                ones = np.ones(size, np.float32)
                loss = ones if losses else None
                generation.write_unit(unit.index, features, ones, ok, tokens, loss)
            generation.commit()
            if text:
                words = (Text(f"Say {i} in words, {i % 97} times.", f"{i} " * 20, 40)
                         for i in range(count))  # fmt: skip
                writer.keep_texts(kept, words)


@contextmanager
def server(path: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Serve a store in a process of its own: its address and process id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dataflex", "gradstore", "serve", str(path), "--port", "0",
         *options],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "GRADSTORE_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.readline()
    yield process.stdout.readline().strip().partition("/?")[0], process.pid
    process.terminate()
    process.wait()


def queries(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure single queries beside the scan, then many clients."""
    from gradstore.scoring.pairing import checkpoint_features
    from gradstore.scoring.query import query_influence
    from gradstore.store.reader import open_store

    pairs = checkpoint_features(open_store(path))
    rows = iter(range(TARGET_ROWS))
    with server(path) as (address, pid), httpx.Client(headers=HEADERS, timeout=120) as client:
        url = f"{address}/v1/query?wait=60"
        scans, asked = [], []
        for number in range(options.repeats + 1):  # the first checks every checksum
            row = next(rows)
            began = time.perf_counter()
            query_influence(pairs, row)
            middle = time.perf_counter()
            client.post(url, json={"target_row": row}).raise_for_status()
            if number:
                scans.append(1000 * (middle - began))
                asked.append(1000 * (time.perf_counter() - middle))
        before = memory_mib(pid)
        began = time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            codes = list(pool.map(
                lambda row: client.post(url, json={"target_row": row}).status_code,
                [next(rows) for _ in range(4 * options.clients)],
            ))  # fmt: skip
        seconds = time.perf_counter() - began
        after = memory_mib(pid)
    return {
        "scan_p50_ms": round(statistics.median(scans), 1),
        "query_p50_ms": round(statistics.median(asked), 1),
        "above_p50_ms": round(statistics.median(map(operator.sub, asked, scans)), 1),
        "repeats": options.repeats,
        "clients": options.clients,
        "client_queries": len(codes),
        "errors": sum(code != 200 for code in codes),
        "client_queries_s": round(len(codes) / seconds, 2),
        "memory_before_mib": before,
        "memory_after_mib": after,
    }


def memory_mib(pid: int) -> int:
    """Read the memory of a process that is its own, mapped files not counted."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(li for li in status.splitlines() if li.startswith("RssAnon")).split()[1]) >> 10


def first_paint(path: Path) -> float | str:
    """Open the table in a browser; milliseconds until its first row is seen, median of five."""
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return ""
    with server(path) as (address, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"{address}/?token={TOKEN}")
        times = []
        for number in range(6):  # the first opens the store's files
            began = time.perf_counter()
            page.goto(f"{address}/?view=rows&row={number}")
            page.locator("#spacer [role=row]").first.wait_for()
            times.append(1000 * (time.perf_counter() - began))
        browser.close()
    return round(statistics.median(times[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
