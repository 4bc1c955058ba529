"""Checkpoint state of a run whose data changes: `dataflex/state.json` and its arrays.

Arrays lie in `dataflex/arrays.npz`, written first: a state.json that parses has them beside it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from gradstore.errors import BadInput, DamagedData
from gradstore.storage.replace import replace_file

SCHEMA = 2
TRAINER_STATE = "trainer_state.json"
ARRAYS = "arrays.npz"

#: Key under which state.json names an array of arrays.npz.
_ARRAY = "__array__"


@dataclass(frozen=True)
class RunState:
    """State between two optimizer steps.

    Attributes:
        step: g, optimizer steps finished.
        run_id: the same for a run and its resumes.
        schedule: (W, U, T); a resume must agree.
        rows_sha256: ordered hash of the training rows; a resume must agree.
        settings: what else a resume must agree on (component, its parameters, rows of a step).
        component: the component's own state.
        more: what the kind of trainer keeps, such as the running interval and its rows.

    `component` and `more` hold JSON values and NumPy arrays.
    """

    step: int
    run_id: str
    schedule: tuple[int, int, int]
    rows_sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    component: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint folder, whole or not at all."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        content = _without_arrays(asdict(self), "", arrays)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        replace_file(checkpoint / "dataflex" / ARRAYS, buffer.getvalue())
        replace_file(checkpoint / "dataflex" / "state.json", json.dumps(content).encode())


def load_state(checkpoint: Path) -> RunState:
    """Read the state of a complete checkpoint.

    Raises:
        BadInput: the checkpoint is incomplete, was made without DataFlex, or by another schema.
        DamagedData: its arrays are missing or damaged.
    """
    content = _content(checkpoint)
    try:
        with np.load(checkpoint / "dataflex" / ARRAYS, allow_pickle=False) as file:
            arrays = dict(file)
        content = _with_arrays(content, arrays)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedData(
            f"checkpoint {str(checkpoint)!r}: dataflex/{ARRAYS} is missing or damaged ({error}). "
            "Resume from another checkpoint."
        ) from error
    content["schedule"] = tuple(content["schedule"])
    return RunState(**content)


def run_id_of(checkpoint: Path) -> str:
    """Return the id of the run that wrote a complete checkpoint."""
    return str(_content(checkpoint)["run_id"])


def _content(checkpoint: Path) -> dict[str, Any]:
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
    return dict(content)


def _without_arrays(value: Any, name: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:  # noqa: ANN401
    """Return `value` with each array moved to `arrays` under its path, and named there."""
    if isinstance(value, np.ndarray):
        arrays[name] = value
        return {_ARRAY: name}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(k): _without_arrays(v, f"{name}.{k}", arrays) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_arrays(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
    return value


def _with_arrays(value: Any, arrays: Mapping[str, np.ndarray[Any, Any]]) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        if set(value) == {_ARRAY}:
            return arrays[value[_ARRAY]]
        return {k: _with_arrays(v, arrays) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_arrays(v, arrays) for v in value]
    return value


def is_complete(checkpoint: Path) -> bool:
    """Return whether both state files exist and parse: one of them is the last file written."""
    for name, step in ((TRAINER_STATE, "global_step"), ("dataflex/state.json", "step")):
        try:
            int(json.loads((checkpoint / name).read_text(encoding="utf-8"))[step])
        except (OSError, ValueError, KeyError, TypeError):
            return False
    return True
