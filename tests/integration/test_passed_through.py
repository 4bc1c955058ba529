"""LlamaFactory's other commands, started for real through dataflex-cli and stopped again."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny" / "model"

#: Seconds a server may take to answer: importing LlamaFactory and gradio on a busy machine.
PATIENCE = 240.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(cli: Any, log: Path, *arguments: object, **env: str) -> Iterator[int]:
    """A server, by its process id; killed at the end."""
    quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "BROWSER": "true"}
    pid = cli(*arguments, cwd=log.parent, env={**quiet, **env}, background=log).code
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def ended(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def answer_of(url: str, pid: int, log: Path) -> str:
    """The page at `url`, as soon as the server gives one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert not ended(pid), log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return str(response.read().decode())
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(
        f"no answer in {PATIENCE:.0f} s: {log.read_text(errors='replace')[-3000:]}"
    )


def settings(folder: Path, **more: object) -> Path:
    """A configuration file for LlamaFactory's inference."""
    path = folder / "infer.yaml"
    content = {"model_name_or_path": str(MODEL), "template": "default", **more}
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("name", ["webui", "webchat"])
def test_the_pages_of_llamafactory_are_served(name: str, cli: Any, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    arguments = ["webui"] if name == "webui" else ["webchat", settings(tmp_path)]
    env = {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with started(cli, log, *arguments, **env) as pid:
        assert "LLaMA Factory" in answer_of(f"http://127.0.0.1:{port}/", pid, log)


def test_the_api_server_names_its_model(cli: Any, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    env = {"API_HOST": "127.0.0.1", "API_PORT": str(port)}
    with started(cli, log, "api", settings(tmp_path), **env) as pid:
        assert '"object":"list"' in answer_of(f"http://127.0.0.1:{port}/v1/models", pid, log)


def test_chat_answers_and_leaves_at_exit(cli: Any, tmp_path: Path) -> None:
    found = cli("chat", settings(tmp_path, max_new_tokens=4), cwd=tmp_path, given="hello\nexit\n")
    assert found.code == 0, found.err[-3000:]
    assert "Assistant:" in found.out


def test_export_writes_a_model(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    found = cli("export", settings(tmp_path, export_dir=str(out)), cwd=tmp_path)
    assert found.code == 0, found.err[-3000:]
    assert (out / "model.safetensors").is_file()


def test_env_prints_versions(cli: Any, tmp_path: Path) -> None:
    found = cli("env", cwd=tmp_path)
    assert found.code == 0, found.err[-3000:]
    assert "`llamafactory` version" in found.out


def test_eval_says_what_llamafactory_says(cli: Any, tmp_path: Path) -> None:
    """LlamaFactory 0.9.5 has given the command up; its own words arrive."""
    found = cli("eval", "--help", cwd=tmp_path)
    assert found.code == 1
    assert "Evaluation will be deprecated" in found.err


def test_python_m_dataflex_is_the_command_line(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-m", "dataflex", "version"], cwd=tmp_path, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert found.stdout.startswith("dataflex-gradstore ")
