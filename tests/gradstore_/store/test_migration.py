"""A store of every schema is kept: it is read as ever, migrated whole, and still written so."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.cli.care import migrate
from gradstore.errors import DamagedData
from gradstore.format.layout import NEEDS, RowStatus
from gradstore.format.text_table import Text
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.storage.local import StoreFiles
from gradstore.store.asked_rows import asked_rows
from gradstore.store.forgetting import forget, request_for
from gradstore.store.held import held_store
from gradstore.store.migration import migrate_store
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

KEPT = Path(__file__).parent / "kept"
N, DIM = 9, 8
VERSIONS = sorted(NEEDS)
#: Scores of the kept stores when they were made: of schema 1 (float16), and of 2 and 3 (int8).
FLOAT16 = [0.380655050, -0.360370845, 0.209163204, 0.096929386, -0.334282935, 0.181118041,
           0.232865334, -0.085934781, -0.215713993]  # fmt: skip
INT8 = [0.381048501, -0.360238254, 0.209020004, 0.097082429, -0.334429920, 0.183442920,
        0.232431695, -0.085400745, -0.217999965]  # fmt: skip


def make(kit: StoreKit, path: Path, version: int) -> None:
    """Write what lies in kept/: schema 1; 2 with text, losses and int8; 3 without row 2."""
    losses, dtype = version > 1, "int8" if version > 1 else "float16"
    with kit.writer(path) as writer:
        if version > 1:
            writer.keep_texts(kit.rows(N), [Text("p", f"answer {i}", 3) for i in range(N)])
        for name, n, seed in (("train/1", N, 1), ("target/a/1", 3, 2)):
            record = kit.record(name, projection={"method": "sjlt", "d": DIM, "seed": 7})
            begun = writer.begin(record, kit.rows(n, first=10 * seed - 10), dim=DIM, dtype=dtype,
                                 unit_rows=4, losses=losses)  # fmt: skip
            values = np.random.default_rng(seed).standard_normal((n, DIM)).astype(np.float32)
            for unit in list(begun.pending):
                k = unit.stop - unit.start
                begun.write_unit(
                    unit.index, values[unit.start : unit.stop], np.ones(k, np.float32),
                    np.full(k, RowStatus.OK, np.uint8), np.arange(k),
                    np.arange(k, dtype=np.float32) if losses else None,
                )  # fmt: skip
            begun.commit()
    if version > 2:
        with held_store(path) as (files, view):
            forget(files, view, request_for(files, view(), asked_rows(files, view(), [2])))


def unpacked(version: int, folder: Path) -> Path:
    with tarfile.open(KEPT / f"schema_{version}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "store"


def scores(path: Path) -> np.ndarray:
    return influence_scores(checkpoint_features(open_store(path), "last")).values


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock's and scratch."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "writer.lock"
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_fault_15_a_kept_store_is_migrated_with_the_same_scores_and_no_other_byte_changed(
    version: int, fast_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = unpacked(version, fast_path)
    before, told = contents(path), scores(path)
    assert open_store(path).schema_version == version
    expected = np.array(FLOAT16 if version == 1 else INT8)
    if version == 3:
        expected[2] = np.nan
    np.testing.assert_allclose(told, expected, atol=2e-7)
    migrate(path)
    assert open_store(path).schema_version == max(NEEDS)
    assert scores(path).tobytes() == told.tobytes()
    changed = {name for name, data in contents(path).items() if data != before.get(name)}
    assert changed == ({"zarr.json"} if version < max(NEEDS) else set())
    assert verify_store(path).ok
    migrate(path)
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize("version", VERSIONS)
def test_todays_release_still_writes_the_kept_bytes(
    version: int, kit: StoreKit, fast_path: Path
) -> None:
    """All but ids by chance, what names them, and Parquet, which says who wrote it."""
    kept = contents(unpacked(version, fast_path))
    make(kit, fast_path / "new", version)
    new = contents(fast_path / "new")
    by_chance = ("commits/", "forgotten/", "texts/")
    assert kept.keys() == new.keys()
    for name, data in new.items():
        if name != "zarr.json" and not name.startswith(by_chance):
            assert data == kept[name], name


class Killed(BaseException):
    """Not an Exception: nothing may catch a kill."""


def test_a_kill_leaves_the_old_store_or_the_new_one(fast_path: Path) -> None:
    path = unpacked(1, fast_path)
    told, seen = scores(path), set()
    for k in range(1000):
        left = iter(range(k))

        def hook(operation: str, path: Path, left: Any = left) -> None:
            if next(left, None) is None:
                raise Killed(operation)

        try:
            migrate_store(path, StoreFiles(path, hook))
        except Killed:
            seen.add(open_store(path).schema_version)
            assert scores(path).tobytes() == told.tobytes()
        else:
            break
        if open_store(path).schema_version != 1:
            assert migrate_store(path) == (max(NEEDS), max(NEEDS))
            break
    assert seen == {1, max(NEEDS)}


def test_a_damaged_store_is_not_migrated(fast_path: Path) -> None:
    path = unpacked(2, fast_path)
    chunk = path / "generations/train/1/features/c/0/0"
    chunk.write_bytes(bytes([chunk.read_bytes()[0] ^ 1]) + chunk.read_bytes()[1:])
    with pytest.raises(DamagedData, match="not migrated"):
        migrate_store(path)
    assert open_store(path).schema_version == 2
