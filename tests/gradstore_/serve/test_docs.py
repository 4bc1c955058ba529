"""Every example of docs/service.md works, and it names every path there is."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).resolve().parents[3] / "docs/service.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^ *(ask .*)$", PAGE, flags=re.M)


def test_the_page_names_every_path(client: Any) -> None:
    paths = client.get("/v1/openapi.json").json()["paths"]
    named = set(re.findall(r"/v1/[\w.{}/]+", PAGE))
    assert {path.replace("{job}", "{id}") for path in paths} <= named
    asked = " ".join(EXAMPLES)
    assert all(path.split("{")[0].rstrip("/") in asked for path in paths if "explain" not in path)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_every_example_is_answered(store_path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dataflex", "gradstore", "serve", str(store_path), "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        server.stdout.readline()
        address, _, token = server.stdout.readline().strip().partition("/?token=")
        definition = re.search(r"^alias (ask)='(.*)'$", PAGE, flags=re.M)
        assert definition is not None
        ask = f'ask() {{ {definition[2]} "$@"; }}'
        for example in EXAMPLES:
            script = f"AT={address} TOKEN={token}\n{ask}\n{example}"
            found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True)
            assert found.returncode == 0, f"{example}: {found.stdout!r} {found.stderr!r}"
            for line in found.stdout.splitlines():
                json.loads(line)
        server.terminate()
    assert (tmp_path / "scores.arrow").stat().st_size > 300 * 4
