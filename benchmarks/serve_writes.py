"""Cost of writing by HTTP: files that a server takes, checks and syncs, under load of many clients.

    python -m venv /tmp/locust && /tmp/locust/bin/pip install locust     # an environment of its own
    uv run python benchmarks/serve_writes.py --locust /tmp/locust/bin/locust    # a minute, 4 GB

Locust sends chunks of one generation, each under its own name: rows of features as a unit has them,
and the chunk of their norms, which is small. The server is the command's, with a store in a folder
of `--folder`; each answer comes when the disk has the file. *On disk* are the same files, published
one after the other by the store's own code without a server: what a local build pays. Appends to
results/serve_writes.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from report import RESULTS, append, machine
from serve import server

WRITE_KEY = "a-key-of-the-benchmark-to-write"
DIM, UNIT_ROWS = 4096, 256
LOAD = Path(__file__).parent / "load" / "locustfile.py"

#: Array whose chunks are sent -> clients at once.
PARTS = (("features", 1), ("features", 16), ("norm", 1), ("norm", 16))


def main() -> int:
    """Run all parts, print the lines, append them to the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--locust", default="locust", help="the program")
    parser.add_argument("--seconds", type=int, default=10, help="of each part")
    parser.add_argument("--units", type=int, default=4000, help="that a part may write")
    parser.add_argument("--folder", default=None, help="where the temporary store goes")
    options = parser.parse_args()
    os.environ["GRADSTORE_WRITE_TOKEN"] = WRITE_KEY  # of the server, too
    lines = []
    for array, clients in PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="writes-") as folder:
            lines.append(measured(Path(folder), array, clients, options))
        print(", ".join(f"{name} {value}" for name, value in lines[-1].items()))
    append(RESULTS / "serve_writes.csv", lines)
    return int(any(line["failures"] for line in lines))


def measured(folder: Path, array: str, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """Let clients write chunks of one array for some seconds."""
    body = chunk_of(array)
    (folder / "body").write_bytes(body)
    line = machine(1, "") | {"array": array, "bytes": len(body), "clients": clients}
    with server(folder / "served", "--writable") as (address, pid), watched(pid) as memory:
        plan(address, options.units)
        memory.clear()
        time.sleep(0.3)
        before = max(memory)
        told = subprocess.run(
            [options.locust, "--headless", "--locustfile", LOAD, "--host", address,
             "--users", str(clients), "--spawn-rate", str(clients),
             "--run-time", f"{options.seconds}s", "--csv", folder / "load", "--only-summary"],
            env={**os.environ, "BODY": str(folder / "body"),
                 "WHERE": f"generations/train/0/{array}/c/%d" + "/0" * (array == "features")},
            capture_output=True, text=True,
        )  # fmt: skip
        if not (folder / "load_stats.csv").exists():
            raise RuntimeError(told.stderr[-2000:])
        peak = max(memory)
    with (folder / "load_stats.csv").open(newline="") as file:
        found = next(row for row in csv.DictReader(file) if row["Name"] == "chunk")
    rate = float(found["Requests/s"])
    on_disk = published_ms(folder / "local", body)
    return line | {
        "requests": int(found["Request Count"]), "failures": int(found["Failure Count"]),
        "requests_s": round(rate, 1), "mb_s": round(rate * len(body) / 1e6, 2),
        "p50_ms": float(found["50%"]), "p99_ms": float(found["99%"]),
        "on_disk_p50_ms": on_disk, "memory_before_mib": before,
        "memory_peak_mib": peak,
    }  # fmt: skip


def chunk_of(array: str) -> bytes:
    """Build the file of one chunk of an array; the same values for every unit."""
    import numpy as np

    from gradstore.format.layout import arrays
    from gradstore.store.unit_files import chunk_file

    spec = next(each for each in arrays(DIM, "float16") if each.name == array)
    shape = (UNIT_ROWS,) if spec.width is None else (UNIT_ROWS, spec.width)
    values = np.random.default_rng(0).standard_normal(shape).astype(spec.dtype)
    return chunk_file(values, spec, UNIT_ROWS)


def plan(address: str, units: int) -> None:
    """Make the store through the server, and plan a generation of so many units."""
    import numpy as np

    from gradstore.format.plans import Plan
    from gradstore.format.provenance import provenance_bytes, read_provenance
    from gradstore.format.records import GenerationRecord, RowSet
    from gradstore.storage.places import files_at
    from gradstore.store.space_writer import publish_plan
    from gradstore.store.writer import StoreWriter

    record = GenerationRecord(
        name="train/0", role="train", step=0, run_id="benchmark", adapter_hash="0" * 64,
        effective_seed=0, projection={"method": "none", "d": DIM, "seed": 0}, feature="sgd",
    )  # fmt: skip
    hashes = np.zeros((units * UNIT_ROWS, 16), dtype=np.uint8)
    hashes[:, :8] = np.arange(len(hashes), dtype="<u8").view(np.uint8).reshape(-1, 8)
    provenance = {"benchmark": "serve_writes"}
    _, seal = read_provenance(provenance_bytes("gradient", provenance), "gradient")
    wanted = Plan("train/0", "gradient", seal, record, RowSet(hashes), DIM, "float16")
    files = files_at(address)
    with StoreWriter(address, provenance=provenance, files=files) as writer:
        # Not by `begin`, which looks for each of the units.
        publish_plan(files, writer.store, wanted)


@contextmanager
def watched(pid: int) -> Iterator[list[int]]:
    """Note a process's own memory in MiB, mapped files not counted, ten times a second."""
    seen: list[int] = []
    ends = threading.Event()

    def watch() -> None:
        while not ends.wait(0.1):
            status = Path(f"/proc/{pid}/status").read_text()
            own = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            seen.append(int(own.split()[1]) >> 10)

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    ends.set()
    thread.join()


def published_ms(folder: Path, body: bytes) -> float:
    """Publish the same bytes without a server; milliseconds of one, median of 30."""
    from gradstore.storage.local import StoreFiles

    files = StoreFiles(folder)
    files.make_root()
    times = []
    for number in range(31):  # the first makes the folders
        began = time.perf_counter()
        files.publish(f"generations/c/{number}", body)
        times.append(1000 * (time.perf_counter() - began))
    files.close()
    return round(statistics.median(times[1:]), 1)


if __name__ == "__main__":
    raise SystemExit(main())
