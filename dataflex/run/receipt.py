"""The receipt of a run, `receipt.json`: who trained what, with what, for how long, how it ended."""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dataflex.config.secrets import redacted, without_secrets
from gradstore.format.foreign import read_json
from gradstore.format.names import printable
from gradstore.storage.replace import replace_file

#: Distributions whose versions decide what a run does.
PACKAGES = ("dataflex-gradstore", "llamafactory", "torch", "transformers", "peft", "datasets",
            "accelerate", "numpy")  # fmt: skip

#: Warnings that are kept; a run that warns at every step says the same again.
MOST_WARNINGS = 200

RECEIPT = "receipt.json"


class Receipt:
    """Writer of `receipt.json`: a session per start of the run, the last one still open."""

    def __init__(self, folder: Path) -> None:
        """Take the folder `output_dir/dataflex`; nothing is written yet."""
        self._path = folder / RECEIPT
        self._content: dict[str, Any] = {}
        self._began = 0.0

    @property
    def is_open(self) -> bool:
        """True from `begin` on: the folder's records are this run's."""
        return bool(self._content)

    def begin(
        self, run_id: str, config: Mapping[str, Any], rows: Mapping[str, Any], step: int
    ) -> None:
        """Open a session, after those of the same run before it.

        Args:
            run_id: the same for a run and its resumes.
            config: the keys of the run.
            rows: hashes of its row sets, and what made them.
            step: g, optimizer steps finished.
        """
        self._began = time.monotonic()
        session = {
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": _command(sys.argv),
            "from_step": step,
            "versions": _versions(),
            "machine": _machine(),
        }
        held = read_receipt(self._path.parent) or {}
        former = held["sessions"] if held.get("run_id") == run_id else []
        self._content = {
            "run_id": run_id,
            "config": without_secrets(config),
            "rows": rows,
            "sessions": [*former, session],
        }
        self._write()

    def end(self, how: str, warnings: Sequence[str]) -> None:
        """Close the session: `finished`, `interrupted`, or `failed` and a message."""
        seconds = time.monotonic() - self._began
        self._content["sessions"][-1] |= {
            "seconds": round(seconds, 3),
            "ended": printable(redacted(how)),
            "warnings": list(warnings),
        }
        self._write()

    def _write(self) -> None:
        replace_file(self._path, json.dumps(self._content, indent=1, default=str).encode())


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """Read a run's receipt; None where there is none that can be read.

    Args:
        folder: `output_dir/dataflex`.
    """
    try:
        found = read_json((folder / RECEIPT).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """Keep the warnings that our packages log meanwhile, each text once, in their order."""
    kept: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = printable(redacted(record.getMessage()))
            if text not in kept and len(kept) < MOST_WARNINGS:
                kept.append(text)

    handler = Keep(logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("dataflex", "gradstore", "gradkernels")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield kept
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _command(arguments: Sequence[str]) -> list[str]:
    """Return the command as a user writes it, also from a worker of torchrun."""
    program = Path(arguments[0]).name
    started = ["dataflex-cli", "train"] if program == "worker.py" else [program]
    return [redacted(argument) for argument in [*started, *arguments[1:]]]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # run from a folder that is on the path
            found[name] = "not installed"
    return found


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
