"""One training run: what is decided before LlamaFactory starts, and what it is given."""

from __future__ import annotations

import importlib
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.checkpoints import check_resumable
from dataflex.config import RunConfig
from dataflex.data import RawRows, RunData, check_rows
from dataflex.events import RunLog
from dataflex.identity import known_identity
from dataflex.ownership import own_output
from dataflex.picture import draw
from dataflex.registry import Component
from dataflex.trainers.intervals import BatchShape
from dataflex.trainers.seam import Run, Seam, trainer_class
from dataflex.trainers.state import (
    checkpoints,
    is_complete,
    load_state,
    newest_complete,
    run_id_of,
)
from gradstore.errors import BadInput
from gradstore.storage.lock import WriterLock

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: train_type -> what goes before LlamaFactory's trainer.
SEAMS = {
    "dynamic_select": "dataflex.trainers.select:SelectSeam",
    "dynamic_mix": "dataflex.trainers.mix:MixSeam",
    "dynamic_weight": "dataflex.trainers.weight:WeightSeam",
    "dynamic_reorder": "dataflex.trainers.reorder:ReorderSeam",
    "dynamic_lego": "dataflex.trainers.lego:LegoSeam",
}

_log = logging.getLogger(__name__)


class TrainSession:
    """Resume, identity and checks of a run with a dynamic train_type.

    Attributes:
        args: what LlamaFactory parses, resume decided.
    """

    def __init__(self, config: RunConfig, component: Component) -> None:
        self.config = config
        self.component = component
        self.strategy = component.build()
        module, _, name = SEAMS[config.dataflex.train_type].partition(":")
        self.seam: type[Seam] = getattr(importlib.import_module(module), name)
        self.checkpoint = resume_point(config)
        self.args = dict(config.llamafactory)
        self.args["resume_from_checkpoint"] = str(self.checkpoint) if self.checkpoint else None
        if self.checkpoint is None and checkpoints(config.output_dir):
            # Only incomplete or unwanted checkpoints: LlamaFactory must not resume from them.
            self.args["overwrite_output_dir"] = True
        self._lock: WriterLock | None = None
        self._data: RunData | None = None
        self._log: RunLog | None = None

    @property
    def arrange(self) -> Callable[[RawRows], npt.NDArray[np.int64]] | None:
        """The order raw rows are put in before they are tokenised, where the strategy has one."""
        if not getattr(self.strategy, "orders_raw_rows", False):
            return None
        order: Callable[[RawRows], npt.NDArray[np.int64]] = self.strategy.order_raw_rows
        return order

    def take_data(self, data: RunData, training_args: Any) -> None:  # noqa: ANN401
        """Check the rows before the model is loaded.

        Args:
            data: from the bridge.
            training_args: LlamaFactory's TrainingArguments.
        """
        ours = self.config.dataflex
        check_rows(data, needs_targets=getattr(self.strategy, "needs_targets", False),
                   subtask_sizes=ours.target_subtasks)  # fmt: skip
        shape = BatchShape(
            training_args.per_device_train_batch_size * max(1, training_args.n_gpu),
            training_args.gradient_accumulation_steps,
            training_args.world_size,
        )
        schedule = self.seam.plan(self.strategy, self.config, data, shape.rows, training_args)
        if not ours.static_mix and not any(i.update for i in schedule.intervals()):
            _log.warning("the run of %d steps ends before its first update", schedule.budget)
        if hasattr(self.strategy, "check_data"):
            self.strategy.check_data(data, self.config)
        if training_args.process_index == 0:
            self._lock = own_output(self.config.output_dir)
        self._data = data

    def close(self) -> None:
        """Let another run into the output folder."""
        if self._lock is not None:
            self._lock.release()

    def show(self) -> None:
        """The table of updates and a picture, after everything LlamaFactory had to say."""
        if self._log is None:
            return
        self._log.table()
        if (picture := draw(self._log.folder)) is not None:
            _log.info("picture: %s", picture)

    def trainer_for(self, base: type) -> Callable[..., Any]:
        """LlamaFactory's trainer class -> a callable that builds ours in its place."""

        def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self._data is None:
                raise RuntimeError("the trainer is built before its data were loaded")
            run = Run(
                self.config,
                self._data,
                self.strategy,
                self.component.name,
                self._identity(kwargs["args"]),
                self.component.params,
            )
            trainer = trainer_class(self.seam, base, run)(*args, **kwargs)
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
        return run_id_of(checkpoint)
    known = known_identity(config.output_dir)
    if known is None or config.get("overwrite_output_dir", False):
        return uuid.uuid4().hex
    return known
