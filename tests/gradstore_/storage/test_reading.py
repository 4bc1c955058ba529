"""Reading never leaves a store: no symlink is followed, no special file opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gradstore.errors import DamagedData
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit


def read_everything(path: Path) -> None:
    for generation in open_store(path).generations(superseded=True):
        generation.check_values()
        generation.read(0, generation.rows)
        assert generation.norm.shape == generation.tokens.shape


@pytest.fixture
def store(kit: StoreKit, fast_path: Path) -> Path:
    kit.build(fast_path / "s", "train/1", "target/a/1", n=20)
    return fast_path / "s"


@pytest.mark.parametrize(
    "relative",
    [
        "generations",
        "generations/train/1",
        "generations/train/1/features",
        "generations/train/1/features/c/0",
        "generations/train/1/features/c/0/0",
        "generations/train/1/features/zarr.json",
        "plans/train/1.json",
        "commits/1.json",
        "spaces/gradient",
        "zarr.json",
    ],
)
def test_fault_27_a_symlink_inside_a_store_is_never_followed(store: Path, relative: str) -> None:
    place, outside = store / relative, store.parent / "outside"
    shutil.move(place, outside)
    place.symlink_to(outside)
    with pytest.raises(DamagedData, match="symlink"):
        read_everything(store)
    assert not verify_store(store).ok


def test_a_fifo_or_folder_in_place_of_a_file_does_not_block(store: Path) -> None:
    chunk = store / "generations/train/1/norm/c/0"
    chunk.unlink()
    os.mkfifo(chunk)
    with pytest.raises(DamagedData, match="special file"):
        read_everything(store)
    chunk.unlink()
    chunk.mkdir()
    with pytest.raises(DamagedData, match="directory"):
        read_everything(store)
