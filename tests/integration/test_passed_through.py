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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "tiny" / "model"

#: Seconds a server may take to answer: importing LlamaFactory and gradio on a busy machine.
PATIENCE = 240.0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "dataflex", *arguments]


def environment(**more: str) -> dict[str, str]:
    quiet = {"OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "False", "BROWSER": "true"}
    return {**os.environ, **quiet, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started(
    arguments: list[str], env: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process group of its own, ended with all its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(*arguments), cwd=log.parent, env=dict(env), stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def answer_of(url: str, process: subprocess.Popen[bytes], log: Path) -> str:
    """The page at `url`, as soon as the server gives one."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
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
def test_the_pages_of_llamafactory_are_served(name: str, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    env = environment(GRADIO_SERVER_NAME="127.0.0.1", GRADIO_SERVER_PORT=str(port))
    arguments = ["webui"] if name == "webui" else ["webchat", str(settings(tmp_path))]
    with started(arguments, env, log) as process:
        assert "LLaMA Factory" in answer_of(f"http://127.0.0.1:{port}/", process, log)


def test_the_api_server_names_its_model(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    env = environment(API_HOST="127.0.0.1", API_PORT=str(port))
    with started(["api", str(settings(tmp_path))], env, log) as process:
        assert '"object":"list"' in answer_of(f"http://127.0.0.1:{port}/v1/models", process, log)


def test_chat_answers_and_leaves_at_exit(tmp_path: Path) -> None:
    path = settings(tmp_path, max_new_tokens=4)
    found = subprocess.run(
        command("chat", str(path)), cwd=tmp_path, env=environment(), input="hello\nexit\n",
        capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    assert "Assistant:" in found.stdout


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
        command("version"), cwd=tmp_path, env=environment(), capture_output=True, text=True,
        timeout=PATIENCE, check=True,
    )  # fmt: skip
    assert found.stdout.startswith("dataflex-gradstore ")
