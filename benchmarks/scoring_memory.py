"""Memory and speed of scoring a stored generation: peak RSS that does not grow with n.

    uv run python benchmarks/scoring_memory.py                  # 3.7 GB of disk, a few minutes

Writes two real stores, 50,000 and 200,000 rows x 4,096 float16 (0.4 and 1.6 GB), with `StoreWriter`
in a temporary folder, and scores each against 4 target sets in a fresh process.

*Memory*: `ru_maxrss` of the scoring process at its end minus `ru_maxrss` after its imports; mapped
pages of the store count. This parent imports no libraries: Linux hands a parent's peak to the child
it starts.

*Speed*: `influence_scores` against plain torch that reads and multiplies the same bytes (each
unit's file with `np.fromfile` or a memory map, `.float() @ queries.T`, no checks, no norms),
alternating in one process, medians, page cache warm. The very first pass over a generation also
computes every chunk's crc32c; it is given apart. Prints one table and appends to
results/scoring_memory.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from report import RESULTS, Took, append, compared, machine, timed

if TYPE_CHECKING:
    import numpy as np
    import torch

    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.store.generation import Generation

LIMIT_MIB = 1024
TARGET_SETS = 4
TARGET_ROWS = 8


def main() -> int:
    """Run all steps, print the table, append to the CSV; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs=2, default=[50_000, 200_000])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", default=None, help="where the temporary stores go")
    parser.add_argument("--step", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        steps: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
            "write": write,
            "memory": memory,
            "speed": speed,
        }
        print(json.dumps(steps[options.step](options)))
        return 0

    lines = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="scoring-") as folder:
        for rows in options.rows:
            store = os.path.join(folder, str(rows))
            written = child("write", store, rows, options)
            line: dict[str, Any] = {"rows": rows, "dim": options.dim}
            line["write_seconds"] = written["seconds"]
            line |= child("memory", store, rows, options) | child("speed", store, rows, options)
            chip = line.pop("chip")
            where = machine(options.threads, chip) | {"device": options.device}
            lines.append(where | line)
    show(lines)
    append(RESULTS / "scoring_memory.csv", lines)
    grown = lines[-1]["peak_mib"] - lines[0]["peak_mib"]
    print(f"peak grows by {grown:.0f} MiB from {options.rows[0]:,} to {options.rows[1]:,} rows")
    return int(any(line["peak_mib"] > LIMIT_MIB for line in lines))


def child(step: str, store: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one step in a fresh interpreter."""
    command = [sys.executable, __file__, "--step", step, "--store", store]
    command += ["--rows", str(rows), str(rows), "--dim", str(options.dim)]
    command += ["--repeats", str(options.repeats), "--device", options.device]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# ---- steps, each in a process of its own -----------------------------------------------------


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Write a train generation and the target generations of one checkpoint."""
    import numpy as np

    from gradstore.format.records import GenerationRecord, RowSet
    from gradstore.store.writer import StoreWriter

    began = time.perf_counter()
    rng = np.random.default_rng(0)
    base = rng.standard_normal((256, options.dim), dtype=np.float32)
    sets = {"": options.rows[0]} | {f"set{i}": TARGET_ROWS for i in range(TARGET_SETS)}
    with StoreWriter(options.store, provenance={"benchmark": "scoring_memory"}) as writer:
        for name, rows in sets.items():
            record = GenerationRecord(
                name=f"target/{name}/0" if name else "train/0",
                role="target" if name else "train",
                set=name,
                step=0,
                run_id="benchmark",
                adapter_hash="0" * 64,
                effective_seed=0,
                projection={"method": "none", "d": options.dim, "seed": 0},
                feature="sgd",
            )
            hashes = np.zeros((rows, 16), dtype=np.uint8)
            hashes[:, :8] = np.arange(rows, dtype="<u8").view(np.uint8).reshape(rows, 8)
            generation = writer.begin(record, RowSet(hashes), dim=options.dim)
            for unit in list(generation.pending):
                count = unit.stop - unit.start
                # Fresh enough: no two units alike, and no time spent on drawing numbers.
                shift = int(rng.integers(options.dim))
                features = np.roll(base, shift, axis=1)[rng.permutation(256)[:count]]
                ones = np.ones(count)
                generation.write_unit(
                    unit.index,
                    features,
                    ones.astype(np.float32),
                    np.zeros(count, dtype=np.uint8),
                    ones.astype(np.int32),
                )
            generation.commit()
    return {"seconds": round(time.perf_counter() - began, 1)}


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak RSS of open + score above the interpreter with its imports, and the first pass."""
    import torch

    import gradstore.scoring.influence
    import gradstore.store.reader

    torch.ones(64, 64) @ torch.ones(64, 64)  # BLAS allocates its buffers on first use
    before = peak_kib()
    checkpoint = open_checkpoint(options.store)
    began = time.perf_counter()
    scores = gradstore.scoring.influence.influence_scores([checkpoint], device=options.device)
    seconds = time.perf_counter() - began
    if not scores.usable.all():
        raise SystemExit("rows went missing; the figures mean nothing")
    return {
        "imports_mib": round(before / 1024, 1),
        "peak_mib": round((peak_kib() - before) / 1024, 1),
        "first_pass_gb_s": round(feature_bytes(options) / seconds / 1e9, 2),
    }


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Median times of ours and of both plain ways, alternating."""
    import numpy as np
    import torch

    from gradstore.scoring.influence import influence_scores
    from gradstore.scoring.scan import unit_rows
    from gradstore.store.generation import Generation

    checkpoint = open_checkpoint(options.store)
    targets = [unit_rows(t.read(0, t.rows))[0].mean(axis=0) for t in checkpoint.targets]
    queries = torch.from_numpy(np.stack(targets).astype(np.float32)).to(options.device)
    assert isinstance(checkpoint.train, Generation)
    files = chunk_files(checkpoint.train)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: influence_scores([checkpoint], device=options.device),
        "plain_read": lambda: plain(files, queries, read_file),
        "plain_map": lambda: plain(files, queries, map_file),
    }
    times: dict[str, list[Took]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    for _ in range(options.repeats):
        for name, way in ways.items():
            times[name].append(timed(way))
    size, medians = feature_bytes(options), {n: median_wall(t) for n, t in times.items()}
    faster = min(("plain_read", "plain_map"), key=lambda name: medians[name])
    # Speeds, not times: of ours, over the faster plain way.
    beside = compared(times[faster], times["ours"], ("plain", "ours"))
    return {
        **{f"{name}_gb_s": round(size / wall / 1e9, 2) for name, wall in medians.items()},
        "speed_ratio": beside["ratio"],
        "speed_ratio_min": beside["ratio_min"],
        "speed_ratio_max": beside["ratio_max"],
        "rounds": beside["pairs"],
        "ours_cpu_s": beside["ours_cpu_s"],
        "plain_cpu_s": beside["plain_cpu_s"],
        "chip": torch.cuda.get_device_name() if options.device != "cpu" else "",
    }


def median_wall(times: list[Took]) -> float:
    """Take the median of wall-clock seconds."""
    return statistics.median(took.wall for took in times)


def plain(
    files: list[tuple[str, int, int]],
    queries: torch.Tensor,
    load: Callable[[str, int, int], np.ndarray],
) -> torch.Tensor:
    """Read and multiply, nothing else: (n, q)."""
    import torch

    return torch.cat(
        [torch.from_numpy(load(*f)).to(queries.device).float() @ queries.T for f in files]
    ).cpu()


def read_file(path: str, rows: int, dim: int) -> np.ndarray:
    """Read a unit's rows by plain reading."""
    import numpy as np

    return np.fromfile(path, dtype=np.float16, count=rows * dim).reshape(rows, dim)


def map_file(path: str, rows: int, dim: int) -> np.ndarray:
    """Map a unit's rows privately (writable, or torch would warn)."""
    import numpy as np

    return np.memmap(path, dtype=np.float16, mode="c", shape=(rows, dim))


def chunk_files(generation: Generation) -> list[tuple[str, int, int]]:
    """(path, rows, d) of every unit's chunk of features."""
    folder = generation.path / "features" / "c"
    return [
        (str(folder / str(u) / "0"), stop - start, generation.dim)
        for u, (start, stop) in enumerate(generation.units)
    ]


def open_checkpoint(path: str) -> CheckpointFeatures:
    """Open the store as the command line does."""
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.store.reader import open_store

    store = open_store(path)
    sets = tuple(store.generation(f"target/set{i}/0") for i in range(TARGET_SETS))
    return CheckpointFeatures(store.generation("train/0"), sets)


def feature_bytes(options: argparse.Namespace) -> int:
    """Bytes of the train features."""
    return int(options.rows[0] * options.dim * 2)


def peak_kib() -> int:
    """Highest RSS of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- report ----------------------------------------------------------------------------------


def show(lines: list[dict[str, Any]]) -> None:
    """Print one table, a line per figure and a column per n."""
    for key in lines[0]:
        print(f"{key:18}" + "".join(f"{line[key]!s:>28}" for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
