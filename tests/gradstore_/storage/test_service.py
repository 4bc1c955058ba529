"""A service of a store: keys, refusals, servers that die, fail or are slow, and addresses.

What it shares with a bucket is in test_elsewhere.py, and test_object_faults.py.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import BadInput, ProvenanceMismatch, StoreBusy, StoreIOError
from gradstore.storage import bucket as bucket_module
from gradstore.storage.leases import Worker
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

# ---- who may write --------------------------------------------------------------------------


def test_names_that_are_quoted_on_the_disk_arrive_as_they_are(kit: StoreKit, service: Any) -> None:
    name = "a+b@c/target/org%2Fset%20one/1"
    kit.build(service.address, name, n=4)
    assert (service.folder / f"plans/{name}.json").is_file()
    assert [each.name for each in open_store(service.address).generations()] == [name]
    assert verify_store(service.folder).ok


def test_the_key_that_reads_reads_and_is_told_that_it_may_not_write(
    build: Any, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build.run(service.address)
    before = build.kit.content(service.folder)
    monkeypatch.delenv("GRADSTORE_WRITE_TOKEN")
    monkeypatch.setenv("GRADSTORE_TOKEN", service.read_key)
    assert build.scores(service.address).shape == (build.n,)
    with pytest.raises(StoreIOError, match="this key may only read") as told:
        build.run(service.address)
    assert service.read_key not in str(told.value)
    for key, says in (("wrong-key-of-nobody", "does not know this key"), ("a key", "no key has")):
        monkeypatch.setenv("GRADSTORE_TOKEN", key)
        with pytest.raises((StoreIOError, BadInput), match=says) as refused:
            open_store(service.address)
        assert key not in str(refused.value)
    monkeypatch.delenv("GRADSTORE_TOKEN")
    with pytest.raises(BadInput, match="set GRADSTORE_TOKEN to read, or GRADSTORE_WRITE_TOKEN"):
        open_store(service.address)
    assert build.kit.content(service.folder) == before


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


def test_a_service_keeps_its_store_in_a_bucket_as_in_a_folder(
    build: Any, kit: StoreKit, bucket: str, serve_writable: Callable[..., Any], fast_path: Path
) -> None:
    service = serve_writable(bucket)
    build.run(service.address)
    build.run(fast_path / "s")
    told = verify_store(bucket)
    assert (told.ok, told.generations) == (True, build.names)
    np.testing.assert_array_equal(build.scores(service.address), build.scores(fast_path / "s"))
    with pytest.raises(StoreBusy, match=rf"host \S+, pid {os.getpid()}"):
        StoreWriter(bucket, provenance=kit.provenance)
    service.stop()
    build.run(bucket)
    service.start()


def test_fault_11_a_writer_that_meets_another_provenance_on_its_way_hears_every_difference(
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


# ---- who dies --------------------------------------------------------------------------------


def test_what_a_writer_sent_before_it_lost_the_lock_does_not_come_after_it(
    build: Any, kit: StoreKit, service: Any
) -> None:
    """As of a worker that was killed while its request waited: others set the unit up anew."""
    chunk, values = build.chunk.replace("c/1", "c/0"), kit.features(build.n)
    late = ObjectFiles(location(service.address))  # type: ignore[arg-type]
    with StoreWriter(service.address, provenance=kit.provenance, files=late) as writer:
        begun = writer.begin(
            kit.record("train/1"), kit.rows(build.n), dim=4, unit_rows=build.unit_rows
        )
        kit.fill(begun, values, units=1)
        other = ObjectFiles(location(service.address))  # type: ignore[arg-type]
        found = other.bucket.get("writer.lock")
        assert found is not None
        holder = {**json.loads(bytes(found.data))["holders"][0], "token": other.own, "who": "B"}
        taken = {"holders": [holder], "shared": False, "after": found.e_tag}
        assert other.bucket.swap("writer.lock", json.dumps(taken).encode(), found.e_tag)
        before = build.kit.content(service.folder)
        for act in (
            lambda: kit.fill(begun, values),
            lambda: late.publish("staging/leases/a/0.chosen", b"{}"),
            lambda: late.bucket.delete([chunk]),
            lambda: late.replace("zarr.json", (service.folder / "zarr.json").read_bytes(), None),
        ):
            with pytest.raises(StoreBusy, match="held by B, and not, or no longer, by who asks"):
                act()
        assert build.kit.content(service.folder) == before
        other.bucket.delete([chunk])
        assert build.kit.content(service.folder) != before, "who holds it changes it"


#: A server in a process of its own, as the command starts it.
_SERVER = """
import sys
from pathlib import Path
from gradstore.serve.running import Offer, serve
serve(Path(sys.argv[1]), int(sys.argv[2]), lambda address, _: print(address, flush=True), None,
      Offer(writable=True))
"""


@pytest.fixture
def started(cli: Any, until: Any, fast_path: Path) -> Callable[[int], tuple[int, int]]:
    """Start a server of `fast_path / "served"`; its process and its port, once it answers."""
    said = fast_path / "said"

    def start(port: int) -> tuple[int, int]:
        process = cli("-c", _SERVER, fast_path / "served", port, program="python", background=said,
                      env={"GRADSTORE_TOKEN": "a-key-of-the-tests-to-read"}).code  # fmt: skip
        address = until(said, "/?").partition("/?")[0]
        return process, int(address.rpartition(":")[2])

    return start


@pytest.mark.parametrize(
    ("where", "shared"),
    [("link generations/train/1/features/c/1/0", False), ("link commits/3.json", True)],
    ids=["alone", "worker"],
)
def test_a_server_that_dies_in_the_middle_is_waited_for(
    build: Any, cli: Any, started: Any, fast_path: Path, monkeypatch: pytest.MonkeyPatch,
    where: str, shared: bool,
) -> None:  # fmt: skip
    """By SIGKILL. Its lock is as it was, so that the writer goes on and nobody else comes in."""
    monkeypatch.setenv("GRADSTORE_WRITE_TOKEN", "a-key-of-the-tests-to-write")
    process, port = started(0)
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(started(port)[0]))

    def at(operation: str, path: Path) -> None:
        if f"{operation} {path}" == where and not thread.ident:
            os.kill(process, signal.SIGKILL)
            cli.ended(process)
            thread.start()

    address = f"http://127.0.0.1:{port}"
    files = ObjectFiles(location(address), at)  # type: ignore[arg-type]
    try:
        build.run(address, Worker(1, 2) if shared else None, files=files)
        assert thread.ident, "it died"
    finally:
        thread.join(60) if thread.ident else later.append(process)
        for each in later:
            os.kill(each, signal.SIGTERM)
            cli.ended(each)
    build.check(fast_path / "served", fast_path / "s")


# ---- a server, or a way to it, that fails ----------------------------------------------------


class Hurried:
    """A clock on which a sleep passes at once."""

    slept = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.slept

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Hurried:
    """The clock of who asks a server again, in this process."""
    hurried = Hurried()
    monkeypatch.setattr(bucket_module, "time", hurried)
    return hurried


def test_a_server_that_is_busy_is_asked_again_when_it_says(
    build: Any, service: Any, faulty_service: Any, fast_path: Path, clock: Hurried
) -> None:
    number = itertools.count()
    told: dict[str, float] = {}
    waits: list[float] = []

    def busy(asked: Any) -> tuple[int, bytes] | None:
        name = f"{asked.method} {asked.path}"
        if name in told:
            waits.append(clock.monotonic() - told.pop(name))
        elif next(number) % 110 == 7:
            told[name] = clock.monotonic()
            return (503, 429)[len(waits) % 2], b"{}"
        return None

    faulty_service.before, faulty_service.more = busy, {"retry-after": "1"}
    build.run(faulty_service.address)
    assert len(waits) > 1
    assert min(waits) >= 1
    build.check(service.folder, fast_path / "s")


def test_a_body_changed_on_its_way_is_sent_again_and_never_seen(
    build: Any, service: Any, faulty_service: Any, fast_path: Path
) -> None:
    seen: set[str] = set()

    def spoil(asked: Any) -> None:
        if asked.method == "PUT" and asked.key not in seen and asked.body:
            seen.add(asked.key)
            asked.body = asked.body[:-1] + bytes([asked.body[-1] ^ 1])

    faulty_service.before = spoil
    build.run(faulty_service.address)
    assert len(seen) > 40
    build.check(service.folder, fast_path / "s")


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_is_busy_is_waited_for_longer_than_one_that_fails(
    kit: StoreKit, faulty_service: Any, monkeypatch: pytest.MonkeyPatch, clock: Hurried, status: int
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
    assert (clock.slept >= 2) == (status == 429)


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
    build: Any, serve_writable: Callable[..., Any], tmp_path: Path
) -> None:
    from gradstore.serve.intake import Limits

    service = serve_writable(tmp_path / "served", Limits(body_bytes=600))
    began = time.monotonic()
    with pytest.raises(StoreIOError, match="600 are the most that this server takes"):
        build.run(service.address)
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
    build: Any, serve_writable: Callable[..., Any], fast_path: Path,
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
        build.run(service.address)
    assert build.kit.content(service.folder) == {}
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    build.run(service.address)
    build.check(service.folder, fast_path / "s")
    gc.collect()  # clients, whose connections a server over TLS takes its time to end
