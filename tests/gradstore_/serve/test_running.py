"""The command: an address with a token, a port that is told if it is taken, and a quick end."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from gradstore.errors import BadInput
from gradstore.serve.keys import both_keys, own_token
from gradstore.serve.running import listen

COMMAND = ("-m", "dataflex", "gradstore", "serve")


class Begun:
    """A server in the background: what it said on either stream, and its end."""

    def __init__(self, cli: Any, folder: Path, *command: object, **env: str | None) -> None:
        self._cli, self._out, self._err = cli, folder / "out.txt", folder / "err.txt"
        self._process: int | None = cli(*command, program="python", env=env,
                                        background=(self._out, self._err)).code  # fmt: skip

    def lines(self, words: str) -> list[str]:
        """Wait until it said some words on stdout; the lines up to them."""
        ends = time.monotonic() + 60
        while words not in (said := self._out.read_text()) or not said.endswith("\n"):
            assert time.monotonic() < ends, said + self._err.read_text()
            time.sleep(0.02)
        return said.splitlines()

    def interrupted(self) -> tuple[int, str]:
        """Press Ctrl-C; its exit code, and what it said on stderr."""
        return self.ended(signal.SIGINT), self._err.read_text()

    def ended(self, how: int) -> int:
        """Send a signal, unless it has ended already; its exit code."""
        if self._process is None:
            return 0
        os.kill(self._process, how)
        code, self._process = self._cli.ended(self._process), None
        return int(code)


@pytest.fixture
def begin(cli: Any, tmp_path: Path) -> Iterator[Callable[..., Begun]]:
    """Begin servers that end with the test."""
    begun: list[Begun] = []

    def begin_one(*command: object, **env: str | None) -> Begun:
        folder = tmp_path / f"said-{len(begun)}"
        folder.mkdir()
        begun.append(Begun(cli, folder, *command, **env))
        return begun[-1]

    yield begin_one
    for each in begun:
        each.ended(signal.SIGKILL)


def test_the_printed_address_opens_the_page_and_ctrl_c_ends_it_at_once(
    begin: Callable[..., Begun], store_path: Path
) -> None:
    process = begin(*COMMAND, store_path, "--port", 0)
    first, address, *_ = process.lines("/?token=")
    assert "is served at" in first
    address = address.strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[\w-]{32}", address)
    with httpx.Client(follow_redirects=True) as client:
        page = client.get(address)
        assert (page.status_code, "<title>Gradient store" in page.text) == (200, True)
        base = address.partition("/?")[0]
        assert client.get(f"{base}/v1/stores").status_code == 200
        assert httpx.get(f"{base}/v1/stores").status_code == 401
        # A connection is still open when it ends.
        began = time.monotonic()
        code, said = process.interrupted()
    assert (code, said.strip()) == (130, "stopped.")
    assert time.monotonic() - began < 10


def test_a_port_in_use_is_bad_input_that_names_it_and_the_option(
    cli: Any, store_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"port {port} is in use.*--port"):
            listen(port)
        found = cli(*COMMAND, store_path, "--port", port, program="python")
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith(f"error: port {port} is in use")
    assert "Traceback" not in found.err


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
    serve(sys.argv[1], 0, lambda address, _: print(address, flush=True), Model())
except KeyboardInterrupt:
    sys.exit(130)
"""


def test_ctrl_c_answers_a_prompt_that_waits_for_its_model(
    begin: Callable[..., Begun], store_path: Path
) -> None:
    process = begin("-c", _SLOW, store_path)
    base, _, token = process.lines("/?token=")[0].strip().partition("/?token=")
    headers = {"Authorization": f"Bearer {token}"}
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, f"{base}/v1/explain?wait=50", json={"prompt": "a"},
                              headers=headers, timeout=60)  # fmt: skip
        while "loading the model" not in httpx.get(f"{base}/v1/jobs", headers=headers).text:
            time.sleep(0.05)
        began = time.monotonic()
        code, said = process.interrupted()
        assert (waiting.result().status_code, waiting.result().json()["title"]) == (
            409,
            "cancelled",
        )
    assert (code, said) == (130, "")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("given", [True, False])
def test_a_server_that_takes_writes_tells_the_key_that_it_made_and_none_that_it_was_given(
    begin: Callable[..., Begun], tmp_path: Path, given: bool
) -> None:
    keys = {"GRADSTORE_TOKEN": "a-key-that-reads-only",
            "GRADSTORE_WRITE_TOKEN": "a-key-that-writes-too" if given else None}  # fmt: skip
    process = begin(*COMMAND, tmp_path / "new", "--port", 0, "--writable", "--max-body", 1,
                    "--host", "store.example.org", **keys)  # fmt: skip
    lines = process.lines("Ctrl-C")
    said = "\n".join(lines)
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
    code, error = process.interrupted()
    assert (code, error.strip()) == (130, "stopped.")
    assert (tmp_path / "new/writer.lock").read_bytes() == b"", "its store is let go"


def test_two_keys_that_are_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GRADSTORE_TOKEN", "GRADSTORE_WRITE_TOKEN"):
        monkeypatch.setenv(name, "one-key-for-both-of-them")
    with pytest.raises(BadInput, match="whoever may read could write"):
        both_keys()
    monkeypatch.setenv("GRADSTORE_WRITE_TOKEN", "short")
    with pytest.raises(BadInput, match="GRADSTORE_WRITE_TOKEN has 5 characters"):
        both_keys()
