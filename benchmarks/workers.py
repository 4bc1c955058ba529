"""What a second worker brings: one against two processes that build a store together.

    OMP_NUM_THREADS=1 uv run python benchmarks/workers.py     # about four minutes, 2 quiet cores

The model is left out: a unit of 256 rows costs a fixed amount of hashing, which one core does in
about a quarter of a second, and random features of `--dim` dimensions are written, checked and
committed as any others. Both sides are workers (`gradstore.StoreWriter(worker=...)`), forked from
this process, and write to stores of their own; they alternate A B A B after a warm-up. Wall-clock
runs from the first fork until the last process has ended, opening and commit included; the ratio,
one over two, is the median over the pairs. The store's disk is that of `--folder`. Prints one line,
appends to results/workers.csv, and exits 1 if the ratio is below 1.9.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from report import RESULTS, Took, append, compared, echo, machine

from gradstore import GenerationRecord, RowSet, StoreWriter, Worker, open_store
from gradstore.format.layout import UNIT_ROWS, RowStatus
from gradstore.format.plans import UnitRange

LIMIT = 1.9

#: Bytes that are hashed at a time.
BLOCK = bytes(1 << 20)


@dataclass(frozen=True)
class Build:
    """A generation of synthetic rows.

    Attributes:
        units: of 256 rows each.
        dim: d.
        hashed_mb: MB that are hashed for each unit.
    """

    units: int
    dim: int
    hashed_mb: int

    def run(self, path: Path, number: int, count: int) -> None:
        """Work as one of `count` workers until the generation is committed."""
        hashes = np.arange(self.units * UNIT_ROWS * 2, dtype=np.uint64).view(np.uint8)
        rows = RowSet(hashes.reshape(-1, 16))
        record = GenerationRecord(
            name="train/0", role="train", set="", step=0, run_id="benchmark", adapter_hash="a",
            effective_seed=0, projection={"d": self.dim}, feature="sgd",
        )  # fmt: skip
        with StoreWriter(path, provenance={}, worker=Worker(number, count)) as writer:
            generation = writer.begin(record, rows, dim=self.dim)
            for unit in generation.claimed():
                generation.write_unit(unit.index, *self._computed(unit))
            generation.commit()

    def _computed(self, unit: UnitRange) -> tuple[np.ndarray, ...]:
        """Return features (256, d), norm, status and tokens, after the unit's work."""
        digest = hashlib.sha256()
        for _ in range(self.hashed_mb):
            digest.update(BLOCK)
        k = unit.stop - unit.start
        random = np.random.default_rng(unit.index)
        features = random.standard_normal((k, self.dim), dtype=np.float32)
        return features, np.ones(k), np.full(k, RowStatus.OK, np.uint8), np.ones(k)


def measure(build: Build, path: Path, count: int) -> Took:
    """Wall-clock of a build by `count` processes, and the processor seconds of all of them."""
    fork: Any = multiprocessing.get_context("fork")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    workers = [fork.Process(target=build.run, args=(path, i + 1, count)) for i in range(count)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if any(each.exitcode for each in workers):
        raise SystemExit("a worker failed")
    if open_store(path).generation("train/0").rows != build.units * UNIT_ROWS:
        raise SystemExit("not every row is in the store")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(wall, spent)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--units", type=int, default=64)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--hashed-mb", type=int, default=256, help="work of a unit")
    parser.add_argument("--folder", type=Path, help="where the stores are made")
    parser.add_argument("--csv", type=Path, default=RESULTS / "workers.csv")
    options = parser.parse_args()
    build = Build(options.units, options.dim, options.hashed_mb)
    one: list[Took] = []
    two: list[Took] = []
    with tempfile.TemporaryDirectory(prefix="workers-", dir=options.folder) as folder:
        measure(Build(2, options.dim, 1), Path(folder, "warm-up"), 2)
        for pair in range(options.pairs):
            one.append(measure(build, Path(folder, f"{pair}-one"), 1))
            two.append(measure(build, Path(folder, f"{pair}-two"), 2))
    line = {
        "units": build.units,
        "rows": build.units * UNIT_ROWS,
        "dim": build.dim,
        "hashed_mb": build.hashed_mb,
        **compared(one, two, ("one", "two")),
    }
    echo(", ".join(f"{key} {value}" for key, value in line.items()))
    append(options.csv, [machine() | line])
    return int(float(line["ratio"]) < LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
