"""A build on Ray without a model: `ray_build.py STORE [ADDRESS]`, alone where there is no address.

Each unit takes a while, so that there is time to kill something; its rows are a function of their
numbers. It ends as the command line ends: one message, and the failure's exit code.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

import numpy as np

from dataflex.features.engines import run_on_ray
from dataflex.features.shared import export_shared
from dataflex.run.log import Watch
from dataflex.run.messages import set_up_logging
from dataflex.run.ranks import Ranks
from gradstore.cluster.options import RayOptions
from gradstore.errors import StoreError
from gradstore.export.units import UnitFeatures
from gradstore.format.plans import UnitRange
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.storage.leases import Worker
from gradstore.store.writer import StoreWriter

ROWS, DIM, SECONDS = 256 * 12, 1024, 0.5


def compute(seconds: float, unit: UnitRange, *_: object) -> UnitFeatures:
    time.sleep(seconds)
    rows = unit.stop - unit.start
    values = np.random.default_rng(unit.index).standard_normal((rows, DIM)).astype(np.float32)
    norms = np.linalg.norm(values, axis=1).astype(np.float32)
    ok, tokens = np.zeros(rows, np.uint8), np.ones(rows, np.int32)
    return UnitFeatures(unit, values, norms, ok, tokens, model_tokens=rows)


def build(
    store: Path, seconds: float, worker: Worker | None = None, watch: Watch | None = None
) -> tuple[str, ...]:
    record = GenerationRecord(
        name="train/1", role="train", set="", step=1, run_id="test", adapter_hash="a",
        effective_seed=1, projection={"method": "sjlt", "d": DIM, "seed": 1}, feature="sgd",
    )  # fmt: skip
    hashes = np.arange(2 * ROWS, dtype="<u8").view(np.uint8).reshape(ROWS, 16)
    if watch is not None:
        watch.loaded()
    with StoreWriter(store, provenance={"test": 1}, worker=worker) as writer:
        export_shared(
            Ranks(), "train/1", lambda: writer.begin(record, RowSet(hashes), dim=DIM),
            partial(compute, seconds), max_bad_fraction=0.01, shows_progress=False,
            lengths=np.ones(ROWS, np.int64), watch=watch,
        )  # fmt: skip
    return ("train/1",)


def main(store: Path, address: str | None) -> int:
    set_up_logging()
    try:
        if address is None:
            build(store, 0.0)
        else:
            run_on_ray(partial(build, store, SECONDS), RayOptions(address=address, actors=2))
    except StoreError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
