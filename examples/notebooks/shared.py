"""What the notebooks share: one training run, and commands that show what they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from IPython.display import clear_output

import dataflex

HERE = Path(__file__).resolve().parent


def trained_run() -> Path:
    """Return the folder of run.yaml's run by this version, trained first where there is none."""
    run = HERE / "runs" / dataflex.__version__
    if not (run / "train_results.json").exists():
        # One that was stopped half-way is made anew.
        dataflex_cli("train", "examples/notebooks/run.yaml", f"output_dir={run}",
                     "overwrite_output_dir=true")  # fmt: skip
    return run


def dataflex_cli(*words: str) -> None:
    """Run a command of dataflex-cli in the clone, and show what it says for as long as it runs.

    Args:
        words: command, options and `key=value`.

    Raises:
        RuntimeError: it failed; what it said stays.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "dataflex", *words],
        cwd=HERE.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode != 0:
        raise RuntimeError(
            f"dataflex-cli {words[0]} ended with exit code {process.returncode}; its message is "
            "above"
        )
    clear_output()
