"""One training run: the decisions before LlamaFactory starts, and its plan once rows are known."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dataflex.checkpoints.folders import checkpoints, resume_point, run_identity
from dataflex.checkpoints.state import RunState, described_state
from dataflex.config.keys import RunConfig
from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.data.rows import RawRows, RunData, check_rows
from dataflex.launch.announced import announce
from dataflex.pipelines.pipeline import build_strategy
from dataflex.reorders.base import Reorder
from dataflex.report import page, picture
from dataflex.run.log import RunLog
from dataflex.run.messages import explain
from dataflex.run.output_owner import own_output
from dataflex.run.ranks import Ranks
from dataflex.run.receipt import warnings_kept
from dataflex.trainers.job import Job, Run
from dataflex.trainers.seam import Seam, trainer_class
from dataflex.trainers.settings import check_agreement, rows_sha256, told
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
        args: those that LlamaFactory parses, resume decided.
    """

    def __init__(self, config: RunConfig, component: Component) -> None:
        self.config = config
        self.component = component
        self.strategy = build_strategy(component)
        module, _, name = SEAMS[config.dataflex.train_type].partition(":")
        self.seam: type[Seam] = getattr(importlib.import_module(module), name)
        self.checkpoint = resume_point(config)
        self.args = dict(config.llamafactory)
        self.args["resume_from_checkpoint"] = str(self.checkpoint) if self.checkpoint else None
        if self.checkpoint is not None:
            # The log of the run that goes on is kept, whatever is overwritten by a new one.
            self.args["overwrite_output_dir"] = False
        elif checkpoints(config.output_dir):
            # Only incomplete or unwanted checkpoints: LlamaFactory must not resume from them.
            self.args["overwrite_output_dir"] = True
        self._lock: WriterLock | None = None
        self._run: Run | None = None
        self._log: RunLog | None = None

    @property
    def arrange(self) -> Callable[[RawRows], npt.NDArray[np.int64]] | None:
        """The order raw rows are put in before they are tokenised, where the strategy has one."""
        if isinstance(self.strategy, Reorder) and self.strategy.orders_raw_rows:
            return self.strategy.order_raw_rows
        return None

    def take_data(self, data: RunData, training_args: Any, tuned: Any) -> None:  # noqa: ANN401
        """Check the rows, plan the run and own its folder, before the model is loaded.

        Args:
            data: from the bridge.
            training_args: LlamaFactory's TrainingArguments.
            tuned: its FinetuningArguments.
        """
        planned = self.plan(data, training_args, tuned, BatchShape.of(training_args))
        self._run = replace(planned, run_id=planned.ranks.decide(self._own))

    def plan(
        self,
        data: RunData,
        training_args: Any,  # noqa: ANN401 - LlamaFactory's dataclasses
        tuned: Any,  # noqa: ANN401
        shape: BatchShape,
    ) -> Run:
        """Check the rows, plan the run, which has no id yet, and compare it with its checkpoint.

        Nothing is written.

        Args:
            data: from the bridge.
            training_args: LlamaFactory's TrainingArguments.
            tuned: its FinetuningArguments.
            shape: of one optimizer step.
        """
        ours = self.config.dataflex
        check_rows(data, needs_targets=self.strategy.needs_targets,
                   subtask_sizes=ours.target_subtasks)  # fmt: skip
        job = Job(
            self.config,
            self.component,
            self.strategy,
            data,
            training_args,
            shape,
            Ranks(int(training_args.process_index), int(training_args.world_size)),
            tuned=tuned,
        )
        schedule = self.seam.plan(job)
        if not ours.static_mix and not any(i.update for i in schedule.intervals()):
            _log.warning("the run of %d steps ends before its first update", schedule.budget)
        self.strategy.check_data(data, self.config)
        run = Run(**vars(job), schedule=schedule, run_id="")
        if run.ranks.leads:
            announce(run, fresh=self.checkpoint is None)
        if self.checkpoint is not None:
            self._compare(run, described_state(self.checkpoint))
        return run

    def _compare(self, run: Run, state: RunState) -> None:
        """Refuse a resume that would not be the same run; tell changes that it may have."""
        now = self.seam.settings(run)
        # LlamaFactory fills in this one while it loads a model whose vocabulary it resizes; the
        # trainer compares all again.
        unsettled = () if now.get("additional_target") else ("additional_target",)
        check_agreement(state, run, now, rows_sha256(run.data), unsettled)
        if not run.ranks.leads:
            return
        if (note := told(state.settings, now)) is not None:
            _log.warning("%s", note)
        if state.step >= run.schedule.budget:
            _log.warning("nothing to train: the checkpoint is at step %d, the run ends at step %d",
                         state.step, run.schedule.budget)  # fmt: skip

    def _own(self) -> str:
        """Lock the output folder; return the run's id, which every rank writes into checkpoints."""
        self._lock = own_output(self.config.output_dir)
        return run_identity(self.config, self.checkpoint)

    def close(self) -> None:
        """Let another run into the output folder."""
        if self._lock is not None:
            self._lock.release()

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the run when the context ends; one that fails or is interrupted, as far as it is."""
        with warnings_kept() as warnings:
            try:
                yield
            except BaseException as error:
                failure = explain(error)
                message = f"{type(error).__name__}: {error}" if failure is None else failure.message
                stopped = isinstance(error, KeyboardInterrupt)
                self._draw("interrupted" if stopped else f"failed: {message}", warnings)
                raise
            self.show(warnings)

    def show(self, warnings: Sequence[str] = ()) -> None:
        """Draw picture and report, then print the table of updates, last of all and on stdout.

        Whatever goes wrong here is a warning: the run is complete by now.
        """
        if self._log is None:
            return
        self._draw("finished", warnings)
        _log.info("all files: %s", self._log.folder)
        with _harmless("the table of updates was not printed"):
            self._log.table()

    def _draw(self, how: str, warnings: Sequence[str]) -> None:
        """Close the receipt; draw picture and report of what was recorded since it was opened."""
        if self._log is None or not self._log.receipt.is_open:
            return
        folder = self._log.folder
        with _harmless("the receipt of the run was not written"):
            self._log.receipt.end(how, warnings)
        for what, draw in (("picture", picture.draw), ("report", page.draw)):
            with _harmless(f"the {what} of the run was not drawn"):
                if (path := draw(folder)) is not None:
                    _log.info("%s: %s", what, path)

    def trainer_for(self, base: type) -> Callable[..., Any]:
        """Make a callable that builds our trainer in the place of LlamaFactory's class `base`."""

        def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self._run is None:
                raise RuntimeError("the trainer is built before its data were loaded")
            trainer = trainer_class(self.seam, base, self._run)(*args, **kwargs)
            # Never the trainer itself: kept beyond LlamaFactory's end of the process group, its
            # DDP wrapper would be destroyed late, which can hang under gloo.
            self._log = trainer.log_files if trainer.is_world_process_zero() else None
            return trainer

        return build


@contextlib.contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Turn any failure into a warning: what the run wrote before is complete."""
    try:
        yield
    except Exception as error:  # of any kind: nothing here may change a complete run's exit code
        if isinstance(error, BrokenPipeError):
            # The reader of stdout is gone; Python would fail again when it flushes at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _log.warning("%s (%s: %s); its other files stay", what, type(error).__name__, error)
