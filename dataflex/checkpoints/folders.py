"""Checkpoint folders of a run: which there are, which one a resume or an export starts from."""

from __future__ import annotations

import json
import logging
import re
import uuid
from pathlib import Path
from typing import Any

from dataflex.checkpoints.state import is_complete, load_state, run_id_of
from dataflex.checkpoints.weights import check_resumable, check_weights
from dataflex.config.keys import RunConfig
from dataflex.run.output_owner import known_identity
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)


def find_checkpoints(config: RunConfig) -> list[Path]:
    """List the checkpoint folders that have an adapter, by step.

    Raises:
        BadInput: a named folder has none.
    """
    named = [Path(name) for name in config.dataflex.gradstore_checkpoints]
    resume = config.known.resume_from_checkpoint
    if not named and resume and resume.lower() not in ("true", "false"):
        named = [Path(resume)]
    for folder in named:
        if not (folder / "adapter_config.json").is_file():
            raise BadInput(f"checkpoint {str(folder)!r} has no adapter (adapter_config.json).")
        check_weights(folder)
        trainer_state(folder)
    found = named or [
        folder
        for folder in checkpoints(config.output_dir)
        if (folder / "adapter_config.json").is_file() and _is_usable(folder, config.output_dir)
    ]
    return sorted(found, key=lambda folder: int(trainer_state(folder)["global_step"]))


def trainer_state(folder: Path) -> dict[str, Any]:
    """Read the Trainer's own state of a checkpoint.

    Raises:
        BadInput: it is missing or damaged: the checkpoint is incomplete.
    """
    try:
        content = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return {**content, "global_step": int(content["global_step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"checkpoint {str(folder)!r} is incomplete: no readable trainer_state.json ({error})."
        ) from error


def mean_learning_rate(folder: Path, previous: int, step: int) -> float:
    """Compute the mean of the learning rates logged in (previous, step].

    Where `logging_steps` left that stretch without a line, the one logged nearest to it; 0.0 where
    nothing was logged at all.
    """
    logged = [
        (int(entry["step"]), float(entry["learning_rate"]))
        for entry in trainer_state(folder).get("log_history", [])
        if "learning_rate" in entry
    ]
    rates = [rate for at, rate in logged if previous < at <= step]
    if not rates and logged:
        rates = [min(logged, key=lambda entry: abs(entry[0] - step))[1]]
    return sum(rates) / len(rates) if rates else 0.0


def _is_usable(folder: Path, output_dir: Path) -> bool:
    """Return whether a checkpoint in output_dir is complete and of the run owning the folder."""
    try:
        trainer_state(folder)
    except BadInput:
        _log.warning("%s is incomplete and is ignored", folder)
        return False
    if is_complete(folder) and run_id_of(folder) != known_identity(output_dir):
        _log.warning("%s belongs to an earlier run and is ignored", folder)
        return False
    return True


def resume_point(config: RunConfig) -> Path | None:
    """Return the checkpoint to resume from; None for a run from the start.

    An explicit one must be complete; else the newest complete one of output_dir is taken, as
    LlamaFactory does, unless `overwrite_output_dir` is set.

    Raises:
        BadInput: the named checkpoint is incomplete, or none is there to resume from.
    """
    asked = config.known.resume_from_checkpoint
    if asked and asked.lower() == "true":
        newest = newest_complete(config.output_dir, known_identity(config.output_dir))
        if newest is None:
            raise BadInput(
                f"resume_from_checkpoint is true, but {str(config.output_dir)!r} has no complete "
                "checkpoint-<step>."
            )
        check_resumable(newest)
        return newest
    if asked and asked.lower() != "false":
        if not Path(asked).is_dir():
            raise BadInput(f"resume_from_checkpoint {asked!r} is not a folder.")
        load_state(Path(asked))
        check_resumable(Path(asked))
        return Path(asked)
    if config.known.overwrite_output_dir:
        return None
    newest = newest_complete(config.output_dir, known_identity(config.output_dir))
    for path in checkpoints(config.output_dir):
        if newest is None or int(path.name.split("-")[1]) > int(newest.name.split("-")[1]):
            why = "belongs to an earlier run" if is_complete(path) else "is incomplete"
            _log.warning("%s %s and is not resumed from", path, why)
    if newest is not None:
        check_resumable(newest)
    return newest


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


def checkpoints(output_dir: Path) -> list[Path]:
    """List the `checkpoint-<step>` folders, oldest step first, complete or not."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def newest_complete(output_dir: Path, run_id: str | None) -> Path | None:
    """Return the checkpoint an automatic resume takes: of this run, if the run is known.

    A new run in an old run's folder must not resume from the old one's checkpoints.
    """
    complete = [
        path
        for path in checkpoints(output_dir)
        if is_complete(path) and run_id in (None, run_id_of(path))
    ]
    return complete[-1] if complete else None
