"""A small store to build, break and compare; shared by the store's tests."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.files import StoreFiles
from gradstore.generation_writer import GenerationWriter
from gradstore.layout import GenerationName, RowStatus
from gradstore.records import GenerationRecord, RowSet, row_hash
from gradstore.store import Store, open_store
from gradstore.writer import StoreWriter

PROVENANCE: Mapping[str, Any] = {
    "projection": {"method": "sjlt", "seed": 0, "d": 4, "version": 1, "canary": [0.5, -1.25, 3.0]},
    "parameters": [["a.lora_A", [2, 3], "float32"], ["a.lora_B", [3, 2], "float32"]],
    "tokenizer": {"tokenizer.json": "11" * 32},
    "template": "default",
    "cutoff_len": 512,
}


class StoreKit:
    """Builds records, rows, features and whole stores; everything follows from its arguments."""

    provenance = PROVENANCE
    dim = 4
    unit_rows = 16

    def record(self, name: str = "train/1", **changes: Any) -> GenerationRecord:
        parsed = GenerationName.parse(name)
        fields: dict[str, Any] = {
            "name": name,
            "role": parsed.role,
            "set": parsed.set,
            "step": parsed.step,
            "run_id": "run",
            "adapter_hash": "aa",
            "effective_seed": 7,
            "projection": {"method": "sjlt", "d": self.dim, "seed": 7},
            "feature": "adam_marginal",
            "optimizer_hash": "bb",
            "learning_rate": 1e-4,
        }
        return GenerationRecord(**{**fields, **changes})

    def rows(self, n: int, first: int = 0) -> RowSet:
        hashes = [row_hash([i, i + 1, i + 2], [-100, i, 3]) for i in range(first, first + n)]
        return RowSet.from_hashes(hashes, [("set one", i) for i in range(n)])

    def features(self, n: int, seed: int = 0) -> np.ndarray:
        """(n, d) float32 over twenty orders of magnitude; row 3 holds a NaN, row 5 only zeros."""
        random = np.random.default_rng(seed)
        size = 10.0 ** random.uniform(-10, 10, (n, 1))
        values = (random.standard_normal((n, self.dim)) * size).astype(np.float32)
        values[3::40, 1] = np.nan
        values[5::40] = 0
        return values

    def fill(
        self, generation: GenerationWriter, values: np.ndarray, units: int | None = None
    ) -> None:
        """Writes the pending units, or the first few of them."""
        for unit in list(generation.pending)[:units]:
            rows = slice(unit.start, unit.stop)
            k = unit.stop - unit.start
            status = np.full(k, RowStatus.OK, np.uint8)
            generation.write_unit(
                unit.index, values[rows], np.ones(k, np.float32), status, np.arange(k)
            )

    def writer(self, path: Path, files: StoreFiles | None = None, **changes: Any) -> StoreWriter:
        return StoreWriter(path, provenance={**self.provenance, **changes}, files=files)

    def add(self, writer: StoreWriter, name: str = "train/1", n: int = 40, **changes: Any) -> str:
        """Commits one generation of n rows."""
        seed = GenerationName.parse(name).step
        generation = writer.begin(
            self.record(name, **changes), self.rows(n), dim=self.dim, unit_rows=self.unit_rows
        )
        self.fill(generation, self.features(n, seed))
        return generation.commit().sha256

    def build(self, path: Path, *names: str, n: int = 40) -> Store:
        """Makes a store with these generations (default train/1) committed."""
        with self.writer(path) as writer:
            for name in names or ("train/1",):
                self.add(writer, name, n)
        return open_store(path)


@pytest.fixture
def kit() -> StoreKit:
    return StoreKit()


@pytest.fixture
def fast_path() -> Iterator[Path]:
    """A folder in memory where there is one, for tests that sync thousands of times."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
