"""Shared by every test: no hub, no telemetry, one thread, quiet progress bars; object stores."""

from __future__ import annotations

import itertools
import logging
import os
import urllib.request
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DISABLE_VERSION_CHECK", "1")

# A test says whether numbers are right; how long that takes is for benchmarks.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

#: Bucket that a server of the tests has.
BUCKET = "features"

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def object_server() -> Iterator[str]:
    """Address of an object store on loopback, with one bucket: moto's, a process's own."""
    pytest.importorskip("obstore")
    server_module = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).close()
    yield address
    server.stop()


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
def bucket(object_server: str, use_server: Callable[[str], str]) -> str:
    """A prefix in a bucket, empty, with the environment set to reach it."""
    return use_server(object_server)
