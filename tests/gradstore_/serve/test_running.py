"""The command: an address with a token, a port that is told if it is taken, and a quick end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gradstore.errors import BadInput
from gradstore.serve.keys import own_token
from gradstore.serve.running import listen

COMMAND = (sys.executable, "-m", "dataflex", "gradstore", "serve")


@pytest.fixture
def server(store_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of a free port, and the address it printed."""
    process = subprocess.Popen(
        [*COMMAND, str(store_path), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert "is served at" in process.stdout.readline()
    yield process, process.stdout.readline().strip()
    process.kill()
    process.communicate()


def test_the_printed_address_opens_the_page_and_ctrl_c_ends_it_at_once(
    server: tuple[subprocess.Popen[str], str],
) -> None:
    process, address = server
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address)
    with httpx.Client(follow_redirects=True) as client:
        page = client.get(address)
        assert (page.status_code, "<title>Gradient store" in page.text) == (200, True)
        base = address.partition("/?")[0]
        assert client.get(f"{base}/v1/stores").status_code == 200
        assert httpx.get(f"{base}/v1/stores").status_code == 401
        # A connection is still open when it ends.
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert (process.returncode, said.strip()) == (130, "stopped.")
    assert time.monotonic() - began < 10


def test_a_port_in_use_is_bad_input_that_names_it_and_the_option(store_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"port {port} is in use.*--port"):
            listen(port)
        found = subprocess.run(
            [*COMMAND, str(store_path), "--port", str(port)], capture_output=True, text=True
        )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith(f"error: port {port} is in use")
    assert "Traceback" not in found.stderr


def test_a_token_of_ones_own_must_be_hard_to_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRADSTORE_TOKEN", raising=False)
    assert own_token() != own_token()
    monkeypatch.setenv("GRADSTORE_TOKEN", "a-token-of-my-own")
    assert own_token() == "a-token-of-my-own"
    for weak in ("short", "a token of my own!", ""):
        monkeypatch.setenv("GRADSTORE_TOKEN", weak)
        with pytest.raises(BadInput, match="GRADSTORE_TOKEN"):
            own_token()


_SLOW = """
import sys, time
from gradstore.serve.running import serve
class Model:
    def explain(self, *args, on_stage, **named):
        on_stage("loading the model")
        time.sleep(60)
try:
    serve(sys.argv[1], 0, lambda address, _: print(address), Model())
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_answers_a_prompt_that_waits_for_its_model(store_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _SLOW, str(store_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    base, _, token = process.stdout.readline().strip().partition("/?token=")
    headers = {"Authorization": f"Bearer {token}"}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{base}/v1/explain?wait=50", json={"prompt": "a"},
                              headers=headers, timeout=60)  # fmt: skip
        while "loading the model" not in httpx.get(f"{base}/v1/jobs", headers=headers).text:
            time.sleep(0.05)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
        assert (waiting.result().status_code, waiting.result().json()["title"]) == (
            409,
            "cancelled",
        )
    assert (process.returncode, said) == (130, "")
    assert time.monotonic() - began < 5
