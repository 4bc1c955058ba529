"""Intervals of rows, changed at exact optimizer steps.

`get_batch_samples` is called once per optimizer step; it ignores the stock loader and serves the
interval that contains `state.global_step`. Samplers would not do: they run ahead of training.
Nothing here knows what decides about the rows; a subclass says that in `rows_for`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.checkpoints.state import RunState
from dataflex.data.order import RowOrder, loader
from dataflex.data.rows import check_intervals
from dataflex.models.dropout import ModelDropout
from dataflex.run.context import UpdateContext
from dataflex.run.schedule import EventKind, Interval, Schedule, select_budget
from dataflex.trainers.chosen import ChosenRows
from dataflex.trainers.job import Job, Run
from dataflex.trainers.seam import Seam
from gradstore.capture.modelstate import random_states_kept
from gradstore.errors import BadInput, DamagedData

#: Logged steps whose gradients' norms a strategy is told.
LOGGED_NORMS = 10


def logged_norms(log: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return the gradient norms of the last lines of a Trainer's log, those that are finite."""
    norms = [float(line["grad_norm"]) for line in log if "grad_norm" in line]
    return tuple(norm for norm in norms[-LOGGED_NORMS:] if math.isfinite(norm))


class RowSeam(Seam):
    """Seam that serves intervals of rows; a subclass provides `rows_for`."""

    #: Train on an interval's rows in the order given, never shuffled.
    ordered: bool = False
    #: An interval repeats no row: one of more steps than there are rows is refused.
    within_rows: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self._interval: Interval | None = None
        self._rows = np.empty(0, dtype=np.int64)
        self._order = RowOrder(self._rows, None)
        self._batches: Iterator[Any] = iter(())
        self._rate_sum, self._rate_steps = 0.0, 0
        self._dropout = ModelDropout(int(self.args.seed))
        #: Micro-batches of the present step that were trained on.
        self._trained = 0

    @classmethod
    def plan(cls, job: Job) -> Schedule:
        """Plan W + U * T steps a stage."""
        if cls.within_rows:
            _check_rows_suffice(job)
        ours = job.config.dataflex
        budget = select_budget(
            train_step=job.train_step,
            epochs=float(job.args.num_train_epochs),
            warmup_step=ours.warmup_step,
            update_step=ours.update_step,
            update_times=ours.update_times,
            rows=len(job.data.train),
            global_batch=job.shape.rows,
        )
        return Schedule(ours.warmup_step, ours.update_step, ours.update_times, budget)

    def rows_for(self, interval: Interval) -> npt.NDArray[np.int64]:
        """Decide the rows (k,) of an interval that begins now, the same on every rank."""
        raise TypeError(f"{type(self).__name__} does not implement rows_for")

    @cached_property
    def chosen_rows(self) -> ChosenRows:
        """The writer of selections, on rank 0."""
        return ChosenRows(self.run, self.log_files)

    def update_context(self, interval: Interval) -> UpdateContext:
        """Build the view that a strategy has when `interval` begins."""
        return UpdateContext(
            run=self.context,
            step=interval.start,
            update=interval.update,
            updates=self.run.schedule.updates_per_stage,
            learning_rate=self._mean_rate(),
            optimizer=self.optimizer,
            grad_norms=logged_norms(self.state.log_history),
        )

    def served_rows(self, step: int) -> list[npt.NDArray[np.int64]]:
        """Return the row positions of this rank's micro-batches in optimizer step `step`."""
        if self._interval is None:
            raise RuntimeError("no interval is open")
        at = step - self._interval.start
        micro = self._order.micro_batches(at, self.args.process_index, self.run.shape)
        return [np.asarray(rows, dtype=np.int64) for rows in micro]

    def manifest(self, count: int, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is written beside rows that a strategy chose: by whom, from which rows."""
        return {
            "component": self.run.name,
            "params": dict(params),
            "count": count,
            "rows_sha256": self.rows_sha256,
            "run_id": self.run.run_id,
        }

    # -- public Trainer methods -------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - the Trainer's own
        """Train with dropout that depends on rows, not on processes."""
        self._dropout.install(self.model)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._dropout.remove()

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Train on a micro-batch whose rows have their places in the optimizer step."""
        shape, ranks = self.run.shape, self.run.ranks
        first = (self._trained * shape.world + ranks.rank) * shape.per_device
        self._trained += 1
        with self._dropout.placed(inputs, int(self.state.global_step), first):
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Make the schedule's budget the run, and an epoch a whole number of optimizer steps.

        With the stock numbers an epoch may end inside an accumulation window, and the loop then
        counts a step short: boundaries would be skipped.
        """
        rows, batch = len(self.train_dataset), self.run.shape.rows
        steps_per_epoch = max(1, -(-rows // batch))
        budget = self.run.schedule.budget
        epochs = -(-budget // steps_per_epoch)
        steps_in_epoch = steps_per_epoch * args.gradient_accumulation_steps
        return epochs, steps_per_epoch, rows, budget * batch, batch, steps_in_epoch, budget

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401
        num_batches: int,
        device: torch.device,
    ) -> tuple[list[Any], Any]:
        """Take the micro-batches of the coming step from the interval it belongs to.

        Leaves every random state as it found it: after a resume the Trainer restores the states
        behind this call, so a single draw here would make the two runs differ.
        """
        step = int(self.state.global_step)
        if step >= self.state.max_steps:
            # A run resumed at its last step would train one too many.
            self.control.should_training_stop = True
            return [], None
        self._trained = 0
        with random_states_kept():
            self._enter(step)
            window = [next(self._batches) for _ in range(self.run.shape.accumulation)]
            self._rate_sum += float(self.lr_scheduler.get_last_lr()[0])
            self._rate_steps += 1
            return super().get_batch_samples(iter(window), len(window), device)  # type: ignore[misc, no-any-return]

    # -- state ------------------------------------------------------------------------------------

    def more_state(self) -> Mapping[str, Any]:
        """Keep the running interval, its rows, and the learning rates since the last update."""
        return {
            **super().more_state(),
            "interval": {} if self._interval is None else asdict(self._interval),
            "rows": self._rows,
            "rate_sum": self._rate_sum,
            "rate_steps": self._rate_steps,
        }

    @classmethod
    def settings(cls, run: Run) -> Mapping[str, Any]:
        """Add the shuffling of an interval's rows, which must agree too."""
        return {**super().settings(run), "in_given_order": cls.keeps_order(run)}

    def restore_more(self, state: RunState) -> None:
        """Restore the same interval, the same rows, the same position."""
        super().restore_more(state)
        kept = state.more
        self._rate_sum, self._rate_steps = float(kept["rate_sum"]), int(kept["rate_steps"])
        if not kept["interval"]:
            return
        held = {**kept["interval"], "kind": EventKind(kept["interval"]["kind"])}
        self._interval = Interval(**held)
        self._rows = np.asarray(kept["rows"], dtype=np.int64)
        if self._rows.min() < 0 or self._rows.max() >= len(self.train_dataset):
            raise DamagedData(
                "the checkpoint's state names rows that do not exist: resume from an earlier "
                "checkpoint, or start anew with overwrite_output_dir: true."
            )
        if state.step < self._interval.stop:
            self._serve(self._interval, state.step)

    # -- intervals --------------------------------------------------------------------------------

    def _enter(self, step: int) -> None:
        """Open the interval of `step` if it is not the one being served."""
        held = self._interval
        if held is None or not held.start <= step < held.stop:
            interval = self.run.schedule.interval(step)
            self._rows = self.rows_for(interval)
            if len(self._rows) == 0:
                raise BadInput(
                    f"component {self.run.name!r} chose no row at step {step}; at least 1 is "
                    "needed: let it return positions of training rows."
                )
            self._check_agreement(step)
            self._interval = interval
            if interval.kind is EventKind.UPDATE:
                self._rate_sum, self._rate_steps = 0.0, 0
            self._serve(interval, step)

    def _mean_rate(self) -> float:
        """Average the learning rate since the last update; before any step, the present one."""
        if not self._rate_steps:
            return float(self.lr_scheduler.get_last_lr()[0])
        return self._rate_sum / self._rate_steps

    def _check_agreement(self, step: int) -> None:
        """Stop ranks that disagree: training on different rows would ruin the run silently."""
        digest = hashlib.sha256(self._rows.tobytes()).hexdigest()
        if len(set(self.run.ranks.gather(lambda: digest))) > 1:
            raise RuntimeError(f"the ranks disagree about the rows of step {step}: a bug")

    def _serve(self, interval: Interval, step: int) -> None:
        seed = None if self.keeps_order(self.run) else (int(self.args.seed), interval.start)
        self._order = RowOrder(self._rows, seed)
        self._batches = loader(
            self.train_dataset,
            self._order,
            range(step - interval.start, interval.stop - interval.start),
            self.args.process_index,
            self.run.shape,
            self.data_collator,
            workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    @classmethod
    def keeps_order(cls, job: Job) -> bool:
        """Return true where an interval's rows are trained in the order they are given."""
        return cls.ordered or bool(getattr(job.tuned, "disable_shuffling", False))


def check_rows_of(answer: object, n: int, name: str) -> npt.NDArray[np.int64]:
    """Check that a component's answer, used as it is, is positions of the training set.

    Raises:
        BadInput: it is not; names the component and what it answered.
    """
    rows = np.asarray(answer, dtype=np.int64)
    if rows.ndim != 1 or len(rows) == 0 or rows.min() < 0 or rows.max() >= n:
        raise BadInput(
            f"component {name!r} answered {rows.shape} rows"
            + (f" between {rows.min()} and {rows.max()}" if rows.size else "")
            + f"; expected a list of positions between 0 and {n - 1}."
        )
    return rows


def _check_rows_suffice(job: Job) -> None:
    """Refuse intervals that need more rows than there are, or than the strategy can choose.

    Raises:
        BadInput: names both numbers.
    """
    ours, rows = job.config.dataflex, job.shape.rows
    check_intervals(len(job.data.train), ours.warmup_step, ours.update_step, rows)
    job.strategy.check_count(ours.update_step * rows, job.data)
