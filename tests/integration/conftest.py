"""The command line as a fixture, and a small run on the embedded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"


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


Cli = Callable[..., Result]


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """`cli("train", path, ..., faults={...}, env={...}, ranks=2)` -> Result, in real processes.

    A variable of `env` that is None is not set there. A run's picture is drawn with `draws` alone.
    With `background`, a file for its output, `code` is the id of a process that goes on.
    """
    # Tests read off LlamaFactory's INFO how far a run came; test_screen.py is about runs without.
    inherited = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
                 "LLAMAFACTORY_VERBOSITY": "INFO"}  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "zygote.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=inherited,
        text=True,
    )
    folder = tmp_path_factory.mktemp("output")

    def call(
        *argv: object,
        program: str = "dataflex-cli",
        cwd: Path = ROOT,
        faults: Mapping[str, Any] | None = None,
        env: Mapping[str, str | None] | None = None,
        ranks: int = 1,
        given: str | None = None,
        background: Path | None = None,
        draws: bool = False,
    ) -> Result:
        assert process.stdin is not None
        assert process.stdout is not None
        out, err = (background or folder / "out.txt"), (background or folder / "err.txt")
        request = {"argv": [program, *map(str, argv)], "cwd": str(cwd), "out": str(out),
                   "err": str(err), "faults": dict(faults or {}), "env": dict(env or {}),
                   "ranks": ranks, "draws": draws,
                   "background": background is not None}  # fmt: skip
        if given is not None:
            request["given"] = given
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        if background is not None:
            return Result(code, "", "")
        # As they are: a line that is written over and over is one line of the terminal.
        return Result(code, *(path.read_bytes().decode() for path in (out, err)))

    yield call
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=30)
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Write a small LESS run's YAML: 8 steps, accumulation 3, dropout on, 96 rows."""

    def write(name: str = "run.yaml", **changes: object) -> Path:
        content: dict[str, object] = {
            "model_name_or_path": str(TINY / "model"),
            "template": "default",
            "dataset": "tiny_train",
            "dataset_dir": str(TINY / "data"),
            "cutoff_len": 64,
            "max_samples": 96,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_target": "q_proj,down_proj",
            "lora_dropout": 0.1,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "learning_rate": 2.0e-3,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "overwrite_cache": True,
            "train_type": "dynamic_select",
            "component_name": "less",
            "target_dataset": "tiny_target",
            "warmup_step": 2,
            "update_step": 3,
            "update_times": 2,
            "component_params": {"proj_dim": 128},
        }
        content.update(changes)
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write
