"""Checkpoint folders of a run: which there are, which one a resume or an export starts from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import uuid
from pathlib import Path

from dataflex.checkpoints.seal import verify
from dataflex.checkpoints.state import (
    STATE,
    TRAINER_STATE,
    Incomplete,
    check_step,
    described_state,
    load_state,
    trainer_state,
)
from dataflex.checkpoints.weights import ADAPTER_CONFIG, check_resumable, check_weights
from dataflex.config.keys import RunConfig
from dataflex.run.output_owner import known_identity
from gradstore.errors import BadInput, StoreError

_log = logging.getLogger(__name__)


#: Patterns of the files that an export reads beside the optimizer's, which only some do.
EXPORTED = ("adapter_*", "model*.safetensors*", TRAINER_STATE, "dataflex/*")


def find_checkpoints(config: RunConfig) -> list[Path]:
    """List the checkpoint folders that have what the run trains, by step: an adapter or a model.

    Raises:
        BadInput: a named folder has not, or is incomplete.
        DamagedData: a file of a named folder that an export reads is damaged.
    """
    named = [Path(name) for name in config.dataflex.gradstore_checkpoints]
    resume = config.known.resume_from_checkpoint
    if not named and resume and resume.lower() not in ("true", "false"):
        named = [Path(resume)]
    kind = config.known.finetuning_type
    for folder in named:
        _check_exportable(folder, kind)
    found = named or [
        folder
        for folder in checkpoints(config.output_dir)
        if not _unlike(folder, kind) and _is_usable(folder, config.output_dir, kind)
    ]
    return sorted(found, key=lambda folder: trainer_state(folder).global_step)


def _unlike(folder: Path, kind: str) -> str:
    """Say what a checkpoint has not, or has, unlike one of this finetuning_type; "" if neither."""
    has_adapter = (folder / ADAPTER_CONFIG).is_file()
    if kind == "lora" and not has_adapter:
        return (
            f"has no adapter ({ADAPTER_CONFIG}): name one of a run with finetuning_type lora, or "
            "set finetuning_type as it was."
        )
    if kind != "lora" and has_adapter:
        return f"has an adapter ({ADAPTER_CONFIG}): name one of a run with finetuning_type {kind}."
    return ""


def _check_exportable(folder: Path, kind: str) -> None:
    verify(folder, EXPORTED)
    if why := _unlike(folder, kind):
        raise BadInput(f"checkpoint {str(folder)!r} {why}")
    check_weights(folder)
    trainer_state(folder)
    if (folder / STATE).exists():
        check_step(folder, described_state(folder))


def _is_usable(folder: Path, output_dir: Path, kind: str) -> bool:
    """Return whether a checkpoint in output_dir is sound and of the run owning the folder."""
    try:
        _check_exportable(folder, kind)
    except StoreError as error:
        _log.warning("%s is ignored: %s", folder, error)
        return False
    if (folder / STATE).exists() and run_id_of(folder) != known_identity(output_dir):
        _log.warning("%s belongs to an earlier run and is ignored", folder)
        return False
    return True


def mean_learning_rate(folder: Path, previous: int, step: int) -> float:
    """Compute the mean of the learning rates logged in (previous, step].

    Where `logging_steps` left that stretch without a line, the one logged nearest to it; 0.0 where
    nothing was logged at all.
    """
    logged = [
        (line.step, line.learning_rate)
        for line in trainer_state(folder).log_history
        if line.step is not None and line.learning_rate is not None
    ]
    rates = [rate for at, rate in logged if previous < at <= step]
    if not rates and logged:
        rates = [min(logged, key=lambda entry: abs(entry[0] - step))[1]]
    return sum(rates) / len(rates) if rates else 0.0


def resume_point(config: RunConfig) -> Path | None:
    """Return the checkpoint to resume from; None for a run from the start.

    A named one must be sound; else the newest sound one of output_dir is taken, unless
    `overwrite_output_dir` is set. Newer ones that are passed over are told in one line; where all
    are, the newest one's fault is told, and how many others there are.

    Raises:
        BadInput: the named checkpoint is incomplete, or none is there to resume from.
        DamagedData: a file of the named checkpoint is damaged, or of all there are.
    """
    asked = config.known.resume_from_checkpoint or "false"
    if asked.lower() not in ("true", "false"):
        if not Path(asked).is_dir():
            raise BadInput(
                f"resume_from_checkpoint {asked!r} is not a folder: name a checkpoint-<step>, or "
                "set it to true for the newest one of output_dir."
            )
        check_sound(Path(asked))
        return Path(asked)
    wanted = asked.lower() == "true"
    if config.known.overwrite_output_dir and not wanted:
        return None
    found, passed, fault = newest_sound(config.output_dir, known_identity(config.output_dir))
    if found is None and fault is not None:
        others = len(passed) - 1
        raise type(fault)(
            f"{fault} {others} more in {str(config.output_dir)!r} cannot be resumed from either."
            if others
            else str(fault)
        ) from fault
    if passed and os.environ.get("RANK", "0") == "0":  # before there are ranks to ask
        start = f"resuming from {found}" if found else "no checkpoint to resume from"
        _log.warning("%s: %s", start, "; ".join(passed))
    if found is None and wanted:
        raise BadInput(
            f"resume_from_checkpoint is true, but {str(config.output_dir)!r} has no complete "
            "checkpoint-<step>: name one, or remove the key to start from the beginning."
        )
    return found


def check_sound(checkpoint: Path) -> None:
    """Check every file of a checkpoint that a resume reads.

    Raises:
        Incomplete: a file that completes it is missing.
        BadInput: something else is missing, or would run code.
        DamagedData: a file is not as it was saved, or holds impossible values.
    """
    verify(checkpoint)
    load_state(checkpoint)
    check_resumable(checkpoint)


def newest_sound(
    output_dir: Path, run_id: str | None
) -> tuple[Path | None, list[str], StoreError | None]:
    """Return the newest sound checkpoint of a run, and why newer ones are not it.

    A new run in an old run's folder must not resume from the old one's checkpoints.

    Args:
        output_dir: the folder of the checkpoints.
        run_id: the run; None takes any.

    Returns:
        The checkpoint, if any; a clause for each newer one; the first of their errors that says
        more than that a run was killed while saving.
    """
    passed: list[str] = []
    fault: StoreError | None = None
    for path in reversed(checkpoints(output_dir)):
        try:
            verify(path, [STATE])
            if run_id not in (None, run_id_of(path)):
                passed.append(f"{path} belongs to an earlier run and is not resumed from")
                continue
            check_sound(path)
        except Incomplete:
            passed.append(f"{path} is incomplete and is not resumed from")
        except StoreError as error:
            passed.append(f"{path} is passed over ({error})")
            fault = fault or error
        else:
            return path, passed, None
    return None, passed, fault


def run_identity(config: RunConfig, checkpoint: Path | None) -> str:
    """Return the id of this run: the checkpoint's, or output_dir's, or a new one.

    Not remembered here: a start that is refused later must not disown earlier checkpoints.
    """
    if checkpoint is not None:
        return run_id_of(checkpoint)
    known = known_identity(config.output_dir)
    if known is None or config.known.overwrite_output_dir:
        return uuid.uuid4().hex
    return known


def run_id_of(checkpoint: Path) -> str:
    """Return the id of the run that wrote a complete checkpoint."""
    return described_state(checkpoint).run_id


def of_run(found: list[Path], run_id: str) -> set[Path]:
    """Return those of some checkpoints that a run has written whole."""
    own = set()
    for path in found:
        with contextlib.suppress(StoreError):
            if run_id_of(path) == run_id:
                own.add(path)
    return own


def checkpoints(output_dir: Path) -> list[Path]:
    """List the `checkpoint-<step>` folders, oldest step first, complete or not."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]
