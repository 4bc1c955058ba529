"""A generation made by one process: units are written behind, failures seen at once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.features.shared import export_shared
from dataflex.run.log import OnRows
from dataflex.run.ranks import Ranks
from gradstore.errors import StoreIOError
from gradstore.export.units import UnitFeatures
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.reader import open_store
from gradstore.store.writer import StoreWriter

ROWS, DIM, PATIENCE = 12, 8, 20.0
RECORD = GenerationRecord(
    name="train/0", role="train", set="", step=0, run_id="run", adapter_hash="0" * 64,
    effective_seed=0, projection={"method": "none", "d": DIM, "seed": 0}, feature="sgd",
)  # fmt: skip


def begin(writer: StoreWriter) -> GenerationWriter:
    hashes = np.arange(2 * ROWS, dtype=np.uint64).view(np.uint8).reshape(ROWS, 16)
    return writer.begin(RECORD, RowSet(hashes), dim=DIM, unit_rows=4)


def computed(unit: UnitRange, on_rows: OnRows) -> UnitFeatures:
    k = unit.stop - unit.start
    on_rows(k)
    ones = np.ones(k, np.float32)
    features = np.full((k, DIM), unit.index + 1, np.float32)
    return UnitFeatures(unit, features, ones, np.full(k, RowStatus.OK, np.uint8),
                        np.ones(k, np.int32), k)  # fmt: skip


def export(writer: StoreWriter, compute: Any, generation: GenerationWriter, watch: Any) -> None:
    export_shared(
        Ranks(), "train/0", lambda: generation, compute, max_bad_fraction=0.0,
        shows_progress=False, lengths=np.ones(ROWS, np.int64), watch=watch,
    )  # fmt: skip


class Told:
    """What a watch hears: pairs of a unit and whether it was pending no more."""

    def __init__(self, generation: GenerationWriter) -> None:
        self.generation = generation
        self.units: list[tuple[int, bool]] = []
        self.taken: list[int] = []

    def loaded(self) -> None:
        """Not heard in an export."""

    def begins(self, name: str, rows: int) -> None:
        assert (name, rows) == ("train/0", ROWS)

    def takes(self, name: str, unit: int) -> None:
        assert name == "train/0"
        self.taken.append(unit)

    def finished(self, name: str, unit: int, rows: int) -> None:
        pending = [each.index for each in self.generation.pending]
        self.units.append((unit, unit not in pending))


def test_a_watch_hears_of_units_that_survive_a_crash(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "s", provenance={"a": 1}) as writer:
        generation = begin(writer)
        told = Told(generation)
        export(writer, computed, generation, told)
    assert told.units == [(0, True), (1, True), (2, True)]
    assert told.taken == [0, 1, 2]
    assert open_store(tmp_path / "s").generation("train/0").rows == ROWS


def test_a_full_disk_ends_an_export_within_the_unit_that_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit may take many minutes, and all of them would be lost."""
    failed, batches = threading.Event(), list[int]()

    def full(*_: object) -> None:
        failed.set()
        raise StoreIOError("the disk is full")

    def compute(unit: UnitRange, on_rows: OnRows) -> UnitFeatures:
        if unit.index == 1:
            assert failed.wait(PATIENCE)
            for batch in range(200):
                batches.append(batch)
                time.sleep(PATIENCE / 200)
                on_rows(0)
        return computed(unit, on_rows)

    with StoreWriter(tmp_path / "s", provenance={"a": 1}) as writer:
        generation = begin(writer)
        monkeypatch.setattr(generation, "write_unit", full)
        with pytest.raises(StoreIOError, match="the disk is full"):
            export(writer, compute, generation, None)
    assert 0 < len(batches) < 200
