"""A build of all that a store has, and a proxy that makes faults before the place of a store."""

from __future__ import annotations

import http.client
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.format.text_table import Text
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.storage.leases import Worker
from gradstore.storage.local import StoreFiles
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import InBucket, InService, StoreKit

_HOST = "127.0.0.1"

#: A server of objects that knows no conditions: it writes whatever If-None-Match says.
S3RVER = "s3rver@3.7.1"


class Build:
    """Builds two generations and the text of their rows; every byte follows from the kit."""

    n, unit_rows = 12, 4
    names = ("target/skill/1", "train/1")
    #: A file of it.
    chunk = "generations/train/1/features/c/1/0"

    def __init__(self, kit: StoreKit) -> None:
        self.kit = kit

    def run(
        self,
        place: str | Path,
        worker: Worker | None = None,
        names: Sequence[str] = names,
        files: StoreFiles | None = None,
    ) -> None:
        """Build them all, as one worker or alone."""
        with self.writer(place, worker, files) as writer:
            self.work(writer, names)

    def writer(
        self, place: str | Path, worker: Worker | None = None, files: StoreFiles | None = None
    ) -> StoreWriter:
        return StoreWriter(place, provenance=self.kit.provenance, worker=worker, files=files)

    def work(
        self, writer: StoreWriter, names: Sequence[str] = names, returned: list[str] | None = None
    ) -> None:
        """Build them all; note what has returned."""
        kit, n, done = self.kit, self.n, [] if returned is None else returned
        texts = [Text(f"prompt {i}", f"answer {i}", 3) for i in range(n)]
        writer.keep_texts(kit.rows(n), texts)
        done.append("texts")
        for name in names:
            begun = writer.begin(kit.record(name), kit.rows(n), dim=4, unit_rows=self.unit_rows)
            for unit in begun.claimed():
                k = unit.stop - unit.start
                begun.write_unit(
                    unit.index, kit.features(n)[unit.start : unit.stop],
                    np.ones(k, np.float32), np.zeros(k, np.uint8),
                    np.arange(k, dtype=np.int32),
                )  # fmt: skip
            begun.commit()
            done.append(name)

    def scores(self, place: str | Path) -> np.ndarray:
        """Of the newest train generation's rows."""
        return influence_scores(checkpoint_features(open_store(place), "last")).values

    def check(self, place: InBucket | InService | Path, reference: Path) -> None:
        """A place holds what one build into a folder, made here if need be, leaves there."""
        if not reference.exists():
            self.run(reference)
        files, lies = (place, place) if isinstance(place, Path) else (place.files(), place.lies)
        assert self.kit.content(files) == self.kit.content(reference)
        assert verify_store(lies).ok


@pytest.fixture
def build(kit: StoreKit) -> Build:
    return Build(kit)


@dataclass
class Asked:
    """A request on its way to the server; `headers` may be changed."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        return self.path.partition("?")[0].removeprefix("/features/").removeprefix("/v1/files/")


#: What a fault does with a request: answers it (status, body), or None for the server's answer.
Fault = Callable[[Asked], tuple[int, bytes] | None]


@dataclass
class FaultyServer:
    """A proxy before an object store: `before` and `after` the server did what it was asked.

    Attributes:
        address: of the proxy.
        before: may wait, answer in the server's place, change the request's headers, or raise
            ConnectionAbortedError, which ends the connection without an answer.
        after: the same, once the server has done what was asked.
        asked: every request, as "METHOD key".
        more: headers of the answers that a fault gives.
        late: keys that no listing shows.
        halves: of which requests half of the body reaches the server before the connection ends,
            at both ends.
    """

    address: str = ""
    before: Fault = lambda _: None
    after: Fault = lambda _: None
    halves: Callable[[Asked], bool] = lambda _: False
    asked: list[str] = field(default_factory=list)
    more: dict[str, str] = field(default_factory=dict)
    late: set[str] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)

    def hide_new(self) -> None:
        """Let listings show, from now on, nothing that is written from now on."""
        self.keys -= self.late
        old, late = set(self.keys), self.late

        def note(asked: Asked) -> None:
            if asked.method == "PUT" and asked.key not in old:
                late.add(asked.key)

        self.before = note

    def shown(self, listing: bytes) -> bytes:
        """Leave out of a listing what is late."""
        visible = self.keys - self.late

        def entry(found: re.Match[bytes]) -> bytes:
            return b"" if found[1].decode() in self.late else found[0]

        def prefix(found: re.Match[bytes]) -> bytes:
            begins = found[1].decode()
            return found[0] if any(key.startswith(begins) for key in visible) else b""

        listing = re.sub(rb"<Contents>.*?<Key>(.*?)</Key>.*?</Contents>", entry, listing,
                         flags=re.DOTALL)  # fmt: skip
        return re.sub(rb"<CommonPrefixes>\s*<Prefix>(.*?)</Prefix>\s*</CommonPrefixes>", prefix,
                      listing, flags=re.DOTALL)  # fmt: skip


@pytest.fixture
def faulty(
    request: pytest.FixtureRequest,
    server_called: Callable[[str], str],
    use_server: Callable[[str], str],
) -> Iterator[FaultyServer]:
    """The proxy before an object store, which a parameter names; without a fault so far."""
    with proxied(server_called(getattr(request, "param", "bucket"))) as made:
        yield made


@pytest.fixture
def faulty_service(service: Any) -> Iterator[FaultyServer]:
    """The proxy before a service that takes writes; without a fault so far."""
    with proxied(service.address) as made:
        yield made


class Behind:
    """A place with the proxy before it.

    Attributes:
        proxy: before it.
        address: of the store, by the proxy.
        place: behind it.
        failure: what its server answers when it fails.
    """

    def __init__(
        self, proxy: FaultyServer, place: InBucket | InService, failure: tuple[int, bytes]
    ) -> None:
        self.proxy, self.place, self.failure = proxy, place, failure
        self.address = place.address if place.address.startswith("s3:") else proxy.address


@pytest.fixture(params=["bucket", "service"])
def behind(
    request: pytest.FixtureRequest,
    server_called: Callable[[str], str],
    in_bucket: Callable[[str], InBucket],
) -> Iterator[Behind]:
    """A place in a bucket, of either server, and one behind a service, with the proxy before it."""
    if request.param == "service":
        place = request.getfixturevalue("in_service")
        with proxied(place.address) as proxy:
            yield Behind(proxy, place, (502, b"<html>bad gateway"))
        return
    with proxied(server_called(request.param)) as proxy:
        yield Behind(proxy, in_bucket(proxy.address), (500, b"<Code>InternalError</Code>"))


@contextmanager
def proxied(address: str) -> Iterator[FaultyServer]:
    """Pass requests on to a server."""
    made = FaultyServer()
    upstream = address.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked = Asked(self.command, self.path, dict(self.headers.items()), body)
            made.asked.append(f"{asked.method} {asked.key}")
            if made.halves(asked):
                forward_half(asked)
                self.close_connection = True
                return
            try:
                told = made.before(asked)
                status, headers, data = (told and (told[0], made.more, told[1])) or forwarded(asked)
                told = made.after(asked)
                status, data = told or (status, data)
            except ConnectionAbortedError:
                self.close_connection = True
                return
            if asked.method == "PUT" and status in (200, 201):
                made.keys.add(asked.key)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            head = self.command == "HEAD" and "content-length" in headers
            if not head:
                self.send_header("content-length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

    def forwarded(asked: Asked) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(upstream, timeout=30)
        try:
            connection.request(asked.method, asked.path, asked.body, asked.headers)
            found = connection.getresponse()
            data = found.read()
        finally:
            connection.close()
        if "list-type=2" in asked.path:
            data = made.shown(data)
        dropped = {"connection", "transfer-encoding", "date", "server"}
        dropped |= set() if asked.method == "HEAD" else {"content-length"}
        headers = {n.lower(): v for n, v in found.getheaders() if n.lower() not in dropped}
        return found.status, headers, data

    def forward_half(asked: Asked) -> None:
        connection = http.client.HTTPConnection(upstream, timeout=30)
        connection.putrequest(asked.method, asked.path, skip_host=True, skip_accept_encoding=True)
        for name, value in asked.headers.items():
            connection.putheader(name, value)
        connection.endheaders(asked.body[: len(asked.body) // 2])
        connection.close()

    server = ThreadingHTTPServer((_HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    made.address = f"http://{_HOST}:{server.server_address[1]}"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def s3rver(
    pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    """Address of the npm package s3rver on loopback, and the folder of its one bucket.

    It is installed once, below pytest's cache: s3rver itself is pinned, what it needs npm chooses.
    """
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip(f"npm is not installed, which brings {S3RVER}")
    assert pytestconfig.cache is not None
    installed = pytestconfig.cache.mkdir(S3RVER.replace("@", "-"))
    program, folder = installed / "node_modules/.bin/s3rver", tmp_path_factory.mktemp("s3rver")
    if not program.exists():
        ask = [npm, "install", "--prefix", str(installed), "--ignore-scripts", "--no-audit",
               "--no-fund", "--loglevel=error", S3RVER]  # fmt: skip
        try:
            subprocess.run(ask, check=True, capture_output=True, text=True, timeout=180)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm does not install {S3RVER}: {str(error.stderr or error)[-300:]}")
    command = [str(program), "--directory", str(folder), "--address", _HOST, "--port", "0",
               "--configure-bucket", "features"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    with process.stdout as told:
        said: list[str] = []
        for line in told:
            said.append(line)
            if port := re.search(rf"listening on {_HOST}:(\d+)", line):
                break
        else:
            pytest.fail(f"{S3RVER} does not start: {''.join(said)[-2000:]}")
        try:
            yield f"http://{_HOST}:{port[1]}", folder / "features"
        finally:
            process.kill()
            process.wait()
