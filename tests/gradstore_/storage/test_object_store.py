"""A store in a bucket keeps what a store in a folder promises, on every server there is."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import DamagedData, ProvenanceMismatch, StoreBusy
from gradstore.format.text_table import Text
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.storage.leases import Worker
from gradstore.storage.local import StoreFiles
from gradstore.storage.location import location
from gradstore.storage.object_lock import SILENT_SECONDS
from gradstore.storage.objects import ObjectFiles
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
    from conftest import StoreKit

N, UNIT_ROWS = 12, 4
NAMES = ("target/skill/1", "train/1")
CHUNK = "generations/train/1/features/c/1/0"


@pytest.fixture(params=["object_server", "seaweedfs"], ids=["moto", "seaweedfs"])
def place(request: pytest.FixtureRequest, use_server: Callable[[str], str]) -> str:
    """An empty prefix in a bucket of each server."""
    return use_server(request.getfixturevalue(request.param))


def objects(place: str) -> dict[str, bytes]:
    """Every object below a prefix, read past our own code."""
    import obstore
    from obstore.store import S3Store

    _, bucket, prefix = place.removeprefix("s3:/").split("/", 2)
    store = S3Store(bucket, prefix=prefix, client_options={"allow_http": True})
    paths = [each["path"] for page in obstore.list(store) for each in page]
    return {path: bytes(obstore.get(store, path).bytes()) for path in paths}


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def change(place: str, key: str, data: bytes | None) -> None:
    """Write an object past our own code, or remove it."""
    found = location(place)
    bucket = ObjectFiles(found).bucket  # type: ignore[arg-type]
    bucket.delete([key]) if data is None else bucket.put(key, data)


def content(found: dict[str, bytes]) -> dict[str, object]:
    """What a reader may see; of commits, and the root, all but the store's own id."""
    seen: dict[str, object] = {}
    for name, data in found.items():
        if name.split("/")[0] in ("staging", "writer.lock"):
            continue
        seen[name] = data if name != "zarr.json" else len(data)
        if name.startswith("commits/"):
            seen[name] = {k: v for k, v in json.loads(data).items()
                          if k not in ("store_uuid", "parent", "sha256")}  # fmt: skip
    return seen


def texts() -> list[Text]:
    return [Text(f"prompt {i}", f"answer {i}", 3) for i in range(N)]


def run(
    kit: StoreKit,
    place: str | Path,
    worker: Worker | None = None,
    names: Sequence[str] = NAMES,
    files: StoreFiles | None = None,
) -> None:
    """Build every generation and the text of its rows, as one worker or alone."""
    with StoreWriter(place, provenance=kit.provenance, worker=worker, files=files) as writer:
        writer.keep_texts(kit.rows(N), texts())
        for name in names:
            begun = writer.begin(kit.record(name), kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
            for unit in begun.claimed():
                k = unit.stop - unit.start
                begun.write_unit(
                    unit.index, kit.features(N)[unit.start : unit.stop], np.ones(k, np.float32),
                    np.zeros(k, np.uint8), np.arange(k, dtype=np.int32),
                )  # fmt: skip
            begun.commit()


def scores(place: str | Path) -> np.ndarray:
    return influence_scores(checkpoint_features(open_store(place), "last")).values


def test_a_bucket_holds_the_bytes_and_gives_the_scores_of_a_folder(
    kit: StoreKit, place: str, fast_path: Path
) -> None:
    run(kit, place)
    run(kit, fast_path / "s")
    assert content(objects(place)) == content(files(fast_path / "s"))
    np.testing.assert_array_equal(scores(place), scores(fast_path / "s"))
    told = verify_store(place)
    assert (told.ok, told.generations) == (True, NAMES)
    store = open_store(place)
    assert str(store.path) == place
    found = store.texts(store.generation("train/1"))
    assert found is not None
    assert found.read([2])[0].prompt == "prompt 2"
    assert not [key for key in objects(place) if key.startswith("staging/")], "nothing is left"


def test_two_workers_that_know_only_the_bucket_write_the_bytes_of_one(
    kit: StoreKit, bucket: str, fast_path: Path
) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            run(kit, bucket, Worker(number, 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    run(kit, fast_path / "s")
    assert content(objects(bucket)) == content(files(fast_path / "s"))


def test_random_kills_of_workers_in_a_bucket_lose_double_and_tear_nothing(bucket: str) -> None:
    stress = Path(__file__).parents[2] / "stress.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(stress), "--kills", "6", "--place", bucket],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 rows lost" in done.stdout


#: Where a process dies -> units that the next one has to compute, and whether they are workers.
DEATHS = {"link generations/train/1/features/c/1/0": (2, False), "link commits/3.json": (0, True),
          "link generations/train/1/units/1.json": (2, True)}  # fmt: skip


def die_everywhere(bucket: str) -> None:
    """Build stores in processes of their own, each of which ends by SIGKILL before a change."""
    kit = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["StoreKit"]()
    children = []
    for number, (where, (_, shared)) in enumerate(DEATHS.items()):
        if child := os.fork():
            children.append(child)
            continue
        place = f"{bucket}/{number}"

        def die(operation: str, path: Path, where: str = where) -> None:
            if f"{operation} {path}" == where:
                os.kill(os.getpid(), signal.SIGKILL)

        files = ObjectFiles(location(place), die)  # type: ignore[arg-type]
        run(kit, place, Worker(1, 2) if shared else None, files=files)
    sys.exit(any(os.waitpid(child, 0)[1] != signal.SIGKILL for child in children))


def test_a_build_killed_anywhere_goes_on_and_redoes_only_what_was_not_finished(
    kit: StoreKit, bucket: str, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 16, in a bucket: kill -9 of a process of its own; the lock is taken over at once."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, __file__, bucket], env=environment, timeout=120)
    assert died.returncode == 0
    run(kit, fast_path / "s")
    computed: list[int] = []
    write_unit = GenerationWriter.write_unit

    def counted(writer: GenerationWriter, index: int, *rest: Any) -> None:
        computed.append(index)
        write_unit(writer, index, *rest)

    monkeypatch.setattr(GenerationWriter, "write_unit", counted)
    for i, (where, (units, shared)) in enumerate(DEATHS.items()):
        began = time.monotonic()
        run(kit, f"{bucket}/{i}", Worker(2, 2) if shared else None)
        assert (where, len(computed)) == (where, units)
        assert time.monotonic() - began < SILENT_SECONDS / 2
        computed.clear()
        assert content(objects(f"{bucket}/{i}")) == content(files(fast_path / "s"))


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_damaged_object_is_reported_before_a_score_is_computed(
    kit: StoreKit, bucket: str, damage: str
) -> None:
    """Fault 21, in a bucket."""
    run(kit, bucket)
    data = bytearray(objects(bucket)[CHUNK])
    data[3] ^= 1
    change(bucket, CHUNK, {"flipped": bytes(data), "short": bytes(data[:-1]), "gone": None}[damage])
    (fault,) = verify_store(bucket).faults
    assert fault.file == CHUNK
    with pytest.raises(DamagedData, match=CHUNK):
        scores(bucket)


def test_a_second_writer_is_told_who_writes_and_another_run_what_differs(
    kit: StoreKit, bucket: str
) -> None:
    """Faults 18 and 11, in a bucket."""
    with StoreWriter(bucket, provenance=kit.provenance):
        with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}, since \d{{4}}-"):
            StoreWriter(bucket, provenance=kit.provenance)
    before = objects(bucket)
    with pytest.raises(ProvenanceMismatch, match="cutoff_len"):
        StoreWriter(bucket, provenance={**kit.provenance, "cutoff_len": 7})
    assert objects(bucket) == before


def test_forgetting_and_cleaning_leave_no_byte_of_what_goes(kit: StoreKit, bucket: str) -> None:
    run(kit, bucket, names=(*NAMES, "target/skill/2", "train/2"))
    with held_store(bucket) as (held, view):
        clean_store(held, view, keep_generations=1)
    assert not [key for key in objects(bucket) if "train/1/" in key]
    with held_store(bucket) as (held, view):
        forget(held, view, request_for(held, view(), asked_rows(held, view(), [2])))
    left = objects(bucket)
    assert not [key for key, data in left.items() if b"prompt 2" in data]
    assert {key.split("/")[2] for key in left if key.startswith("generations/train/2")} == {"2.2"}
    assert verify_store(bucket).ok
    assert np.isnan(scores(bucket)).nonzero()[0].tolist() == [2, 3, 5]


def test_repair_puts_back_what_the_plan_says(kit: StoreKit, bucket: str) -> None:
    run(kit, bucket)
    before = objects(bucket)
    for key in ("generations/train/1/row_hash/c/2/0", "generations/train/zarr.json", "zarr.json"):
        change(bucket, key, None)
    repaired = repair_store(bucket)
    assert (len(repaired.found), repaired.left) == (3, ())
    assert {**objects(bucket), "writer.lock": b""} == {**before, "writer.lock": b""}


if __name__ == "__main__":
    die_everywhere(sys.argv[1])
