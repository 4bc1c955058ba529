"""Rows here and there of a committed generation, of chunks that are mapped or are not."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import DamagedData
from gradstore.storage.objects_reading import ObjectReads
from gradstore.storage.reading import ReadFiles
from gradstore.store import chunks
from gradstore.store.generation import Generation
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    from conftest import StoreKit

ROWS = np.array([39, 0, 17, 16, 0, 22])


@pytest.fixture
def store(kit: StoreKit, fast_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store none of whose chunks stays mapped."""
    monkeypatch.setattr(chunks, "_MAPS_KEPT", 0)
    kit.unit_rows = 16
    kit.build(fast_path / "s", n=40)
    return fast_path / "s"


def checked(store: Path) -> tuple[Generation, np.ndarray]:
    """A generation whose chunks have all been checked, and its rows."""
    generation = open_store(store).generation("train/1")
    return generation, generation.read(0, generation.rows)


def test_rows_of_checked_chunks_are_those_of_a_whole_read(store: Path) -> None:
    generation, whole = checked(store)
    np.testing.assert_array_equal(generation.take(ROWS), whole[ROWS])
    np.testing.assert_array_equal(open_store(store).generation("train/1").take(ROWS), whole[ROWS])


def test_each_chunk_is_opened_once_whatever_the_order(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, _ = checked(store)
    opened: list[str] = []
    open_file = os.open

    def counted(path: str, *rest: int) -> int:
        opened.append(str(path))
        return open_file(path, *rest)

    monkeypatch.setattr(os, "open", counted)
    generation.take(ROWS)
    assert sorted(Path(each).parts[-2] for each in opened) == ["0", "1", "2"]


def test_a_chunk_is_checked_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    check = chunks.check_chunk

    def counted(path: str, *rest: Any) -> Any:
        asked.append(path)
        return check(path, *rest)

    monkeypatch.setattr(chunks, "check_chunk", counted)
    generation, _ = checked(store)
    generation.take(ROWS)
    generation.read(0, 40)
    features = [path for path in asked if "/features/" in path]
    assert sorted(features) == [f"generations/train/1/features/c/{unit}/0" for unit in range(3)]


def test_the_disk_begins_to_read_the_next_chunks_of_a_pass_and_of_no_other(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *_: begun.append(os.fstat(fd).st_ino))
    ahead = [store / f"generations/train/1/features/c/{unit}/0" for unit in range(3)]
    backwards = open_store(store).generation("train/1")
    for unit in (2, 1):
        backwards.raw(unit)
    assert begun == []
    generation, _ = checked(store)
    wanted = sorted(path.stat().st_ino for path in ahead)
    assert sorted(begun) == wanted
    read = generation.raw_reader()
    for _ in range(2):  # their pages may be gone by the next pass
        begun.clear()
        for unit in range(3):
            read(unit, 0, 1)
        assert sorted(begun) == wanted[1:] or sorted(begun) == wanted


@pytest.mark.parametrize("mapped", [False, True])
def test_a_reader_gives_what_is_stored_of_chunks_that_are_checked_or_are_not(
    store: Path, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large chunks are mapped, so that a reader's memory does not grow with them."""
    if mapped:
        monkeypatch.setattr(chunks, "_READ_BYTES", 0)
    stored = [open_store(store).generation("train/1").raw(unit).copy() for unit in range(3)]
    read = open_store(store).generation("train/1").raw_reader()
    for _ in range(2):
        for unit, start, stop in ((1, 3, 9), (1, 0, 16), (2, 7, 8), (0, 5, 5), (0, 0, 16)):
            found = read(unit, start, stop)
            assert found.dtype == stored[unit].dtype
            assert found.tobytes() == stored[unit][start:stop].tobytes()


def test_a_reader_checks_a_whole_chunk_once(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = store / "generations/train/1/features/c/1/0"
    data = bytearray(chunk.read_bytes())
    data[-8] ^= 1
    generation = open_store(store).generation("train/1")
    chunk.write_bytes(data)
    for _ in range(2):
        with pytest.raises(DamagedData, match="features/c/1/0"):
            generation.raw_reader()(1, 0, 2)
    asked: list[str] = []
    check = chunks.check_chunk
    monkeypatch.setattr(
        chunks, "check_chunk", lambda path, *rest: asked.append(path) or check(path, *rest)
    )
    for _ in range(2):
        generation.raw_reader()(2, 0, 2)
    assert asked == ["generations/train/1/features/c/2/0"]


def test_where_a_part_costs_as_much_as_the_whole_chunks_are_fetched_once_and_kept(
    kit: StoreKit, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a bucket, and behind a service."""
    assert ObjectReads.whole_only
    kit.unit_rows = 16
    kit.build(fast_path / "s", n=40)
    generation = open_store(fast_path / "s").generation("train/1")
    fetched: list[str] = []
    fetch = ReadFiles.map

    def counted(self: ReadFiles, relative: str, size: int) -> memoryview:
        fetched.append(relative)
        return fetch(self, relative, size)

    monkeypatch.setattr(ReadFiles, "whole_only", True)
    monkeypatch.setattr(ReadFiles, "map", counted)
    for _ in range(2):
        read = generation.raw_reader()
        for unit, start in itertools.product(range(3), (0, 4)):
            read(unit, start, start + 4)
    assert fetched == [f"generations/train/1/features/c/{unit}/0" for unit in range(3)]


def test_a_file_system_may_give_less_than_it_is_asked_for(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = open_store(store).generation("train/1").raw(1).copy()
    some = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: some(fd, [to[0][:7]], at))
    read = open_store(store).generation("train/1").raw_reader()
    assert read(1, 0, 16).tobytes() == stored.tobytes()


def shorten(chunk: Path) -> None:
    chunk.write_bytes(chunk.read_bytes()[:-1])


def link(chunk: Path) -> None:
    chunk.rename(chunk.with_name("elsewhere"))
    chunk.symlink_to("elsewhere")


def pipe(chunk: Path) -> None:
    chunk.unlink()
    os.mkfifo(chunk)


def folder(chunk: Path) -> None:
    chunk.unlink()
    chunk.mkdir()


@pytest.mark.parametrize(
    ("change", "found"),
    [(shorten, r"found \d+ bytes"), (link, "symlink"), (pipe, "special file"),
     (folder, "directory"), (Path.unlink, "no file")],
)  # fmt: skip
def test_a_chunk_that_is_no_longer_a_file_of_its_size_is_reported(
    store: Path, change: Callable[[Path], None], found: str
) -> None:
    generation, _ = checked(store)
    change(store / "generations/train/1/features/c/1/0")
    for read in (
        lambda: generation.take(ROWS),
        lambda: generation.read(0, 40),
        lambda: generation.raw_reader()(1, 2, 3),
    ):
        with pytest.raises(DamagedData, match=f"features/c/1/0.*({found})"):
            read()
    assert np.isfinite(generation.take([0])).all()
