"""A store in a bucket, and one behind a service, keep what a store in a folder promises."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import DamagedData, ProvenanceMismatch, StoreBusy
from gradstore.format.canonical import canonical_json, parse, seal
from gradstore.storage import objects_reading, s3
from gradstore.storage.leases import Worker
from gradstore.storage.object_lock import SILENT_SECONDS
from gradstore.storage.s3 import S3Bucket
from gradstore.store.asked_rows import asked_rows
from gradstore.store.cleaning import clean_store
from gradstore.store.forgetting import forget, request_for
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.held import held_store
from gradstore.store.reader import open_store
from gradstore.store.repair import repair_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import InBucket, InService, StoreKit

    Elsewhere = InBucket | InService

STRESS = Path(__file__).parents[2] / "stress.py"


@pytest.mark.parametrize("make_elsewhere", ["moto", "seaweedfs", "service"], indirect=True)
def test_it_holds_the_bytes_and_gives_the_scores_of_a_folder(
    build: Any, elsewhere: Elsewhere, fast_path: Path
) -> None:
    build.run(elsewhere.address)
    build.check(elsewhere, fast_path / "s")
    np.testing.assert_array_equal(build.scores(elsewhere.address), build.scores(fast_path / "s"))
    told = verify_store(elsewhere.address)
    assert (told.ok, told.generations) == (True, build.names)
    assert told.files == verify_store(fast_path / "s").files
    store = open_store(elsewhere.address)
    assert str(store.path) == elsewhere.address
    found = store.texts(store.generation("train/1"))
    assert found is not None
    assert found.read([2])[0].prompt == "prompt 2"
    left = [name for name in elsewhere.files() if name.startswith("staging/")]
    kept = ["service"] if elsewhere.address.startswith("http") else []
    assert [name.split("/")[1] for name in left] == kept, "but for a server's lock nothing is left"


@pytest.mark.parametrize("make_elsewhere", ["moto", "seaweedfs", "service"], indirect=True)
def test_two_workers_that_know_only_its_address_write_the_bytes_of_one(
    build: Any, elsewhere: Elsewhere, fast_path: Path
) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            build.run(elsewhere.address, Worker(number, 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    build.check(elsewhere, fast_path / "s")


@pytest.mark.parametrize("kills", [("bucket", 6), ("service", 3)], ids=lambda kills: kills[0])
def test_random_kills_of_workers_lose_double_and_tear_nothing(
    kills: tuple[str, int], request: pytest.FixtureRequest, cli: Any
) -> None:
    where, count = kills
    place = ("--service",)
    if where == "bucket":
        place = ("--place", request.getfixturevalue("bucket"))
    done = cli(STRESS, "--kills", count, *place, program="python")
    assert done.code == 0, done.err[-3000:]
    assert "0 rows lost" in done.out


#: Where a process dies -> units that the next one has to compute, and whether they are workers.
DEATHS = {"link generations/train/1/features/c/1/0": (2, False), "link commits/3.json": (0, True),
          "link generations/train/1/units/1.json": (2, True)}  # fmt: skip


@pytest.mark.parametrize("where", DEATHS)
@pytest.mark.parametrize("make_elsewhere", ["moto", "seaweedfs", "service"], indirect=True)
def test_fault_16_a_build_killed_here_and_there_redoes_only_what_was_not_finished(
    build: Any, elsewhere: Elsewhere, fast_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:  # fmt: skip
    """By kill -9 of a process of its own; the lock is taken over at once."""
    units, shared = DEATHS[where]
    dies = Path(__file__).with_name("dies.py")
    died = cli(dies, elsewhere.address, where, *["worker"] * shared, program="python")
    assert died.code == -signal.SIGKILL, died.err
    computed: list[int] = []
    write_unit = GenerationWriter.write_unit

    def counted(writer: GenerationWriter, index: int, *rest: Any) -> None:
        computed.append(index)
        write_unit(writer, index, *rest)

    monkeypatch.setattr(GenerationWriter, "write_unit", counted)
    began = time.monotonic()
    build.run(elsewhere.address, Worker(2, 2) if shared else None)
    assert len(computed) == units
    assert time.monotonic() - began < SILENT_SECONDS / 2
    build.check(elsewhere, fast_path / "s")


class Buckets:
    """Buckets in the memory of this process in place of a server's: what a kill leaves of one.

    Attributes:
        left: of the store that is watched: its objects before each request that changes some, and
            of one that removes several where every other was gone. Each state once.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        obstore = pytest.importorskip("obstore")
        self._store, self._list, self._get, self._put = (
            obstore.store.MemoryStore, obstore.list, obstore.get, obstore.put
        )  # fmt: skip
        self._stores: dict[str, Any] = {}
        self._watched = ""
        self.left: list[dict[str, bytes]] = []
        monkeypatch.setattr(s3, "_connected", lambda place: self._at(str(place)))
        monkeypatch.setattr(objects_reading, "REQUESTS_AT_ONCE", 1)
        changed = S3Bucket._changed

        def noted(bucket: S3Bucket, verb: str, keys: Sequence[str], act: Any) -> Any:
            if str(bucket.place) == self._watched:
                self._keep(self.objects(self._watched), list(keys) if verb == "remove" else [])
            return changed(bucket, verb, keys, act)

        monkeypatch.setattr(S3Bucket, "_changed", noted)

    def _at(self, place: str) -> Any:
        return self._stores.setdefault(place, self._store())

    def _keep(self, objects: dict[str, bytes], removed: Sequence[str]) -> None:
        some = {key: data for key, data in objects.items() if key not in removed[::2]}
        for state in (objects, some):
            if state not in self.left:
                self.left.append(state)

    def watch(self, place: str) -> str:
        self._watched = place
        return place

    def objects(self, place: str) -> dict[str, bytes]:
        paths = [each["path"] for page in self._list(self._at(place)) for each in page]
        return {path: bytes(self._get(self._at(place), path).bytes()) for path in paths}

    def each(self) -> Iterator[str]:
        """Yield a place for each state in turn."""
        for k, objects in enumerate(self.left):
            place = f"s3://memory/left-{k}"
            for key, data in objects.items():
                self._put(self._at(place), key, data)
            yield place
            del self._stores[place]


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "worker"])
def test_fault_16_a_kill_before_every_request_to_a_bucket_is_resumed_to_the_same_bytes(
    build: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Requests come one after the other here, and each of them is met by a kill."""
    names, buckets = build.names[1:], Buckets(monkeypatch)
    build.run(fast_path / "s", names=names)
    whole = build.kit.content(fast_path / "s")
    build.run(buckets.watch("s3://memory/s"), Worker(1, 2) if shared else None, names=names)
    assert build.kit.content(buckets.objects("s3://memory/s")) == whole
    for k, place in enumerate(buckets.each()):
        if "zarr.json" in buckets.left[k]:
            assert [g.name for g in open_store(place).generations()] in ([], list(names)), k
        build.run(place, Worker(2, 2) if shared else None, names=names)
        assert build.kit.content(buckets.objects(place)) == whole, k
        assert verify_store(place).ok, k
    assert k > 40


@pytest.mark.parametrize("make_elsewhere", ["moto", "seaweedfs", "service"], indirect=True)
def test_fault_21_a_damaged_file_is_reported_before_a_score_is_computed(
    build: Any, elsewhere: Elsewhere
) -> None:
    """A flipped bit, a byte less, and no file."""
    build.run(elsewhere.address)
    data = bytearray(elsewhere.files()[build.chunk])
    data[3] ^= 1
    for damaged in (bytes(data), bytes(data[:-1]), None):
        elsewhere.change(build.chunk, damaged)
        (fault,) = verify_store(elsewhere.address).faults
        assert fault.file == build.chunk
        with pytest.raises(DamagedData, match=build.chunk):
            build.scores(elsewhere.address)


@pytest.mark.parametrize("make_elsewhere", ["moto", "seaweedfs", "service"], indirect=True)
def test_fault_22_an_edited_commit_or_record_is_told_even_with_a_new_seal(
    build: Any, elsewhere: Elsewhere
) -> None:
    build.run(elsewhere.address)
    before = elsewhere.files()
    record = "generations/train/1/units/0.json"
    for name, change, says in (
        ("commits/2.json", {"chunk_bytes": 1}, "chain broken at 3"),
        (record, {"status": {"ok": build.unit_rows}}, record),
    ):
        edited = canonical_json(seal({**parse(before[name]), **change}))
        elsewhere.change(name, edited)
        with pytest.raises(DamagedData, match=says):
            build.scores(elsewhere.address)
        elsewhere.change(name, before[name])
    assert verify_store(elsewhere.address).ok


@pytest.mark.parametrize("make_elsewhere", ["moto", "seaweedfs", "service"], indirect=True)
def test_fault_18_a_second_writer_is_told_who_writes_elsewhere(
    kit: StoreKit, elsewhere: Elsewhere
) -> None:
    with StoreWriter(elsewhere.address, provenance=kit.provenance):
        with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}, since \d{{4}}-"):
            StoreWriter(elsewhere.address, provenance=kit.provenance)


def test_fault_11_another_run_is_told_what_differs_elsewhere_and_writes_nothing(
    kit: StoreKit, elsewhere: Elsewhere
) -> None:
    kit.writer(elsewhere.address).close()
    before = unchanged(elsewhere)
    other = {**kit.provenance, "cutoff_len": 7, "template": "llama3"}
    with pytest.raises(ProvenanceMismatch) as told:
        StoreWriter(elsewhere.address, provenance=other)
    assert [line.split(" ")[0] for line in told.value.differences] == ["cutoff_len", "template"]
    assert unchanged(elsewhere) == before


def unchanged(elsewhere: Elsewhere) -> dict[str, bytes]:
    """Every file that a writer which is refused leaves as it is: a server's own it may change."""
    return {name: data for name, data in elsewhere.files().items()
            if not name.startswith("staging/service/")}  # fmt: skip


def test_forgetting_and_cleaning_leave_no_byte_of_what_goes(
    build: Any, elsewhere: Elsewhere
) -> None:
    address = elsewhere.address
    build.run(address, names=(*build.names, "target/skill/2", "train/2"))
    with held_store(address) as (held, view):
        clean_store(held, view, keep_generations=1)
    assert not [name for name in elsewhere.files() if "train/1/" in name]
    with held_store(address) as (held, view):
        forget(held, view, request_for(held, view(), asked_rows(held, view(), [2])))
    left = elsewhere.files()
    assert not [name for name, data in left.items() if b"prompt 2" in data]
    assert {name.split("/")[2] for name in left if name.startswith("generations/train/2")} == {
        "2.2"
    }
    assert verify_store(address).ok
    assert np.isnan(build.scores(address)).nonzero()[0].tolist() == [2, 3, 5]


@pytest.mark.parametrize("make_elsewhere", ["bucket"], indirect=True)
def test_repair_puts_back_what_the_plan_says(build: Any, elsewhere: InBucket) -> None:
    """Behind a service what is damaged is repaired where it lies."""
    build.run(elsewhere.address)
    before = elsewhere.files()
    for name in ("generations/train/1/row_hash/c/2/0", "generations/train/zarr.json", "zarr.json"):
        elsewhere.change(name, None)
    repaired = repair_store(elsewhere.address)
    assert (len(repaired.found), repaired.left) == (3, ())
    assert {**elsewhere.files(), "writer.lock": b""} == {**before, "writer.lock": b""}
