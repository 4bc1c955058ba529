"""Checkpoint state: the Trainer's own, and ours with its arrays in `dataflex/state.json`.

Arrays lie in `dataflex/arrays.npz`, written first: a state.json that parses has them beside it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from annotated_types import Ge, MinLen
from pydantic import ConfigDict

from dataflex.checkpoints.seal import MANIFEST, is_sealed
from dataflex.config.parameters import Count, Natural
from dataflex.run.documents import read_document
from gradstore.errors import BadInput, DamagedData
from gradstore.storage.replace import replace_file

#: Checkpoints of schema 3 are sealed; those of schema 2 were made before there was a manifest.
SCHEMA = 3
UNSEALED_SCHEMA = 2

STATE = "dataflex/state.json"
TRAINER_STATE = "trainer_state.json"
ARRAYS = "arrays.npz"

T = TypeVar("T")

_NEXT = "Resume from another checkpoint, or restore the file from a copy."

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

    step: Natural
    run_id: Annotated[str, MinLen(1)]
    schedule: tuple[Natural, Natural, Annotated[int, Ge(-1)]]
    rows_sha256: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    component: Mapping[str, Any] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def save(self, checkpoint: Path) -> None:
        """Write it into a checkpoint folder, whole or not at all."""
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        content = _without_arrays(asdict(self), "", arrays)
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **arrays)
        replace_file(checkpoint / "dataflex" / ARRAYS, buffer.getvalue())
        replace_file(checkpoint / "dataflex" / "state.json", json.dumps(content).encode())


@dataclass(frozen=True)
class LogLine:
    """The part of a line of the Trainer's log that is read here."""

    step: Natural | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class TrainerState:
    """The part of trainer_state.json that must be sound for a resume or an export."""

    global_step: Count
    max_steps: int = 0
    epoch: float | None = None
    total_flos: float = 0
    log_history: tuple[LogLine, ...] = ()
    stateful_callbacks: Mapping[str, Any] = field(default_factory=dict)


def trainer_state(checkpoint: Path) -> TrainerState:
    """Read the Trainer's own state of a checkpoint.

    Raises:
        Incomplete: it is missing.
        DamagedData: it is no JSON, or a field has an impossible value.
    """
    return _read(checkpoint, TRAINER_STATE, TrainerState)


class Incomplete(BadInput):
    """A checkpoint that lacks a file which is written last: its run was killed while saving."""


def load_state(checkpoint: Path) -> RunState:
    """Read the state of a complete checkpoint.

    Raises:
        Incomplete: a file that completes it is missing, or it was made without DataFlex.
        BadInput: it was made by another schema.
        DamagedData: state.json or its arrays are damaged, or a field has an impossible value.
    """
    state = described_state(checkpoint)
    check_step(checkpoint, state)
    try:
        with np.load(checkpoint / "dataflex" / ARRAYS, allow_pickle=False) as file:
            arrays = dict(file)
        held = {k: _with_arrays(getattr(state, k), arrays) for k in ("component", "more")}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedData(
            f"{checkpoint / 'dataflex' / ARRAYS} is missing or damaged ({error}). {_NEXT}"
        ) from error
    return replace(state, **held)


def check_step(checkpoint: Path, state: RunState) -> None:
    """Check that a checkpoint's state and the Trainer's are of one step.

    Raises:
        Incomplete: the Trainer's is missing.
        DamagedData: one is of another checkpoint, or damaged.
    """
    theirs = trainer_state(checkpoint).global_step
    if state.step != theirs:
        raise DamagedData(
            f"{checkpoint / STATE} is of step {state.step}, {TRAINER_STATE} beside it of step "
            f"{theirs}: they are not of one checkpoint. {_NEXT}"
        )


def described_state(checkpoint: Path) -> RunState:
    """Read the state of a complete checkpoint as state.json has it: arrays are only named.

    Raises:
        Incomplete, BadInput, DamagedData: as for `load_state`.
    """
    schema = _read(checkpoint, STATE, _Versioned).schema
    if schema not in (SCHEMA, UNSEALED_SCHEMA):
        raise BadInput(
            f"{checkpoint / STATE} has schema {schema}, this version reads {UNSEALED_SCHEMA} and "
            f"{SCHEMA}: resume with the version of DataFlex that wrote it, or from another "
            "checkpoint."
        )
    if schema == SCHEMA and not is_sealed(checkpoint):
        raise _incomplete(checkpoint, MANIFEST)
    return _read(checkpoint, STATE, RunState)


@dataclass(frozen=True)
class _Versioned:
    schema: int


def _read(checkpoint: Path, name: str, shape: type[T]) -> T:
    try:
        return read_document(checkpoint / name, shape, _NEXT)
    except FileNotFoundError as error:
        raise _incomplete(checkpoint, name) from error


def _incomplete(checkpoint: Path, name: str) -> Incomplete:
    return Incomplete(
        f"checkpoint {str(checkpoint)!r} is incomplete: it has no {name} (a run killed while "
        "saving leaves such a folder; a run of llamafactory-cli has no dataflex/). Name another "
        "checkpoint."
    )


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
