"""What a selection of TSDS costs once rows are embedded: index, neighbours, densities, transport.

    python benchmarks/tsds_cost.py               # about five minutes

Rows are unit vectors around 64 centres; 32 target rows lie around eight of these. `defaults` are
the component's (max_K 5000, kde_K 1000, sigma 0.75); `auto` sets `sigma: auto`. Each figure is a
median of three selections, in a new index each: seconds of the wall, and of the CPU, which other
work on the machine moves less. Prints one line for each and appends to results/tsds_cost.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from report import RESULTS, append, echo, machine

from dataflex.selectors.tsds import TsdsSelector
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName
from gradstore.format.records import RowSet, embedding_record, row_hash
from gradstore.similarity.neighbours import Neighbours
from gradstore.store.generation import Generation
from gradstore.store.writer import StoreWriter

DIM, TARGETS, CHOSEN, CENTRES = 256, 32, 500, 64


def embeddings(n: int, centres: npt.NDArray[np.float32], seed: int) -> npt.NDArray[np.float32]:
    """(n, d) unit vectors around the centres (k, d)."""
    generator = np.random.default_rng(seed)
    noise = generator.standard_normal((n, DIM)).astype(np.float32)
    rows = centres[generator.integers(len(centres), size=n)] + 0.05 * noise
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def commit(writer: StoreWriter, name: GenerationName, rows: npt.NDArray[np.float32]) -> Generation:
    """Commit embeddings (n, d) as a generation."""
    record = embedding_record(name, space="bench", run_id="run", model_hash="aa")
    hashes = RowSet.from_hashes([row_hash([i], [i]) for i in range(len(rows))])
    generation = writer.begin(record, hashes, dim=DIM)
    for unit in list(generation.pending):
        k = unit.stop - unit.start
        generation.write_unit(
            unit.index, rows[unit.start : unit.stop], np.ones(k, np.float32),
            np.full(k, RowStatus.OK, np.uint8), np.ones(k),
        )  # fmt: skip
    generation.commit()
    return writer.store.generation(generation.name)


def seconds(train: Generation, target: Generation, params: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the wall and of the CPU of one selection, its index included."""
    context: Any = SimpleNamespace(
        run=SimpleNamespace(data=SimpleNamespace(train=range(train.rows))),
        step=0,
        among_candidates=lambda usable: usable.copy(),
    )
    began, cpu = time.perf_counter(), time.process_time()
    TsdsSelector(**params).choose(CHOSEN, context, Neighbours(train, [target], None))
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[3000, 10_000, 30_000])
    parser.add_argument("--csv", type=Path, default=RESULTS / "tsds_cost.csv")
    options = parser.parse_args()
    generator, lines = np.random.default_rng(0), []
    centres = generator.standard_normal((CENTRES, DIM)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    for n in options.rows:
        with tempfile.TemporaryDirectory(prefix="tsds-cost-") as folder:
            with StoreWriter(Path(folder) / "s", space="bench", provenance={"dim": DIM}) as writer:
                target = embeddings(TARGETS, centres[:8], 1)
                stored = (
                    commit(writer, GenerationName("train", 0), embeddings(n, centres, 2)),
                    commit(writer, GenerationName("target", 0, "t"), target),
                )
            for name, params in (("defaults", {}), ("auto", {"sigma": "auto"})):
                took, cpu = zip(*(seconds(*stored, params) for _ in range(3)), strict=True)
                line = {
                    "rows": n, "dim": DIM, "targets": TARGETS, "parameters": name,
                    "seconds": round(statistics.median(took), 3),
                    "seconds_min": round(min(took), 3), "seconds_max": round(max(took), 3),
                    "cpu_s": round(statistics.median(cpu), 3),
                }  # fmt: skip
                lines.append(machine() | line)
                echo(", ".join(f"{key} {value}" for key, value in line.items()))
    append(options.csv, lines)


if __name__ == "__main__":
    main()
