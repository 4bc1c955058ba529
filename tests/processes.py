"""Real processes, from the side of the tests: zygote.py forks them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Result:
    """What a process said."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error message: from the line that begins with `error:`."""
        at = self.err.find("error: ")
        return self.err[at:] if at >= 0 else ""


class Cli:
    """`cli("train", path, ..., faults={...}, env={...}, ranks=2)` -> Result, in real processes.

    A variable of `env` that is None is not set there. A run's picture is drawn with `draws` alone.
    With `background`, a file for its output or one of each kind, `code` is the id of a process that
    goes on: `ended` waits for it. With `program="python"` the arguments are those of that program,
    and the environment is that of the test; `heavy` where it loads a model.
    """

    def __init__(self, folder: Path, **env: str) -> None:
        self._folder = folder
        self._one_asks = threading.Lock()
        # Tests read off LlamaFactory's INFO how far a run came: test_screen.py has runs without.
        inherited = {**os.environ, "OMP_NUM_THREADS": "1", "LLAMAFACTORY_VERBOSITY": "INFO",
                     "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **env}  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=inherited,
            text=True,
        )

    def __call__(
        self,
        *argv: object,
        program: str = "dataflex-cli",
        cwd: Path = ROOT,
        env: Mapping[str, str | None] | None = None,
        given: str = "",
        background: Path | tuple[Path, Path] | None = None,
        **more: Any,
    ) -> Result:
        """Run a program, or begin to; `more` as zygote.py says: faults, ranks, draws..."""
        files = background or (self._folder / "out.txt", self._folder / "err.txt")
        out, err = (files, files) if isinstance(files, Path) else files
        changes = {**(os.environ if program == "python" else {}), **(env or {})}
        request = {"faults": {}, "ranks": 1, "draws": False, "heavy": False, **more,
                   "argv": [program, *map(str, argv)], "cwd": str(cwd), "out": str(out),
                   "err": str(err), "env": changes, "given": given,
                   "background": background is not None}  # fmt: skip
        for path in (out, err):
            path.write_bytes(b"")  # it is there before the process opens it
        code = self._answer(request)
        if background is not None:
            return Result(code, "", "")
        # As they are: a line that is written over and over is one line of the terminal.
        return Result(code, out.read_bytes().decode(), err.read_bytes().decode())

    def ended(self, process: int) -> int:
        """Wait for a process in the background; its exit code."""
        return self._answer({"wait": process})

    def close(self) -> None:
        """End the process that forks; what it left in the background goes on."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def _answer(self, request: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._one_asks:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline())


def said(file: Path, words: str, process: int | None = None, seconds: float = 60) -> str:
    """Wait until a process has said some words; all that is in its file then."""
    ends = time.monotonic() + seconds
    while words not in (text := file.read_bytes().decode()) and time.monotonic() < ends:
        time.sleep(0.02)
    assert words in text, f"process {process} did not say {words!r}: {text[-3000:]}"
    return text
