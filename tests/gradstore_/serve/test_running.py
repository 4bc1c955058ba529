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
from gradstore.serve.keys import both_keys, own_token
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


@pytest.mark.parametrize("given", [True, False])
def test_a_server_that_takes_writes_tells_the_key_that_it_made_and_none_that_it_was_given(
    tmp_path: Path, given: bool
) -> None:
    keys = {"GRADSTORE_TOKEN": "a-key-that-reads-only"}
    keys |= {"GRADSTORE_WRITE_TOKEN": "a-key-that-writes-too"} if given else {}
    process = subprocess.Popen(
        [*COMMAND, str(tmp_path / "new"), "--port", "0", "--writable", "--max-body", "1",
         "--host", "store.example.org"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**{k: v for k, v in os.environ.items() if k != "GRADSTORE_WRITE_TOKEN"}, **keys,
             "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while "Ctrl-C" not in lines[-1]:
        lines.append(process.stdout.readline())
    said = "".join(lines)
    key = re.search(r"GRADSTORE_WRITE_TOKEN=([\w-]{32})", said)
    assert (key is None) == given
    assert "a-key-that-writes-too" not in said
    address = lines[1].strip().partition("/?")[0]
    shown = key[1] if key is not None else "a-key-that-writes-too"
    headers = {"Authorization": f"Bearer {shown}", "Host": "store.example.org"}
    with httpx.Client(base_url=address, headers=headers) as client:
        answer = client.get("/v1/files?deep=false")
        assert (answer.status_code, answer.json()) == (200, {"names": ["writer.lock"]})
        assert answer.headers["gradstore-most-bytes"] == str(1 << 20)
        assert client.get("/v1/files", headers={"Host": "another.example.org"}).status_code == 403
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error.strip()) == (130, "stopped.")
    assert (tmp_path / "new/writer.lock").read_bytes() == b"", "its store is let go"


def test_two_keys_that_are_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADSTORE_TOKEN", "GRADSTORE_WRITE_TOKEN"):
        monkeypatch.setenv(name, "one-key-for-both-of-them")
    with pytest.raises(BadInput, match="whoever may read could write"):
        both_keys()
    monkeypatch.setenv("GRADSTORE_WRITE_TOKEN", "short")
    with pytest.raises(BadInput, match="GRADSTORE_WRITE_TOKEN has 5 characters"):
        both_keys()
