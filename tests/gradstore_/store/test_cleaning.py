"""A store that makes room for a successor: removed when that one has started, else put back."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradstore.errors import StoreBusy
from gradstore.store.cleaning import store_set_aside
from gradstore.store.writer import StoreWriter


def store(path: Path) -> Path:
    StoreWriter(path, space="gradient", provenance={"model": "m"}).close()
    return path


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_store_goes_when_its_successor_has_started(tmp_path: Path) -> None:
    path = store(tmp_path / "store")
    with store_set_aside(path):
        assert not path.exists()
    assert names(tmp_path) == set()


def test_a_store_is_put_back_where_its_successor_is_refused(tmp_path: Path) -> None:
    path = store(tmp_path / "store")
    before = names(tmp_path)
    (path / "mark").write_text("the former")

    def refuse() -> None:
        store(path)
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"), store_set_aside(path):
        refuse()
    assert names(tmp_path) == before | {"store/mark"}


def test_a_store_with_a_writer_and_a_folder_that_is_no_store_stay(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with store_set_aside(other):
        assert other.is_dir()
    path = tmp_path / "store"
    writer = StoreWriter(path, space="gradient", provenance={"model": "m"})
    with pytest.raises(StoreBusy), store_set_aside(path):
        pass
    writer.close()
    assert path.is_dir()
