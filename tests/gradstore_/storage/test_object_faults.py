"""A server that fails, lags or breaks its word: nothing is lost, doubled or half seen.

Most of it is about servers of objects: test_service.py says what only a service promises.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import DamagedData, StoreBusy, StoreIOError
from gradstore.format.text_table import Text
from gradstore.storage import bucket as bucket_module
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.store import chunks
from gradstore.store.asked_rows import asked_rows
from gradstore.store.cleaning import clean_store
from gradstore.store.forgetting import forget, request_for
from gradstore.store.held import held_store
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

N = 8


@pytest.fixture
def place(faulty: Any, use_server: Callable[[str], str]) -> str:
    """An empty prefix behind the proxy."""
    return use_server(faulty.address)


def cut() -> None:
    """End a connection without an answer."""
    raise ConnectionAbortedError


def files_of(place: str) -> ObjectFiles:
    return ObjectFiles(location(place))  # type: ignore[arg-type]


def keys(place: str) -> set[str]:
    """Every object, past the proxy's faults."""
    return set(files_of(place).bucket.sizes(""))


def check_whole(kit: StoreKit, place: str, *names: str) -> None:
    """Each generation was committed once, and has the rows it was given."""
    store = open_store(place)
    assert [c.generation for c in store.commits] == list(names)
    assert verify_store(place).ok
    alone = kit.features(N, 1)
    found = store.generation("train/1").read(0, N)
    usable = store.generation("train/1").usable
    assert abs(found[usable] / alone[usable] - 1).max() < 2e-3


# ---- a server that breaks its word -----------------------------------------------------------


@pytest.mark.parametrize("header", ["if-none-match", "if-match"])
@pytest.mark.parametrize("how", ["ignores", "refuses"])
def test_a_server_that_does_not_honour_a_condition_is_refused_by_name_within_a_second(
    kit: StoreKit,
    faulty: Any,
    place: str,
    use_server: Callable[[str], str],
    header: str,
    how: str,
) -> None:
    """Either of the conditions, and either way not to honour it; s3rver itself is below."""
    kit.writer(use_server(faulty.address)).close()  # imports take time

    def strip(asked: Any) -> tuple[int, bytes] | None:
        named = [name for name in asked.headers if name.lower() == header]
        for name in named:
            asked.headers.pop(name)
        return (501, b"<Code>NotImplemented</Code>") if named and how == "refuses" else None

    faulty.before = strip
    took = []
    for _ in range(3):  # of a busy machine the best counts
        began = time.monotonic()
        with pytest.raises(StoreIOError, match=f"(?i)does not honour {header}: ") as refused:
            kit.writer(place)
        took.append(time.monotonic() - began)
        assert refused.value.exit_code == 5
    assert min(took) < 1
    assert keys(place) == set()


def test_s3rver_is_refused_by_name_within_a_second_and_left_as_it_was(
    kit: StoreKit,
    s3rver: tuple[str, Path],
    faulty: Any,
    use_server: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The negative control, a server that is in use: two committers would both win there."""
    kit.writer(use_server(faulty.address)).close()  # imports take time
    address, folder = s3rver
    elsewhere, place = use_server(address), use_server(address)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "S3RVER")  # no others are let in
    bucket = files_of(elsewhere).bucket
    assert [bucket.put_new("seen", data) for data in (b"first", b"second")] == [True, True]
    before = {path for path in folder.rglob("*") if path.is_file()}
    took = []
    for _ in range(3):  # of a busy machine the best counts
        began = time.monotonic()
        with pytest.raises(StoreIOError, match="does not honour If-None-Match: ") as refused:
            kit.writer(place)
        took.append(time.monotonic() - began)
        assert refused.value.exit_code == 5
    assert min(took) < 1
    assert {path for path in folder.rglob("*") if path.is_file()} == before


# ---- faults on the way -----------------------------------------------------------------------


@pytest.mark.parametrize("faulty", ["moto", "seaweedfs"], indirect=True)
def test_a_server_that_is_busy_now_and_then_is_asked_again(
    kit: StoreKit, faulty: Any, place: str
) -> None:
    number = itertools.count()
    faulty.before = lambda _: (503, b"<Code>SlowDown</Code>") if next(number) % 7 == 0 else None
    kit.build(place, n=N)
    check_whole(kit, place, "train/1")


@pytest.mark.parametrize("how", ["answer lost", "write lost", "half sent"])
@pytest.mark.parametrize("behind", ["moto", "seaweedfs", "service"], indirect=True)
def test_a_connection_cut_in_mid_write_leaves_one_write(
    build: Any, behind: Any, fast_path: Path, how: str
) -> None:
    """Of chunks, records, plans, the root and commits; what the server did and did not do."""
    seen: set[str] = set()
    faulty = behind.proxy

    def is_first(asked: Any) -> bool:
        first = asked.method == "PUT" and asked.key not in seen
        seen.update([asked.key] if first else [])
        return first

    def once(asked: Any) -> None:
        if is_first(asked):
            cut()

    if how == "half sent":
        faulty.halves = lambda asked: len(asked.body) > 1 and is_first(asked)
    elif how == "write lost":
        faulty.before = once
    else:
        faulty.after = once
    build.run(behind.address)
    assert len(seen) > 40
    build.check(behind.place, fast_path / "s")


def test_an_answer_that_does_not_come_is_asked_for_again(
    kit: StoreKit, faulty: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstore.storage.s3._REQUEST_SECONDS", 0.5)
    slept: list[str] = []

    def slow(asked: Any) -> None:
        if asked.key.endswith("units/0.json") and asked.method not in slept:
            slept.append(asked.method)
            time.sleep(0.8)

    faulty.before = slow
    kit.build(place, n=N)
    check_whole(kit, place, "train/1")
    assert set(slept) == {"HEAD", "PUT", "GET"}


@pytest.mark.parametrize("behind", ["moto", "seaweedfs", "service"], indirect=True)
def test_a_server_that_stays_away_is_told_and_the_build_goes_on_later(
    build: Any, behind: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(bucket_module, "PATIENCE_SECONDS", 0.3)
    status, faulty = behind.failure[0], behind.proxy

    def away(asked: Any) -> tuple[int, bytes] | None:
        if "commits/1.json" in asked.key and asked.method == "PUT":
            faulty.before = lambda _: behind.failure
            return status, b""
        return None

    faulty.before = away
    says = rf"status {status}.*committed data is untouched"
    with caplog.at_level(logging.DEBUG), pytest.raises(StoreIOError, match=says) as told:
        build.run(behind.address)
    for key in behind.place.keys:
        assert key not in f"{told.value}{caplog.text}"
    faulty.before = lambda _: None
    build.run(behind.address)
    build.check(behind.place, fast_path / "s")


def test_fault_21_a_body_changed_on_its_way_back_is_reported(
    kit: StoreKit, faulty: Any, place: str
) -> None:
    kit.build(place, n=N)

    def spoil(asked: Any) -> tuple[int, bytes] | None:
        if asked.key.endswith("features/c/0/0"):
            return 200, bytes(kit.dim * 2 * kit.unit_rows + 4)
        return None

    faulty.before = spoil
    with pytest.raises(DamagedData, match="crc32c"):
        open_store(place).generation("train/1").read(0, N)


def test_chunks_are_read_ahead_of_a_scan_and_each_once(
    kit: StoreKit, faulty: Any, place: str
) -> None:
    kit.unit_rows = 2
    kit.build(place, n=2 * N)
    running, most = 0, 0
    count = threading.Lock()

    def begin(asked: Any) -> None:
        nonlocal running, most
        with count:
            running += 1
            most = max(most, running)
        time.sleep(0.05)

    def end(asked: Any) -> None:
        nonlocal running
        with count:
            running -= 1

    generation = open_store(place).generation("train/1")
    assert generation.scale.size == 2 * N
    faulty.asked.clear()
    faulty.before, faulty.after = begin, end
    rows = [generation.raw(unit).copy() for unit in range(N)]
    assert most >= 3
    assert sorted(faulty.asked) == sorted({each for each in faulty.asked})
    assert len(faulty.asked) == N
    faulty.before = faulty.after = lambda _: None
    other = open_store(place).generation("train/1")
    backwards = [other.raw(unit) for unit in reversed(range(N))]
    np.testing.assert_array_equal(np.stack(rows), np.stack(backwards[::-1]))


def test_rows_of_objects_that_are_not_kept_are_those_of_a_whole_read(
    kit: StoreKit, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "_MAPS_KEPT", 0)
    kit.unit_rows = 2
    kit.build(place, n=2 * N)
    generation = open_store(place).generation("train/1")
    whole = generation.read(0, 2 * N)
    np.testing.assert_array_equal(generation.take([2 * N - 1, 0, 1]), whole[[-1, 0, 1]])


# ---- others at the same moment ---------------------------------------------------------------


@pytest.mark.parametrize("faulty", ["moto", "seaweedfs"], indirect=True)
def test_fault_18_of_two_committers_at_once_one_wins_and_the_other_is_told(
    kit: StoreKit, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the lock out of the way: the second writes its commit while the first does."""
    monkeypatch.setattr("gradstore.storage.object_lock.ObjectLock.acquire", lambda _: None)

    def begun(writer: StoreWriter, name: str) -> Any:
        generation = writer.begin(kit.record(name), kit.rows(N), dim=4, unit_rows=16)
        kit.fill(generation, kit.features(N, 1))
        return generation

    kit.writer(place).close()
    with kit.writer(place) as first:
        mine = begun(first, "train/1")

        def meanwhile(operation: str, path: Any) -> None:
            if str(path) == "commits/1.json":
                mine.commit()

        files = ObjectFiles(location(place), meanwhile)  # type: ignore[arg-type]
        with kit.writer(place, files) as second:
            with pytest.raises(StoreBusy, match="commit 1 was taken meanwhile"):
                begun(second, "train/2").commit()
    check_whole(kit, place, "train/1")


# ---- a listing that lags ---------------------------------------------------------------------


@pytest.mark.parametrize("faulty", ["moto", "seaweedfs"], indirect=True)
def test_no_commit_is_missed_or_written_twice_where_listings_lag(
    kit: StoreKit, faulty: Any, place: str
) -> None:
    kit.writer(place).close()
    faulty.hide_new()
    with kit.writer(place) as writer:
        kit.add(writer, "train/1", N)
    view = open_store(place)
    with kit.writer(place) as writer:  # nobody remembers what the listing does not show
        begun = writer.begin(kit.record("train/1"), kit.rows(N), dim=4, unit_rows=16)
        assert begun.commit().number == 1
        kit.add(writer, "train/2", N)
    assert [c.generation for c in view.refresh().commits] == ["train/1", "train/2"]
    check_whole(kit, place, "train/1", "train/2")


def test_a_plan_that_no_listing_shows_is_gone_on_with_or_passed_by(
    kit: StoreKit, faulty: Any, place: str
) -> None:
    kit.writer(place).close()
    faulty.hide_new()
    with kit.writer(place) as writer:
        begun = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(begun, kit.features(40, 1), units=2)
    with kit.writer(place) as writer:
        begun = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        assert [unit.index for unit in begun.pending] == [2]
        other = writer.begin(kit.record(adapter_hash="replayed"), kit.rows(40), dim=4)
        assert other.name == "train/1.2"


@pytest.mark.parametrize("faulty", ["moto", "seaweedfs"], indirect=True)
def test_what_goes_goes_whole_where_listings_lag(kit: StoreKit, faulty: Any, place: str) -> None:
    """Of committed generations and texts: every object that a plan names, listed or not."""
    kit.writer(place).close()
    faulty.hide_new()
    with kit.writer(place) as writer:
        writer.keep_texts(kit.rows(N), [Text(f"prompt {i}", "r", 1) for i in range(N)])
        for step in (1, 2):
            kit.add(writer, f"train/{step}", N)
    with held_store(place) as (held, view):
        clean_store(held, view, keep_generations=1)
        forget(held, view, request_for(held, view(), asked_rows(held, view(), [2])))
    faulty.late.clear()
    left = keys(place)
    assert not [key for key in left if "train/1/" in key or "train/1.json" in key]
    assert {key.split("/")[2] for key in left if key.startswith("generations/train/")} == {
        "2.2", "zarr.json"
    }  # fmt: skip
    texts = [key for key in left if key.startswith("texts/")]
    assert len(texts) == 1
    assert b"prompt 2" not in bytes(files_of(place).bucket.get(texts[0]).data)  # type: ignore[union-attr]
    assert verify_store(place).ok
