"""One training run: what is decided before LlamaFactory starts, and what it is given."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataflex.checkpoints import check_resumable
from dataflex.config import RunConfig
from dataflex.data import RunData, check_intervals, check_rows
from dataflex.events import RunLog
from dataflex.identity import known_identity
from dataflex.registry import Component
from dataflex.trainers.intervals import BatchShape
from dataflex.trainers.select import SelectRun, select_schedule, select_trainer
from dataflex.trainers.state import checkpoints, is_complete, load_state, newest_complete
from gradstore.errors import BadInput
from gradstore.selection import check_k

_log = logging.getLogger(__name__)


class TrainSession:
    """Resume, identity and checks of a run with a dynamic train_type.

    Attributes:
        args: what LlamaFactory parses, resume decided.
    """

    def __init__(self, config: RunConfig, component: Component) -> None:
        self.config = config
        self.component = component
        self.checkpoint = resume_point(config)
        self.args = dict(config.llamafactory)
        self.args["resume_from_checkpoint"] = str(self.checkpoint) if self.checkpoint else None
        if self.checkpoint is None and checkpoints(config.output_dir):
            # Only incomplete or unwanted checkpoints: LlamaFactory must not resume from them.
            self.args["overwrite_output_dir"] = True
        self._data: RunData | None = None
        self._log: RunLog | None = None

    def take_data(self, data: RunData, training_args: Any) -> None:  # noqa: ANN401
        """Check the rows before the model is loaded.

        Args:
            data: from the bridge.
            training_args: LlamaFactory's TrainingArguments.
        """
        ours, cls = self.config.dataflex, self.component.cls
        check_rows(data, needs_targets=getattr(cls, "needs_targets", False),
                   subtask_sizes=ours.target_subtasks)  # fmt: skip
        shape = BatchShape(
            training_args.per_device_train_batch_size * max(1, training_args.n_gpu),
            training_args.gradient_accumulation_steps,
            training_args.world_size,
        )
        check_intervals(len(data.train), ours.warmup_step, ours.update_step, shape.rows)
        if getattr(cls, "needs_lora", False):
            usable = int((data.train.target_tokens > 0).sum())
            check_k(ours.update_step * shape.rows, usable, len(data.train))
        schedule = select_schedule(self.config, len(data.train), shape.rows, training_args)
        if not any(i.update for i in schedule.intervals()):
            _log.warning("the run of %d steps ends before its first update", schedule.budget)
        self._data = data

    def show(self) -> None:
        """The table of selections, after everything LlamaFactory had to say."""
        if self._log is not None:
            self._log.table()

    def trainer_for(self, base: type) -> Callable[..., Any]:
        """LlamaFactory's trainer class -> a callable that builds ours in its place."""

        def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self._data is None:
                raise RuntimeError("the trainer is built before its data were loaded")
            run = SelectRun(
                self.config,
                self._data,
                self.component.build(),
                self.component.name,
                self._identity(kwargs["args"]),
            )
            trainer = select_trainer(base, run)(*args, **kwargs)
            # Never the trainer itself: kept beyond LlamaFactory's end of the process group, its
            # DDP wrapper would be destroyed late, which can hang under gloo.
            self._log = trainer.log_files if trainer.is_world_process_zero() else None
            return trainer

        return build

    def _identity(self, training_args: Any) -> str:  # noqa: ANN401 - TrainingArguments
        """Decided on rank 0: every rank must write the same id into a checkpoint."""
        held = [""]
        if training_args.process_index == 0:
            held = [run_identity(self.config, self.checkpoint)]
        if training_args.world_size > 1:
            import torch.distributed as dist

            dist.broadcast_object_list(held, src=0)
        return held[0]


def resume_point(config: RunConfig) -> Path | None:
    """The checkpoint to go on from; None for a run from the start.

    An explicit one must be complete; else the newest complete one of output_dir is taken, as
    LlamaFactory does, unless `overwrite_output_dir` says to start anew.

    Raises:
        BadInput: the named checkpoint is incomplete, or none is there to resume from.
    """
    asked = config.llamafactory.get("resume_from_checkpoint")
    if asked is True or str(asked).lower() == "true":
        newest = newest_complete(config.output_dir, known_identity(config.output_dir))
        if newest is None:
            raise BadInput(
                f"resume_from_checkpoint is true, but {str(config.output_dir)!r} has no complete "
                "checkpoint-<step>."
            )
        check_resumable(newest)
        return newest
    if asked and str(asked).lower() != "false":
        if not Path(str(asked)).is_dir():
            raise BadInput(f"resume_from_checkpoint {str(asked)!r} is not a folder.")
        load_state(Path(str(asked)))
        check_resumable(Path(str(asked)))
        return Path(str(asked))
    if config.get("overwrite_output_dir", False):
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
    """Id of this run: the checkpoint's, or output_dir's, or a new one.

    Not remembered here: a start that is refused later must not disown earlier checkpoints.
    """
    if checkpoint is not None:
        return load_state(checkpoint).run_id
    known = known_identity(config.output_dir)
    if known is None or config.get("overwrite_output_dir", False):
        return uuid.uuid4().hex
    return known
