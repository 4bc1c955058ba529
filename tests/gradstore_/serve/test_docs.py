"""Every example of docs/service.md works, and it names every path there is."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
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
def test_every_example_is_answered(cli: Any, until: Any, store_path: Path, tmp_path: Path) -> None:
    command, said = ("-m", "dataflex", "gradstore", "serve"), tmp_path / "said"
    server = cli(*command, store_path, "--port=0", program="python", background=said).code
    try:
        told = until(said, "Ctrl-C")
        address, _, token = told.splitlines()[1].strip().partition("/?token=")
        definition = re.search(r"^alias (ask)='(.*)'$", PAGE, flags=re.M)
        assert definition is not None
        ask = f'ask() {{ {definition[2]} "$@"; }}'
        for example in EXAMPLES:
            script = f"AT={address} TOKEN={token}\n{ask}\n{example}"
            found = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True)
            assert found.returncode == 0, f"{example}: {found.stdout!r} {found.stderr!r}"
            for line in found.stdout.splitlines():
                json.loads(line)
    finally:
        os.kill(server, signal.SIGTERM)
        cli.ended(server)
    assert (tmp_path / "scores.arrow").stat().st_size > 300 * 4
