"""Writing and reading a store's features beside NumPy's bare memory map of the same numbers.

    OMP_NUM_THREADS=1 uv run python benchmarks/throughput.py      # 10 GB of disk, a few minutes

The same 50,000 x 4,096 float32 rows go to a store as float16 (`fill`: a scale for each row, crc32c
and sha256 of every chunk, each unit fsynced and named, commit) and to an `np.memmap` of float16
(cast, then `flush`, which is msync): A B C A B C, each into new files, nothing dirty from before.
The store is written twice, by `behind`, the units that wait for the disk at once: four, for rows
that come as fast as they are written, and one, as every export of gradients has it. Files of
earlier rounds stay, their pages dropped: ext4 looks through inodes that were freed in the last
minutes whenever it makes a file, which a store's thousand would pay for. So remove nothing large
for five minutes before.

*read all*: every row as float32, a unit at a time, of a store that was just opened, so that each
chunk's crc32c is checked on the way; beside the map's `astype`. *again* is the same of a store
whose chunks have been checked. *256 rows*: others in each round, as float32, of a store that has
been checked; the map's are one fancy index. The page cache is warm; `--cold` drops both sides'
pages before each reading.

*memory*: peak RSS of a process that builds a store of so many rows, above its imports.

Prints a line for each and appends them to results/throughput.csv. `ratio` is the map's time over
ours: speeds, the median over the pairs. Exits 1 where one is below its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from report import RESULTS, Took, append, compared, drop, echo, machine, timed

if TYPE_CHECKING:
    import numpy as np

    from gradstore.format.plans import UnitRange
    from gradstore.store.generation import Generation

UNIT = 256
FEW = 256
#: Units that wait for the disk at once: of rows that come fast, and of an export's.
BEHIND = (4, 1)

#: Smallest speed beside the map's.
LIMITS = {"write": 1.0, "read all": 0.9, "256 rows": 0.5}

#: Rows and d of the stores that memory is measured of: 1,024 to 1,048,576.
BUILT, BUILT_DIM = tuple(4**k * 1024 for k in range(6)), 256


# ---- both sides ------------------------------------------------------------------------------


def features(rows: int, dim: int) -> Iterator[np.ndarray]:
    """Yield (256, d) float32, no two alike, and no time spent on drawing numbers."""
    import numpy as np

    base = np.random.default_rng(0).standard_normal((UNIT, 2 * dim), dtype=np.float32)
    for unit in range(-(-rows // UNIT)):
        yield base[: min(UNIT, rows - unit * UNIT), unit % dim : unit % dim + dim]


def write_store(path: Path, rows: int, dim: int, behind: int) -> None:
    """Write and commit a generation."""
    import numpy as np

    from gradstore.export.units import UnitFeatures
    from gradstore.format.records import GenerationRecord, RowSet
    from gradstore.store.filling import fill
    from gradstore.store.writer import StoreWriter

    record = GenerationRecord(
        name="train/0", role="train", set="", step=0, run_id="benchmark", adapter_hash="0" * 64,
        effective_seed=0, projection={"method": "none", "d": dim, "seed": 0}, feature="sgd",
    )  # fmt: skip
    hashes = np.arange(2 * rows, dtype=np.uint64).view(np.uint8).reshape(rows, 16)
    with StoreWriter(path, provenance={"benchmark": "throughput"}) as writer:
        generation, blocks = writer.begin(record, RowSet(hashes), dim=dim), features(rows, dim)

        def compute(unit: UnitRange) -> UnitFeatures:
            block = next(blocks)
            ones = np.ones(len(block), dtype=np.float32)
            status, tokens = np.zeros(len(block), np.uint8), np.ones(len(block), np.int32)
            return UnitFeatures(unit, block, ones, status, tokens, 0)

        fill(generation, compute, behind=behind)
        generation.commit()


def write_map(path: Path, rows: int, dim: int) -> None:
    """Write the same rows to a bare map."""
    import numpy as np

    held = np.memmap(path, np.float16, mode="w+", shape=(rows, dim))
    for unit, block in enumerate(features(rows, dim)):
        held[unit * UNIT : unit * UNIT + len(block)] = block
    held.flush()


def opened(path: Path) -> Generation:
    """Open a store anew: nothing of it has been checked."""
    from gradstore import open_store

    return open_store(path).generation("train/0")


def read_store(held: Callable[[], Generation]) -> None:
    """Read every row."""
    generation = held()
    for start, stop in generation.units:
        generation.read(start, stop)


def read_map(held: np.ndarray) -> None:
    """Read every row."""
    import numpy as np

    for start in range(0, len(held), UNIT):
        held[start : start + UNIT].astype(np.float32)


# ---- measuring -------------------------------------------------------------------------------


def writing(folder: Path, rows: int, dim: int, pairs: int) -> list[dict[str, Any]]:
    """Compare writing, with each number of units that wait for the disk at once."""
    sides: dict[str, Callable[[Path], None]] = {
        **{f"store {n}": partial(write_store, rows=rows, dim=dim, behind=n) for n in BEHIND},
        "map": partial(write_map, rows=rows, dim=dim),
    }
    found: dict[str, list[Took]] = {name: [] for name in sides}
    for number in range(pairs + 1):
        for name, write in sides.items():
            drop(folder)
            path = folder / (name if number == pairs else f"{name}-{number}")
            found[name].append(timed(partial(write, path), os.sync))
    # The first of each warms up.
    return [
        {"what": "write", "behind": n, **speeds(found[f"store {n}"][1:], found["map"][1:])}
        for n in BEHIND
    ]


def reading(folder: Path, rows: int, dim: int, pairs: int, cold: bool) -> list[dict[str, Any]]:
    """Compare reading: all rows, all rows again, and some."""
    import numpy as np

    store, plain = folder / f"store {BEHIND[0]}", folder / "map"
    held, checked = np.memmap(plain, np.float16, mode="r", shape=(rows, dim)), opened(store)
    read_store(lambda: checked)
    asked = np.random.default_rng(0).integers(rows, size=(pairs + 1, FEW))
    wait: Callable[[], None] = partial(drop, folder) if cold else lambda: None
    of_store: dict[str, Callable[[int], object]] = {
        "read all": lambda _: read_store(lambda: opened(store)),
        "again": lambda _: read_store(lambda: checked),
        "256 rows": lambda number: checked.take(asked[number]),
    }
    of_map: dict[str, Callable[[int], object]] = {
        "read all": lambda _: read_map(held),
        "again": lambda _: read_map(held),
        "256 rows": lambda number: held[asked[number]].astype(np.float32),
    }
    found = []
    for what, work in of_store.items():
        ours: list[Took] = []
        beside: list[Took] = []
        for number in range(pairs + 1):
            for side, times in ((work, ours), (of_map[what], beside)):
                wait()
                took = timed(partial(side, number))
                if number:
                    times.append(took)
        found.append({"what": what, **speeds(ours, beside)})
    return found


def speeds(ours: list[Took], beside: list[Took]) -> dict[str, Any]:
    """Give both sides' seconds, and the ratio of speeds: the map's seconds over ours."""
    return compared(beside, ours, ("map", "store"), digits=4)


def memory(rows: int, folder: Path) -> float:
    """MiB of peak RSS that building a store adds, in a process of its own."""
    folder.mkdir()
    command = [sys.executable, __file__, "--build", str(rows), "--folder", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def build(rows: int, folder: Path) -> float:
    """Build a store in a folder, and leave it there; MiB of peak RSS above the imports."""
    import gradstore.store.writer  # noqa: F401 - what it takes is not the store's

    write_store(folder / "small", UNIT, BUILT_DIM, BEHIND[0])
    before = peak_kib()
    write_store(folder / "store", rows, BUILT_DIM, BEHIND[0])
    return (peak_kib() - before) / 1024


def peak_kib() -> int:
    """Peak RSS of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    """Run all parts, print the lines, append them to the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--cold", action="store_true", help="drop pages before each reading")
    parser.add_argument("--folder", help="where the temporary stores go")
    parser.add_argument("--csv", type=Path, default=RESULTS / "throughput.csv")
    parser.add_argument("--build", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build is not None:
        echo(json.dumps(build(options.build, Path(options.folder))))
        return 0
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="throughput-") as temporary:
        folder, shape = Path(temporary), (options.rows, options.dim)
        # Before this process has loaded a library: its children's peak begins with its own.
        for rows in BUILT:
            peak = round(memory(rows, folder / f"memory-{rows}"), 1)
            lines.append({"what": "memory", "rows": rows, "dim": BUILT_DIM, "peak_mib": peak})
        of_both = [*writing(folder, *shape, options.pairs),
                   *reading(folder, *shape, options.pairs, options.cold)]  # fmt: skip
    cache = "cold" if options.cold else "warm"
    lines += [{"rows": options.rows, "dim": options.dim, "cache": cache, **each}
              for each in of_both]  # fmt: skip
    for line in lines:
        echo(", ".join(f"{key} {value}" for key, value in line.items()))
    columns = dict.fromkeys(key for line in (of_both[0], *lines) for key in line)
    where = machine(threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    append(options.csv, [where | {key: line.get(key, "") for key in columns} for line in lines])
    return int(any(each["ratio"] < LIMITS.get(each["what"], 0) for each in of_both))


if __name__ == "__main__":
    raise SystemExit(main())
