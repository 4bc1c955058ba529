"""A store behind a service keeps what a store in a folder promises, over http and https."""

from __future__ import annotations

import gc
import itertools
import json
import logging
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

from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch, StoreBusy, StoreIOError
from gradstore.format.text_table import Text
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.storage import bucket as bucket_module
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
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

N, UNIT_ROWS = 12, 4
NAMES = ("target/skill/1", "train/1")
CHUNK = "generations/train/1/features/c/1/0"


def content(folder: Path) -> dict[str, object]:
    """What a reader may see; of commits, and the root, all but the store's own id."""
    seen: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.split("/")[0] in ("staging", "writer.lock"):
            continue
        data = path.read_bytes()
        seen[name] = data if name != "zarr.json" else len(data)
        if name.startswith("commits/"):
            seen[name] = {k: v for k, v in json.loads(data).items()
                          if k not in ("store_uuid", "parent", "sha256")}  # fmt: skip
    return seen


def run(
    kit: StoreKit,
    place: str | Path,
    worker: Worker | None = None,
    names: Sequence[str] = NAMES,
    files: StoreFiles | None = None,
) -> None:
    """Build every generation and the text of its rows, as one worker or alone."""
    with StoreWriter(place, provenance=kit.provenance, worker=worker, files=files) as writer:
        writer.keep_texts(kit.rows(N), [Text(f"prompt {i}", f"answer {i}", 3) for i in range(N)])
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


def check_equal(kit: StoreKit, folder: Path, reference: Path) -> None:
    """The folder that is served holds what one build into a folder does, every byte."""
    if not reference.exists():
        run(kit, reference)
    assert content(folder) == content(reference)
    assert verify_store(folder).ok


# ---- the whole path --------------------------------------------------------------------------


def test_a_build_over_http_is_the_build_into_a_folder_byte_for_byte(
    kit: StoreKit, service: Any, fast_path: Path
) -> None:
    run(kit, service.address)
    check_equal(kit, service.folder, fast_path / "s")
    np.testing.assert_array_equal(scores(service.address), scores(fast_path / "s"))
    told = verify_store(service.address)
    assert (told.ok, told.generations) == (True, NAMES)
    assert told.files == verify_store(fast_path / "s").files
    store = open_store(service.address)
    found = store.texts(store.generation("train/1"))
    assert found is not None
    assert found.read([2])[0].prompt == "prompt 2"
    left = [p for p in (service.folder / "staging").rglob("*") if p.is_file()]
    assert [path.parent.name for path in left] == ["service"], "but for its lock nothing is left"


def test_names_that_are_quoted_on_the_disk_arrive_as_they_are(kit: StoreKit, service: Any) -> None:
    name = "a+b@c/target/org%2Fset%20one/1"
    kit.build(service.address, name, n=4)
    assert (service.folder / f"plans/{name}.json").is_file()
    assert [each.name for each in open_store(service.address).generations()] == [name]
    assert verify_store(service.folder).ok


def test_the_key_that_reads_reads_and_is_told_that_it_may_not_write(
    kit: StoreKit, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(kit, service.address)
    before = content(service.folder)
    monkeypatch.delenv("GRADSTORE_WRITE_TOKEN")
    monkeypatch.setenv("GRADSTORE_TOKEN", service.read_key)
    assert scores(service.address).shape == (N,)
    with pytest.raises(StoreIOError, match="this key may only read") as told:
        run(kit, service.address)
    assert service.read_key not in str(told.value)
    for key, says in (("wrong-key-of-nobody", "does not know this key"), ("a key", "no key has")):
        monkeypatch.setenv("GRADSTORE_TOKEN", key)
        with pytest.raises((StoreIOError, BadInput), match=says) as refused:
            open_store(service.address)
        assert key not in str(refused.value)
    monkeypatch.delenv("GRADSTORE_TOKEN")
    with pytest.raises(BadInput, match="set GRADSTORE_TOKEN to read, or GRADSTORE_WRITE_TOKEN"):
        open_store(service.address)
    assert content(service.folder) == before


def test_a_server_that_takes_no_writes_is_told_as_such(
    kit: StoreKit, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit.build(service.address, n=8)
    from gradstore.serve import app

    service.stop()
    create = app.create_app
    monkeypatch.setattr(app, "create_app", lambda served, _, writing: create(
        served, service.write_key))  # fmt: skip
    service.start()
    assert verify_store(service.address).ok
    with pytest.raises(StoreIOError, match=r"takes no writes\. Start it with --writable"):
        kit.build(service.address, n=8)
    service.writing.close()


def test_two_workers_without_a_shared_disk_write_the_bytes_of_one(
    kit: StoreKit, service: Any, fast_path: Path
) -> None:
    failed: list[BaseException] = []

    def work(number: int) -> None:
        try:
            run(kit, service.address, Worker(number, 2))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failed == []
    check_equal(kit, service.folder, fast_path / "s")


def test_a_service_keeps_its_store_in_a_bucket_as_in_a_folder(
    kit: StoreKit, bucket: str, serve_writable: Callable[..., Any], fast_path: Path
) -> None:
    service = serve_writable(bucket)
    run(kit, service.address)
    run(kit, fast_path / "s")
    told = verify_store(bucket)
    assert (told.ok, told.generations) == (True, NAMES)
    np.testing.assert_array_equal(scores(service.address), scores(fast_path / "s"))
    with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}"):
        StoreWriter(bucket, provenance=kit.provenance)
    service.stop()
    run(kit, bucket)
    service.start()


def test_a_second_writer_is_told_who_writes_and_another_run_what_differs(
    kit: StoreKit, service: Any
) -> None:
    with StoreWriter(service.address, provenance=kit.provenance):
        with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}, since \d{{4}}-"):
            StoreWriter(service.address, provenance=kit.provenance)
    before = content(service.folder)
    other = {**kit.provenance, "cutoff_len": 7, "template": "llama3"}
    with pytest.raises(ProvenanceMismatch) as told:
        StoreWriter(service.address, provenance=other)
    assert [line.split(" ")[0] for line in told.value.differences] == ["cutoff_len", "template"]
    assert content(service.folder) == before


def test_a_writer_that_meets_another_provenance_on_its_way_hears_every_difference(
    kit: StoreKit, service: Any
) -> None:
    """The server's own refusal: the other's provenance comes between a look and the write."""
    from gradstore.format.provenance import provenance_bytes

    kit.writer(service.address).close()
    files = ObjectFiles(location(service.address))  # type: ignore[arg-type]
    other = {**kit.provenance, "cutoff_len": 7, "template": "llama3"}
    with pytest.raises(ProvenanceMismatch, match="cutoff_len differs") as told:
        files.publish("spaces/gradient/provenance.json", provenance_bytes("gradient", other))
    assert len(told.value.differences) == 2


def test_forgetting_and_cleaning_leave_no_byte_of_what_goes(kit: StoreKit, service: Any) -> None:
    run(kit, service.address, names=(*NAMES, "target/skill/2", "train/2"))
    with held_store(service.address) as (held, view):
        clean_store(held, view, keep_generations=1)
    assert not [path for path in content(service.folder) if "train/1/" in path]
    with held_store(service.address) as (held, view):
        forget(held, view, request_for(held, view(), asked_rows(held, view(), [2])))
    left = content(service.folder)
    assert not [path for path, data in left.items() if b"prompt 2" in bytes(str(data), "utf-8")]
    assert {path.split("/")[2] for path in left if path.startswith("generations/train/2")} == {
        "2.2"
    }
    assert verify_store(service.address).ok
    assert np.isnan(scores(service.address)).nonzero()[0].tolist() == [2, 3, 5]


def test_a_damaged_file_is_reported_before_a_score_is_computed(kit: StoreKit, service: Any) -> None:
    """Fault 21, over http."""
    run(kit, service.address)
    path = service.folder / CHUNK
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    for damaged in (bytes(data), bytes(data[:-1]), None):
        path.unlink()
        if damaged is not None:
            path.write_bytes(damaged)
        (fault,) = verify_store(service.address).faults
        assert fault.file == CHUNK
        with pytest.raises(DamagedData, match=CHUNK):
            scores(service.address)


# ---- who dies --------------------------------------------------------------------------------

#: Where a process dies -> units that the next one has to compute, and whether they are workers.
DEATHS = {"link generations/train/1/features/c/1/0": (2, False), "link commits/3.json": (0, True),
          "link generations/train/1/units/1.json": (2, True)}  # fmt: skip


def die(address: str, where: str, shared: str) -> None:
    """Build a store in this process, which ends by SIGKILL before a change."""
    kit = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["StoreKit"]()

    def at(operation: str, path: Path) -> None:
        if f"{operation} {path}" == where:
            os.kill(os.getpid(), signal.SIGKILL)

    files = ObjectFiles(location(address), at)  # type: ignore[arg-type]
    run(kit, address, Worker(1, 2) if shared == "True" else None, files=files)


@pytest.mark.parametrize("where", DEATHS)
def test_a_build_killed_anywhere_goes_on_and_redoes_only_what_was_not_finished(
    kit: StoreKit, service: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Fault 16, over http: kill -9 of a client; the lock is taken over at once."""
    units, shared = DEATHS[where]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, __file__, service.address, where, str(shared)],
                          env=environment, timeout=120)  # fmt: skip
    assert died.returncode == -signal.SIGKILL
    computed: list[int] = []
    write_unit = GenerationWriter.write_unit

    def counted(writer: GenerationWriter, index: int, *rest: Any) -> None:
        computed.append(index)
        write_unit(writer, index, *rest)

    monkeypatch.setattr(GenerationWriter, "write_unit", counted)
    began = time.monotonic()
    run(kit, service.address, Worker(2, 2) if shared else None)
    assert len(computed) == units
    assert time.monotonic() - began < SILENT_SECONDS / 2
    computed.clear()
    check_equal(kit, service.folder, fast_path / "s")


def test_random_kills_of_workers_of_a_service_lose_double_and_tear_nothing() -> None:
    stress = Path(__file__).parents[2] / "stress.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(stress), "--kills", "3", "--service"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 rows lost" in done.stdout


def test_what_a_writer_sent_before_it_lost_the_lock_does_not_come_after_it(
    kit: StoreKit, service: Any, fast_path: Path
) -> None:
    """As of a worker that was killed while its request waited: others set the unit up anew."""
    late = ObjectFiles(location(service.address))  # type: ignore[arg-type]
    with StoreWriter(service.address, provenance=kit.provenance, files=late) as writer:
        begun = writer.begin(kit.record("train/1"), kit.rows(N), dim=4, unit_rows=UNIT_ROWS)
        kit.fill(begun, kit.features(N), units=1)
        other = ObjectFiles(location(service.address))  # type: ignore[arg-type]
        found = other.bucket.get("writer.lock")
        assert found is not None
        holder = {**json.loads(bytes(found.data))["holders"][0], "token": other.own, "who": "B"}
        taken = {"holders": [holder], "shared": False, "after": found.e_tag}
        assert other.bucket.swap("writer.lock", json.dumps(taken).encode(), found.e_tag)
        before = content(service.folder)
        for act in (
            lambda: kit.fill(begun, kit.features(N)),
            lambda: late.publish("staging/leases/a/0.chosen", b"{}"),
            lambda: late.bucket.delete([CHUNK.replace("c/1", "c/0")]),
            lambda: late.replace("zarr.json", (service.folder / "zarr.json").read_bytes(), None),
        ):
            with pytest.raises(StoreBusy, match="held by B, and not, or no longer, by who asks"):
                act()
        assert content(service.folder) == before
        other.bucket.delete([CHUNK.replace("c/1", "c/0")])
        assert content(service.folder) != before, "who holds it changes it"


#: A server in a process of its own, as the command starts it.
_SERVER = """
import sys
from pathlib import Path
from gradstore.serve.running import Offer, serve
serve(Path(sys.argv[1]), int(sys.argv[2]), lambda address, _: print(address, flush=True), None,
      Offer(writable=True))
"""


def started(folder: Path, port: int, read_key: str) -> tuple[subprocess.Popen[str], int]:
    """Start a server; return it, and its port, once it answers."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(folder), str(port)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "GRADSTORE_TOKEN": read_key},
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline()
    return process, int(address.partition("/?")[0].rpartition(":")[2])


@pytest.mark.parametrize(
    ("where", "shared"),
    [("link generations/train/1/features/c/1/0", False), ("link commits/3.json", True)],
    ids=["alone", "worker"],
)
def test_a_server_that_dies_in_the_middle_is_waited_for(
    kit: StoreKit, serve_writable: Callable[..., Any], fast_path: Path, where: str, shared: bool
) -> None:
    """By SIGKILL. Its lock is as it was, so that the writer goes on and nobody else comes in."""
    processes = []
    process, port = started(fast_path / "served", 0, "a-key-of-the-tests-to-read")
    processes.append(process)

    def again() -> None:
        processes.append(started(fast_path / "served", port, "a-key-of-the-tests-to-read")[0])

    thread = threading.Thread(target=again)

    def at(operation: str, path: Path) -> None:
        if f"{operation} {path}" == where and not thread.ident:
            process.kill()
            process.wait()
            thread.start()

    address = f"http://127.0.0.1:{port}"
    files = ObjectFiles(location(address), at)  # type: ignore[arg-type]
    try:
        run(kit, address, Worker(1, 2) if shared else None, files=files)
        assert thread.ident, "it died"
    finally:
        thread.join(60)
        for each in processes:
            each.terminate()
            each.communicate()
    check_equal(kit, fast_path / "served", fast_path / "s")


# ---- a server, or a way to it, that fails ----------------------------------------------------


def cut() -> None:
    """End a connection without an answer."""
    raise ConnectionAbortedError


def test_a_server_that_is_busy_is_asked_again_when_it_says(
    kit: StoreKit, service: Any, faulty_service: Any, fast_path: Path
) -> None:
    number = itertools.count()
    told: dict[str, float] = {}
    waits: list[float] = []

    def busy(asked: Any) -> tuple[int, bytes] | None:
        name = f"{asked.method} {asked.path}"
        if name in told:
            waits.append(time.monotonic() - told.pop(name))
        elif next(number) % 110 == 7:
            told[name] = time.monotonic()
            return (503, 429)[len(waits) % 2], b"{}"
        return None

    faulty_service.before, faulty_service.more = busy, {"retry-after": "1"}
    run(kit, faulty_service.address)
    assert len(waits) > 1
    assert min(waits) >= 1
    check_equal(kit, service.folder, fast_path / "s")


@pytest.mark.parametrize("done", [True, False], ids=["answer lost", "write lost"])
def test_a_connection_cut_in_mid_write_leaves_one_write(
    kit: StoreKit, service: Any, faulty_service: Any, fast_path: Path, done: bool
) -> None:
    """Of chunks, records, plans, the root and commits; what the server did and did not do."""
    seen: set[str] = set()

    def once(asked: Any) -> None:
        if asked.method == "PUT" and asked.key not in seen:
            seen.add(asked.key)
            cut()

    faulty = faulty_service
    faulty.after, faulty.before = (once, faulty.before) if done else (faulty.after, once)
    run(kit, faulty.address)
    assert len(seen) > 40
    check_equal(kit, service.folder, fast_path / "s")


def test_a_body_changed_on_its_way_is_sent_again_and_never_seen(
    kit: StoreKit, service: Any, faulty_service: Any, fast_path: Path
) -> None:
    seen: set[str] = set()

    def spoil(asked: Any) -> None:
        if asked.method == "PUT" and asked.key not in seen and asked.body:
            seen.add(asked.key)
            asked.body = asked.body[:-1] + bytes([asked.body[-1] ^ 1])

    faulty_service.before = spoil
    run(kit, faulty_service.address)
    assert len(seen) > 40
    check_equal(kit, service.folder, fast_path / "s")


def test_a_server_that_stays_away_is_told_and_the_build_goes_on_later(
    kit: StoreKit, service: Any, faulty_service: Any, fast_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(bucket_module, "PATIENCE_SECONDS", 0.3)

    def away(asked: Any) -> tuple[int, bytes] | None:
        if "commits/1.json" in asked.key and asked.method == "PUT":
            faulty_service.before = lambda _: (502, b"<html>bad gateway")
            return 502, b""
        return None

    faulty_service.before = away
    with caplog.at_level(logging.DEBUG):
        with pytest.raises(StoreIOError, match=r"status 502.*committed data is untouched") as told:
            run(kit, faulty_service.address)
    assert service.write_key not in f"{told.value}{caplog.text}"
    faulty_service.before = lambda _: None
    run(kit, faulty_service.address)
    check_equal(kit, service.folder, fast_path / "s")


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_is_waited_for_longer_than_one_that_fails(
    kit: StoreKit, faulty_service: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(bucket_module, "PATIENCE_SECONDS", 0.3)
    left = 2

    def busy(asked: Any) -> tuple[int, bytes] | None:
        nonlocal left
        if asked.key != "commits/1.json" or asked.method != "PUT" or not left:
            return None
        left -= 1
        return status, b"{}"

    faulty_service.before = busy
    faulty_service.more = {"retry-after": "1", "gradstore-most-bytes": "1000000"}
    if status == 429:
        kit.build(faulty_service.address, n=4)
    else:
        with pytest.raises(StoreIOError, match="status 503"):
            kit.build(faulty_service.address, n=4)
    assert left == (0 if status == 429 else 1)


def test_a_server_that_is_not_there_or_is_another_is_told_soon(
    service: Any, faulty_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "FIRST_PATIENCE_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(StoreIOError, match="See that the service is well"):
        open_store("http://127.0.0.1:9")
    faulty_service.before = lambda _: (404, b"<html>not here")
    with pytest.raises(StoreIOError, match="status 404 of something else than"):
        open_store(faulty_service.address)
    faulty_service.before, faulty_service.more = (lambda _: (301, b"")), {"location": "http://a/"}
    with pytest.raises(StoreIOError, match=r"redirects \(status 301\), and the key is sent to no"):
        open_store(faulty_service.address)
    faulty_service.before = lambda _: None
    with pytest.raises(StoreIOError, match="status 404 of something else than"):
        open_store(f"{faulty_service.address}/below/a/path")
    assert time.monotonic() - began < 5


def test_a_file_larger_than_the_server_takes_is_told_at_once(
    kit: StoreKit, serve_writable: Callable[..., Any], tmp_path: Path
) -> None:
    from gradstore.serve.intake import Limits

    service = serve_writable(tmp_path / "served", Limits(body_bytes=600))
    began = time.monotonic()
    with pytest.raises(StoreIOError, match="600 are the most that this server takes"):
        run(kit, service.address)
    assert time.monotonic() - began < 10


# ---- addresses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("http://store.example.org/a", "over http:// its key could be read on the way"),
        ("http://127.0.0.1.evil.example", "could be read on the way"),
        ("https://", "names no host"),
        ("https://name:word@store.example.org", "names no host"),
        ("https://store.example.org:port", "names no host"),
        ("https://store.example.org/a/../b", "can't be part of a prefix"),
        ("https://store.example.org/?token=a", "can't be part of a prefix"),
    ],
)
def test_an_address_that_would_give_a_key_away_or_cannot_be_is_refused(
    address: str, says: str
) -> None:
    with pytest.raises(BadInput, match=says) as told:
        open_store(address)
    assert "word" not in str(told.value)


def test_an_address_is_one_place_however_it_is_written() -> None:
    wanted = location("https://store.example.org:8443/team/a")
    for text in ("https://Store.Example.ORG:8443/team/a/", "https:/store.example.org:8443/team/a"):
        assert location(text) == wanted
    assert str(wanted / "commits/1.json") == "https://store.example.org:8443/team/a/commits/1.json"
    for loopback in ("http://127.0.0.1:8417", "http://localhost", "http://[::1]:8417"):
        assert str(location(loopback)) == loopback


def test_over_https_only_a_certificate_that_is_trusted_is_talked_to(
    kit: StoreKit, serve_writable: Callable[..., Any], fast_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    key, certificate = fast_path / "key.pem", fast_path / "certificate.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=127.0.0.1",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        capture_output=True,
    )  # fmt: skip
    if made.returncode:
        pytest.skip("no openssl that makes certificates")
    service = serve_writable(fast_path / "served", ssl_keyfile=str(key),
                             ssl_certfile=str(certificate))  # fmt: skip
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with pytest.raises(StoreIOError, match="SSL_CERT_FILE names certificates to trust"):
        run(kit, service.address)
    assert content(service.folder) == {}
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    run(kit, service.address)
    check_equal(kit, service.folder, fast_path / "s")
    gc.collect()  # clients, whose connections a server over TLS takes its time to end


if __name__ == "__main__":
    die(*sys.argv[1:])
