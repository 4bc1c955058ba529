"""A full, failing, read-only or unsuitable disk, writers past the lock, and readers."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import StoreBusy, StoreIOError
from gradstore.format.layout import generation_bytes
from gradstore.storage.local import Hook, StoreFiles
from gradstore.storage.lock import WriterLock
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit


def failing(operation: str, number: int, after: int = 0, under: str = "") -> Hook:
    """A hook that fails every such operation after the first `after`."""
    left = after

    def hook(found: str, path: Path) -> None:
        nonlocal left
        if found == operation and under in str(path):
            if left == 0:
                raise OSError(number, os.strerror(number))
            left -= 1

    return hook


class SmallDisk(StoreFiles):
    """Says that only so much is free."""

    def free_bytes(self) -> int:
        return 100_000


def test_fault_20_a_full_disk_at_any_write_ends_in_exit_5_and_resumes(
    kit: StoreKit, fast_path: Path
) -> None:
    path, after = fast_path / "s", 0
    kit.build(path, "train/1", n=20)
    committed = open_store(path).generation("train/1").read(0, 20)
    while True:
        told = ""
        try:
            with kit.writer(path, StoreFiles(path, failing("write", errno.ENOSPC, after))) as w:
                kit.add(w, "train/2", 20)
        except StoreIOError as error:
            told = f"exit {error.exit_code}: {error}"
        if not told:
            break
        assert told.startswith("exit 5")
        assert "bytes" in told
        left = [p for p in (path / "staging").rglob("*") if p.is_file()]
        assert all("quarantine" in p.parts for p in left)
        found = open_store(path).generation("train/1").read(0, 20)
        assert np.array_equal(found, committed, equal_nan=True)
        after += 1
    assert after > 10
    assert verify_store(path).ok


@pytest.mark.parametrize("operation", ["write", "fsync"])
def test_the_message_of_a_full_disk_tells_bytes_needed_and_free(
    kit: StoreKit, fast_path: Path, operation: str
) -> None:
    """Where space is given late, as in NFS, a full disk is told by the sync."""
    path = fast_path / "s"
    with kit.writer(path) as writer:
        generation = writer.begin(kit.record(), kit.rows(20), dim=4)
        writer._files._hook = failing(operation, errno.ENOSPC)
        with pytest.raises(StoreIOError, match=r"needs 2,052 bytes, [\d,]+ free.*gradstore=PATH"):
            kit.fill(generation, kit.features(20))
        writer._files._hook = None
        kit.fill(generation, kit.features(20))
        generation.commit()


def test_fault_20_room_is_checked_before_the_start_without_allocating(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    with kit.writer(path, SmallDisk(path)) as writer:
        with pytest.raises(StoreIOError, match=r"needs [\d,]+ bytes, 100,000 free"):
            writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=1)
        with pytest.raises(StoreIOError, match="free"):
            writer.check_space_for(50_000, 4096)
    assert not (path / "plans/train").exists()
    assert generation_bytes(50_000, 4096) >= 50_000 * 4096 * 2


def test_fault_20_no_file_of_a_store_is_mapped_to_be_written(
    kit: StoreKit, fast_path: Path
) -> None:
    """A full disk ends a process by SIGBUS where it writes to a map; a write tells it."""
    path, maps = fast_path / "s", Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc that lists the maps of a process")
    looked = 0

    def none_is_mapped(operation: str, _: Path) -> None:
        nonlocal looked
        looked += 1
        ours = [line for line in maps.read_text().splitlines() if f" {fast_path}/" in line]
        assert not [line for line in ours if "w" in line.split()[1]], operation

    with kit.writer(path, StoreFiles(path, none_is_mapped)) as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(generation, kit.features(40), units=1)
        chunks = list((path / "generations/train/1/features/c").rglob("*"))
        assert [chunk.name for chunk in chunks if chunk.is_file()] == ["0"]  # the others take none
        kit.fill(generation, kit.features(40))
        generation.commit()
    assert looked > 100


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB, taken away again whatever happens."""
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if mount is None or unmount is None or os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs can't be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run([unmount, "--lazy", str(folder)], check=True)


def test_fault_20_a_disk_that_is_really_full_ends_in_exit_5_and_resumes_when_there_is_room(
    kit: StoreKit, tiny_disk: Path
) -> None:
    path, other = tiny_disk / "s", tiny_disk / "other"
    kit.build(path, "train/1", n=200)
    committed = open_store(path).generation("train/1").read(0, 200)
    with kit.writer(path) as writer:
        generation = writer.begin(kit.record("train/2"), kit.rows(200), dim=4, unit_rows=16)
        other.write_bytes(bytes(shutil.disk_usage(path).free - (128 << 10)))  # others fill it
        with pytest.raises(StoreIOError, match=r"needs [\d,]+ bytes, [\d,]+ free") as caught:
            kit.fill(generation, kit.features(200, 2))
        assert caught.value.exit_code == 5
        finished = 13 - len(generation.pending)
    assert 0 < finished < 13
    assert not [p for p in (path / "staging").rglob("*") if p.is_file()]
    found = open_store(path).generation("train/1").read(0, 200)
    assert np.array_equal(found, committed, equal_nan=True)
    assert verify_store(path).ok
    other.unlink()
    with kit.writer(path) as writer:
        generation = writer.begin(kit.record("train/2"), kit.rows(200), dim=4, unit_rows=16)
        assert len(generation.pending) == 13 - finished
        kit.fill(generation, kit.features(200, 2))
        generation.commit()
    assert verify_store(path).ok


@pytest.mark.parametrize("operation", ["write", "fsync", "fsync_dir", "create", "link"])
def test_a_disk_that_fails_from_any_operation_on_ends_in_exit_5_and_resumes(
    kit: StoreKit, fast_path: Path, operation: str
) -> None:
    """EIO from the k-th write, sync, creation or link on, for every k until none fails."""
    after, path = 0, fast_path / "s"
    kit.build(path, "train/1", n=20)
    before = kit.content(path)
    whole = fast_path / "whole"
    shutil.copytree(path, whole)
    with kit.writer(whole) as writer:
        kit.add(writer, "train/2", 20)
    while True:
        tried = fast_path / str(after)
        shutil.copytree(path, tried)
        files, told = StoreFiles(tried, failing(operation, errno.EIO, after)), ""
        try:
            with kit.writer(tried, files) as writer:
                kit.add(writer, "train/2", 20)
        except StoreIOError as error:
            told = f"exit {error.exit_code}: {error}"
        if not told:
            break
        assert told.startswith("exit 5")
        assert os.strerror(errno.EIO) in told
        names = [generation.name for generation in open_store(tried).generations()]
        assert names in (["train/1"], ["train/1", "train/2"])
        assert kit.content(tried).items() >= before.items()
        with kit.writer(tried) as writer:
            kit.add(writer, "train/2", 20)
        assert kit.content(tried) == kit.content(whole)
        assert verify_store(tried).ok
        shutil.rmtree(tried)
        after += 1
    assert after > 10


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("operation", ["lock", "create", "link", "fsync_dir"])
def test_no_oserror_reaches_the_user(
    kit: StoreKit, fast_path: Path, operation: str, number: int
) -> None:
    kit.build(fast_path / "s")
    files = StoreFiles(fast_path / "s", failing(operation, number))
    with pytest.raises(StoreIOError, match="cannot"), kit.writer(fast_path / "s", files) as writer:
        kit.add(writer, "train/2")
    assert verify_store(fast_path / "s").ok


def test_fault_25_a_read_only_store_is_read_and_its_writer_refused_at_once(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    kit.build(path)

    def read_only(operation: str, _: Path) -> None:
        raise OSError(errno.EROFS, f"read-only: {operation}")

    with pytest.raises(StoreIOError, match="writable") as caught:
        kit.writer(path, StoreFiles(path, read_only))
    assert caught.value.exit_code == 5
    assert open_store(path).generation("train/1").read(0, 40).shape == (40, 4)
    for folder, _, names in os.walk(path):
        for name in names:
            os.chmod(Path(folder, name), 0o444)
        os.chmod(folder, 0o555)
    assert verify_store(path).ok
    for folder, _, _ in os.walk(path):
        os.chmod(folder, 0o755)


@pytest.mark.parametrize("operation", ["fsync", "link", "rename"])
def test_fault_26_a_file_system_that_lacks_an_operation_is_refused_at_creation(
    kit: StoreKit, fast_path: Path, operation: str
) -> None:
    files = StoreFiles(fast_path / "s", failing(operation, errno.ENOTSUP, under="s/staging"))
    with pytest.raises(StoreIOError, match=rf"failed the {operation} probe"):
        kit.writer(fast_path / "s", files)
    assert not (fast_path / "s/zarr.json").exists()


def test_fault_26_a_file_system_without_flock_is_refused_at_creation(
    kit: StoreKit, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", lacks)
    with pytest.raises(StoreIOError, match="failed the flock probe"):
        kit.writer(fast_path / "s")


# ---- two writers -----------------------------------------------------------------------------


@pytest.fixture
def no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WriterLock, "acquire", lambda self: None)


@pytest.mark.usefixtures("no_lock")
def test_fault_18_past_the_lock_one_writer_of_a_unit_wins_and_the_other_hears_of_it(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    first, second = kit.writer(path), kit.writer(path)
    ours = first.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
    theirs = second.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
    kit.fill(ours, kit.features(40, 1), units=1)
    with pytest.raises(StoreBusy, match="unit 0 of train/1"):
        kit.fill(theirs, kit.features(40, 2), units=1)
    kit.fill(ours, kit.features(40, 1))
    ours.commit()
    assert verify_store(path).ok


@pytest.mark.usefixtures("no_lock")
def test_fault_18_past_the_lock_the_same_commit_succeeds_twice_and_another_conflicts(
    kit: StoreKit, fast_path: Path
) -> None:
    path, values = fast_path / "s", kit.features(40)
    first, second, third = kit.writer(path), kit.writer(path), kit.writer(path)
    same = [w.begin(kit.record(), kit.rows(40), dim=4) for w in (first, second)]
    other = third.begin(kit.record("target/a/1"), kit.rows(40), dim=4)
    for generation in (*same, other):
        kit.fill(generation, values)
    view = third.store
    other._view = lambda: view  # an outdated view, as in the moment between look and link
    assert same[0].commit() == same[1].commit()
    with pytest.raises(StoreBusy, match="commit 1 was taken"):
        other.commit()
    assert [g.name for g in open_store(path).generations()] == ["train/1"]
    assert verify_store(path).ok


READER = """
import sys
from gradstore.store.reader import open_store
seen = 0
while seen < 6:
    store = open_store(sys.argv[1])
    names = [g.name for g in store.generations()]
    assert names == [f"train/{i}" for i in range(1, len(names) + 1)], names
    assert len(names) >= seen, (names, seen)
    for g in store.generations():
        g.check_values(); g.read(0, g.rows)
    seen = len(names)
print("whole")
"""


def test_readers_in_other_processes_see_whole_generations_only(
    kit: StoreKit, cli: Any, fast_path: Path
) -> None:
    path, said = fast_path / "s", [fast_path / name for name in "ab"]
    with kit.writer(path) as writer:
        readers = [cli("-c", READER, path, program="python", background=each).code for each in said]
        for step in range(1, 7):
            kit.add(writer, f"train/{step}", 40)
        for reader, each in zip(readers, said, strict=True):
            assert (cli.ended(reader), each.read_text()) == (0, "whole\n")


def test_a_reader_in_a_thread_sees_each_commit_whole(kit: StoreKit, fast_path: Path) -> None:
    path = fast_path / "s"
    kit.build(path, "train/1")
    stop, errors = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                for generation in open_store(path).generations():
                    generation.check_values()
                    assert generation.read(0, 40).shape == (40, 4)
            except Exception as error:  # whatever it is, the main thread must show it
                errors.append(error)
                return

    thread = threading.Thread(target=read)
    thread.start()
    with kit.writer(path) as writer:
        for step in range(2, 6):
            kit.add(writer, f"train/{step}", 40)
    stop.set()
    thread.join()
    assert errors == []
