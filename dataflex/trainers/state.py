"""What a checkpoint keeps of a run whose data changes: `dataflex/state.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gradstore.disk.replace import replace_file
from gradstore.errors import BadInput

SCHEMA = 1
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class RunState:
    """State between two optimizer steps.

    Attributes:
        step: g, optimizer steps finished.
        run_id: the same for a run and its resumes.
        schedule: (W, U, T); a resume must agree.
        rows_sha256: ordered hash of the training rows; a resume must agree.
        settings: what else a resume must agree on (component, its parameters, rows of a step).
        interval: start, stop, kind and update of the running interval; empty before the first.
        rows: its row positions.
        rate_sum, rate_steps: learning rates summed since the last update, and how many.
        component: the component's own state.
    """

    step: int
    run_id: str
    schedule: tuple[int, int, int]
    rows_sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    interval: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[int, ...] = ()
    rate_sum: float = 0.0
    rate_steps: int = 0
    component: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint folder, whole or not at all."""
        replace_file(checkpoint / "dataflex" / "state.json", json.dumps(asdict(self)).encode())


def load_state(checkpoint: Path) -> RunState:
    """Read the state of a complete checkpoint.

    Raises:
        BadInput: the checkpoint is incomplete, was made without DataFlex, or by a newer schema.
    """
    if not is_complete(checkpoint):
        raise BadInput(
            f"checkpoint {str(checkpoint)!r} is incomplete: {TRAINER_STATE} and "
            "dataflex/state.json must both be there and readable (a run killed while saving leaves "
            "such a folder; a run of llamafactory-cli has no dataflex/). Name another checkpoint."
        )
    content = json.loads((checkpoint / "dataflex" / "state.json").read_text(encoding="utf-8"))
    if content.get("schema") != SCHEMA:
        raise BadInput(
            f"checkpoint {str(checkpoint)!r} has state schema {content.get('schema')}, "
            f"this version reads {SCHEMA}."
        )
    if unknown := set(content) ^ {f.name for f in fields(RunState)}:
        raise BadInput(
            f"checkpoint {str(checkpoint)!r}: state.json has missing or unknown fields "
            f"{', '.join(sorted(unknown))}."
        )
    content["schedule"] = tuple(content["schedule"])
    content["rows"] = tuple(content["rows"])
    return RunState(**content)


def is_complete(checkpoint: Path) -> bool:
    """Whether both state files are there and parse: the last thing written is one of them."""
    for name in (TRAINER_STATE, "dataflex/state.json"):
        try:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
    return True


def checkpoints(output_dir: Path) -> list[Path]:
    """`checkpoint-<step>` folders, oldest step first, complete or not."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def newest_complete(output_dir: Path, run_id: str | None) -> Path | None:
    """The checkpoint an automatic resume takes: of this run, where the run is known.

    A run that started anew in an old run's folder must not go on from the old one's checkpoints.
    """
    complete = [
        path
        for path in checkpoints(output_dir)
        if is_complete(path) and run_id in (None, load_state(path).run_id)
    ]
    return complete[-1] if complete else None
