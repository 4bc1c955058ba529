"""A store in a bucket, and one behind a service, keep what a store in a folder promises."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import DamagedData, ProvenanceMismatch, StoreBusy
from gradstore.storage.leases import Worker
from gradstore.storage.object_lock import SILENT_SECONDS
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
def test_a_build_killed_anywhere_goes_on_and_redoes_only_what_was_not_finished(
    build: Any, elsewhere: Elsewhere, fast_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:  # fmt: skip
    """Fault 16: kill -9 of a process of its own; the lock is taken over at once."""
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


def test_a_damaged_file_is_reported_before_a_score_is_computed(
    build: Any, elsewhere: Elsewhere
) -> None:
    """Fault 21: a flipped bit, a byte less, and no file."""
    build.run(elsewhere.address)
    data = bytearray(elsewhere.files()[build.chunk])
    data[3] ^= 1
    for damaged in (bytes(data), bytes(data[:-1]), None):
        elsewhere.change(build.chunk, damaged)
        (fault,) = verify_store(elsewhere.address).faults
        assert fault.file == build.chunk
        with pytest.raises(DamagedData, match=build.chunk):
            build.scores(elsewhere.address)


def test_a_second_writer_is_told_who_writes_and_another_run_what_differs(
    kit: StoreKit, elsewhere: Elsewhere
) -> None:
    """Faults 18 and 11."""
    with StoreWriter(elsewhere.address, provenance=kit.provenance):
        with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}, since \d{{4}}-"):
            StoreWriter(elsewhere.address, provenance=kit.provenance)
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
