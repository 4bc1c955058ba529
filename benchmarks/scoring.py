"""Exact scores of a stored generation by ours, by plain torch and by FAISS: speed and memory.

    uv run python benchmarks/scoring.py              # 10,000, 100,000 and 1,000,000 rows
    uv run python benchmarks/scoring.py --rows 10000 100000

Takes ten to fifteen minutes on two cores, 9 GB of disk and 18 GB of memory, of which FAISS needs
nearly all; up to 100,000 rows two minutes, 1 GB and 5 GB.

Each store holds so many rows x 4,096 float16, and 4 target sets of 8 rows. *Ours* is
`influence_scores`: every row's cosines to 4 queries, checksums included where they are due. *torch*
reads the same files and multiplies, `x.float() @ queries.T`, without checks and norms: each file
with `np.fromfile` or by a memory map, whichever of the two is faster there (`way`). Three states:

    disk      neither side's pages are in memory, the store has just been opened
    opened    pages are in memory, the store has just been opened: every crc32c is computed
    checked   pages are in memory, the store's chunks have been checked

*FAISS* searches an index that lies in memory for the best 1,000 rows of each query, beside *ours*
in state `checked`. What comes before, reading the rows from disk, normalising and adding them, is
`build_s`, once. The index is `IndexFlatIP`, float32; at a million rows that would take 16 GB of
float32 beside everything else, so where it would be more than 6 GB it is `IndexScalarQuantizer` of
float16, which holds what the store holds.

All ways of a state take turns in one process (A B C A B C), after a round that warms up; `ratio` is
a speed, ours over the other's, the median over the rounds. Products are compared first: figures of
different scores would mean nothing.

*Memory*: `ru_maxrss` of a process that does one way once, minus the same after its imports; mapped
pages count. This parent imports no library: Linux hands a parent's peak to the child it starts.

Prints the lines and appends them to results/scoring.csv. Exits 1 where ours has under 0.9 of
torch's speed at a million rows from disk, or takes more than 1 GiB at any size.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import RESULTS, Took, append, compared, drop, echo, machine, timed
from throughput import features

if TYPE_CHECKING:
    import faiss
    import numpy as np
    import torch

    from gradstore.format.plans import UnitRange
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.store.generation import Generation
    from gradstore.store.writer import StoreWriter

LIMIT, LIMIT_ROWS, LIMIT_STATE = 0.9, 1_000_000, "disk"
LIMIT_MIB = 1024
TARGET_SETS, TARGET_ROWS = 4, 8

#: Rows that FAISS returns for each query, and bytes above which its index is of float16.
BEST, FLAT_BYTES = 1000, 6e9

#: Products of float16 rows in float32, by three programs: how far they may lie apart.
APART = 2e-3

#: Units that are written at once, so that their waiting for the disk overlaps.
BEHIND = 4

#: (path, rows, d) of a file of features.
Chunk = tuple[str, int, int]
Load = Callable[[str, int, int], "np.ndarray"]


def main() -> int:
    """Run all steps, print the lines, append them to the CSV; return 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", help="of the products; FAISS is for the CPU")
    parser.add_argument("--folder", default=None, help="where the temporary stores go")
    parser.add_argument("--csv", type=Path, default=RESULTS / "scoring.csv")
    parser.add_argument("--step", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--way", default="", help=argparse.SUPPRESS)
    parser.add_argument("--store", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step is not None:
        steps: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
            "write": write, "memory": memory, "speed": speed
        }  # fmt: skip
        echo(json.dumps(steps[options.step](options)))
        return 0
    lines: list[dict[str, Any]] = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="scoring-") as folder:
            lines += of_size(rows, str(Path(folder, "store")), options)
    append(options.csv, lines)
    return int(any(is_over(line) for line in lines))


def of_size(rows: int, store: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write a store, measure every way over it, print the lines."""
    write_s = child("write", store, rows, options)["seconds"]
    ways = ["ours", "read", "map", *(["faiss"] if options.device == "cpu" else [])]
    peaks = {way: child("memory", store, rows, options, way)["peak_mib"] for way in ways}
    found = child("speed", store, rows, options)
    where = machine(options.threads, found["chip"])
    lines = []
    for line in found["lines"]:
        other = "faiss" if line["beside"] == "faiss" else line["way"]
        sizes = {"device": options.device, "rows": rows, "dim": options.dim, "write_s": write_s}
        memories = {"ours_peak_mib": peaks["ours"], "beside_peak_mib": peaks[other]}
        lines.append(where | sizes | line | memories)
        echo(", ".join(f"{key} {value}" for key, value in (sizes | line | memories).items()))
    return lines


def is_over(line: dict[str, Any]) -> bool:
    """Say that a line misses a limit."""
    is_limited = (line["rows"], line["state"], line["beside"]) == (LIMIT_ROWS, LIMIT_STATE, "torch")
    return bool(is_limited and line["ratio"] < LIMIT) or bool(line["ours_peak_mib"] > LIMIT_MIB)


def child(
    step: str, store: str, rows: int, options: argparse.Namespace, way: str = ""
) -> dict[str, Any]:
    """Run one step in a fresh interpreter."""
    command = [sys.executable, __file__, "--step", step, "--way", way, "--store", store]
    command += ["--rows", str(rows), "--dim", str(options.dim)]
    command += ["--pairs", str(options.pairs), "--device", options.device]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ---- steps, each in a process of its own -----------------------------------------------------


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Write a train generation and the target generations of one checkpoint."""
    from gradstore.store.writer import StoreWriter

    began = time.perf_counter()
    with StoreWriter(options.store, provenance={"benchmark": "scoring"}) as writer:
        for number in range(TARGET_SETS):
            generation(writer, f"target/set{number}/0", TARGET_ROWS, options.dim, number)
        generation(writer, "train/0", options.rows[0], options.dim, TARGET_SETS)
    os.sync()  # pages that are not yet written can't be dropped
    return {"seconds": round(time.perf_counter() - began, 1)}


def generation(writer: StoreWriter, name: str, rows: int, dim: int, skipped: int) -> None:
    """Write and commit one generation.

    Args:
        writer: of the store.
        name: `train/0` or `target/SET/0`.
        rows: n.
        dim: d.
        skipped: rows of the first unit that are left out, so that no two sets are alike.
    """
    import numpy as np

    from gradstore.export.units import UnitFeatures
    from gradstore.format.records import GenerationRecord, RowSet
    from gradstore.store.filling import fill

    role, _, rest = name.partition("/")
    record = GenerationRecord(
        name=name, role="train" if role == "train" else "target",
        set=rest.partition("/")[0] if role == "target" else "", step=0, run_id="benchmark",
        adapter_hash="0" * 64, effective_seed=0,
        projection={"method": "none", "d": dim, "seed": 0}, feature="sgd",
    )  # fmt: skip
    hashes = np.arange(2 * rows, dtype=np.uint64).view(np.uint8).reshape(rows, 16)
    begun = writer.begin(record, RowSet(hashes), dim=dim)
    blocks = features(rows + skipped, dim)
    kept: list[np.ndarray] = [next(blocks)[skipped:]]

    def compute(unit: UnitRange) -> UnitFeatures:
        count = unit.stop - unit.start
        while sum(map(len, kept)) < count:
            kept.append(next(blocks))
        together = np.concatenate(kept)
        kept[:] = [together[count:]]
        ones = np.ones(count, np.float32)
        status, tokens = np.zeros(count, np.uint8), np.ones(count, np.int32)
        return UnitFeatures(unit, together[:count], ones, status, tokens, 0)

    fill(begun, compute, behind=BEHIND)
    begun.commit()


def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what opening a store and scoring it in one way adds to the interpreter's peak."""
    # What the imports take is not the way's.
    import torch

    import gradstore.scoring.influence
    import gradstore.store.reader

    if options.way == "faiss":
        import faiss  # noqa: F401

    torch.ones(64, 64) @ torch.ones(64, 64)  # BLAS allocates its buffers on first use
    before = peak_kib()
    checkpoint = open_checkpoint(options.store)
    if options.way == "ours":
        gradstore.scoring.influence.influence_scores([checkpoint], device=options.device)
    else:
        files, queries = chunk_files(checkpoint), queries_of(checkpoint)
        if options.way == "faiss":
            build_index(files).search(queries, min(BEST, options.rows[0]))
        else:
            plain(files, torch.from_numpy(queries).to(options.device), LOADS[options.way])
    return {"peak_mib": round((peak_kib() - before) / 1024, 1)}


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Compare all ways, in turns: a line for each state and other program."""
    import torch

    from gradstore.scoring.influence import influence_scores

    folder, dim = Path(options.store), options.dim
    checked = open_checkpoint(options.store)
    files, queries = chunk_files(checked), queries_of(checked)
    right = torch.from_numpy(queries).to(options.device)

    def ours(checkpoint: CheckpointFeatures | None = None) -> np.ndarray:
        opened = checkpoint or open_checkpoint(options.store)
        return influence_scores([opened], device=options.device).values

    scores = ours(checked)
    check_torch(scores, files[0], right)
    torches: dict[str, Callable[[], object]] = {
        way: partial(plain, files, right, load) for way, load in LOADS.items()
    }
    lines = []
    for state, before in (("disk", partial(drop, folder)), ("opened", lambda: None)):
        times = in_turns({"ours": ours, **torches}, options.pairs, before)
        lines.append({"state": state, **beside_torch(times, dim * options.rows[0])})
    ways: dict[str, Callable[[], object]] = {"ours": partial(ours, checked), **torches}
    if options.device == "cpu":
        drop(folder)
        built: list[faiss.Index] = []
        build_s = timed(lambda: built.append(build_index(files))).wall
        index, best = built[0], min(BEST, options.rows[0])
        check_faiss(scores, index.search(queries, 1)[0])
        ways["faiss"] = partial(index.search, queries, best)
    times = in_turns(ways, options.pairs, lambda: None)
    lines.append({"state": "checked", **beside_torch(times, dim * options.rows[0])})
    if "faiss" in times:
        lines.append({"state": "checked", "beside": "faiss", "way": type(index).__name__,
                      **speeds(times["ours"], times["faiss"], dim * options.rows[0]),
                      "build_s": round(build_s, 2)})  # fmt: skip
    columns = dict.fromkeys(key for line in reversed(lines) for key in line)
    chip = torch.cuda.get_device_name() if options.device != "cpu" else ""
    return {"chip": chip, "lines": [{key: line.get(key, "") for key in columns} for line in lines]}


def in_turns(
    ways: dict[str, Callable[[], object]], rounds: int, before: Callable[[], object]
) -> dict[str, list[Took]]:
    """Time every way once a round, after a round that warms up; `before` comes before each."""
    found: dict[str, list[Took]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            before()
            took = timed(way)
            if number:
                found[name].append(took)
    return found


def beside_torch(times: dict[str, list[Took]], numbers: int) -> dict[str, Any]:
    """Compare ours with the faster of torch's ways."""
    way = min(LOADS, key=lambda name: statistics.median(took.wall for took in times[name]))
    return {"beside": "torch", "way": way, **speeds(times["ours"], times[way], numbers)}


def speeds(ours: Sequence[Took], other: Sequence[Took], numbers: int) -> dict[str, Any]:
    """Compare speeds over so many float16 numbers: `ratio` is the other's seconds over ours."""
    found = compared(other, ours, ("beside", "ours"), digits=4)
    rates = {f"{name}_gb_s": round(2e-9 * numbers / found[f"{name}_s"], 2)
             for name in ("ours", "beside") if found[f"{name}_s"]}  # fmt: skip
    return found | rates


# ---- the other programs ----------------------------------------------------------------------


def plain(files: Sequence[Chunk], queries: torch.Tensor, load: Load) -> torch.Tensor:
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


LOADS: dict[str, Load] = {"read": read_file, "map": map_file}


def build_index(files: Sequence[Chunk]) -> faiss.Index:
    """Read, normalise and add all rows to an index in memory."""
    import faiss
    import numpy as np

    rows, dim = sum(file[1] for file in files), files[0][2]
    index: faiss.Index = faiss.IndexFlatIP(dim)
    if 4 * rows * dim > FLAT_BYTES:
        half = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexScalarQuantizer(dim, half, faiss.METRIC_INNER_PRODUCT)
    for file in files:
        wide = read_file(*file).astype(np.float32)
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
        index.add(wide)
    return index


def check_torch(scores: np.ndarray, file: Chunk, queries: torch.Tensor) -> None:
    """Exit unless the products of the first unit, over its rows' norms, are the scores."""
    import numpy as np

    wide = read_file(*file).astype(np.float64)
    cosines = plain([file], queries, read_file).numpy() / np.linalg.norm(wide, axis=1)[:, None]
    distance = np.abs(cosines.max(axis=1) - scores[: len(wide)]).max()
    if not distance <= APART:
        sys.exit(f"torch's scores lie {distance} from ours; the figures mean nothing")


def check_faiss(scores: np.ndarray, best: np.ndarray) -> None:
    """Exit unless the best product of all is the best score."""
    import numpy as np

    if not abs(float(best.max()) - float(np.max(scores))) <= APART:
        sys.exit(f"FAISS finds {best.max()}, ours {np.max(scores)}; the figures mean nothing")


# ---- the store -------------------------------------------------------------------------------


def train_of(checkpoint: CheckpointFeatures) -> Generation:
    """Return the train rows as the store has them."""
    from gradstore.store.generation import Generation

    assert isinstance(checkpoint.train, Generation)
    return checkpoint.train


def chunk_files(checkpoint: CheckpointFeatures) -> list[Chunk]:
    """List every unit's file of features."""
    train = train_of(checkpoint)
    folder = train.path / "features" / "c"
    return [
        (str(folder / str(u) / "0"), stop - start, train.dim)
        for u, (start, stop) in enumerate(train.units)
    ]


def queries_of(checkpoint: CheckpointFeatures) -> np.ndarray:
    """Return the mean unit row of each target set: (q, d) float32."""
    import numpy as np

    from gradstore.scoring.scan import unit_rows

    means = [unit_rows(t.read(0, t.rows))[0].mean(axis=0) for t in checkpoint.targets]
    return np.stack(means).astype(np.float32)


def open_checkpoint(path: str) -> CheckpointFeatures:
    """Open the store as the command line does."""
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.store.reader import open_store

    store = open_store(path)
    sets = tuple(store.generation(f"target/set{i}/0") for i in range(TARGET_SETS))
    return CheckpointFeatures(store.generation("train/0"), sets)


def peak_kib() -> int:
    """Highest RSS of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    raise SystemExit(main())
