"""Words before a run's model is loaded: how long it is, what it replaces, what it will lack."""

from __future__ import annotations

import logging
import math
from pathlib import Path

from dataflex.config.keys import RunConfig
from dataflex.trainers.job import Run
from gradstore.format.layout import METADATA
from gradstore.pace import size

_log = logging.getLogger(__name__)

#: Files of an earlier store whose bytes are added up: on a network's disk more would take minutes.
_MOST_FILES = 20_000


def announce(run: Run, *, fresh: bool) -> None:
    """Say how long a run will be, and warn of what its user may not expect.

    Args:
        run: planned; nothing of it is written yet.
        fresh: whether it starts from the beginning.
    """
    ours = run.config.dataflex
    if ours.train_type != "dynamic_weight" and not ours.static_mix:
        by = "" if run.train_step else f", by num_train_epochs {float(run.args.num_train_epochs):g}"
        _log.info("this run: %s%s", run.schedule.told(), by if run.schedule.bounded else "")
    if run.strategy.needs_targets and (line := default_targets(run.config)):
        _log.info("%s", line)
    for warning in (replaced_store(run, fresh=fresh), unsaved_updates(run)):
        if warning:
            _log.warning("%s", warning)


def default_targets(config: RunConfig) -> str:
    """Say which rows are the target where target_dataset names none; "" where it does."""
    if config.dataflex.target_dataset:
        return ""
    sets = config.known.eval_dataset
    whose = (
        f"those of eval_dataset ({', '.join(sets)})" if sets else "a share of dataset (val_size)"
    )
    return (
        f"target rows: {whose}, since target_dataset is not set; a selection is fitted to them, so "
        "do not judge the model by them"
    )


def replaced_store(run: Run, *, fresh: bool) -> str:
    """Name the store of an earlier run that `overwrite_output_dir` removes; "" where none is.

    Args:
        run: planned.
        fresh: whether it starts from the beginning.
    """
    own = run.config.own_store
    if not fresh or not run.config.known.overwrite_output_dir or own is None:
        return ""
    if not (own / METADATA).exists():
        return ""
    return (
        f"overwrite_output_dir is true: the store of an earlier run, {str(own)!r} "
        f"({_told_size(own)}), is removed when this one starts. To keep it, stop now and set "
        "another output_dir; gradstore: FOLDER keeps a store apart from output_dir."
    )


def unsaved_updates(run: Run) -> str:
    """Say that no features will have a checkpoint, which prompts are asked of; "" where some do.

    Said only of checkpoints at every save_steps of a LoRA run, and of features that are stored.
    """
    strategy, args = run.strategy, run.args
    if strategy.gradient_features is None or getattr(strategy, "scoring", "projected") == "direct":
        return ""
    if run.config.known.finetuning_type != "lora" or args.save_strategy != "steps":
        return ""
    # As transformers reads it: below 1 it is a share of the steps.
    every = float(args.save_steps)
    every = math.ceil(every * run.schedule.budget) if every < 1 else int(every)
    updates = [i.start for i in run.schedule.intervals() if i.update and i.start]
    if not updates or (every > 0 and any(step % every == 0 for step in updates)):
        return ""
    shown = ", ".join(map(str, updates[:3])) + (", ..." if len(updates) > 3 else "")
    return (
        f"save_steps is {every}, and no update (at steps {shown}) falls on a save: the stored "
        "features will have no checkpoint for `gradstore explain` and for a prompt in `gradstore "
        f"serve`. Set save_steps: {math.gcd(*updates)} to ask them."
    )


def _told_size(folder: Path) -> str:
    """Spell the bytes of a folder, of which others may remove some meanwhile."""
    total = 0
    for count, path in enumerate(folder.rglob("*")):
        if count == _MOST_FILES:
            return f"more than {size(total)}"
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return size(total)
