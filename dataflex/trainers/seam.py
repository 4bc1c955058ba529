"""One mixin over public Trainer methods: the place where data changes at an exact optimizer step.

`get_batch_samples` is called once per optimizer step; it ignores the stock loader and serves the
interval that contains `state.global_step`. Samplers would not do: they run ahead of training.
Nothing here knows what decides about the rows; a subclass says that in `rows_for`.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.schedule import EventKind, Interval, Schedule
from dataflex.trainers.intervals import BatchShape, RowOrder, loader
from dataflex.trainers.state import RunState, load_state
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch

_log = logging.getLogger(__name__)


class Seam:
    """Mixed in before a transformers Trainer.

    A subclass sets `schedule`, `run_id`, `rows_sha256`, `ordered` in its constructor and provides
    `rows_for`, `component_state`, `restore_component`.
    """

    schedule: Schedule
    run_id: str
    rows_sha256: str
    #: Train on an interval's rows in the order given, never shuffled.
    ordered: bool = False

    # What the mixin takes from the Trainer below it.
    args: Any
    state: Any
    control: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    train_dataset: Any
    data_collator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self._interval: Interval | None = None
        self._rows = np.empty(0, dtype=np.int64)
        self._batches: Iterator[Any] = iter(())
        self._rate_sum, self._rate_steps = 0.0, 0

    # -- what a subclass decides ------------------------------------------------------------------

    def rows_for(self, interval: Interval, learning_rate: float) -> npt.NDArray[np.int64]:
        """(k,) rows of an interval that begins now; called on every rank."""
        raise TypeError(f"{type(self).__name__} does not implement rows_for")

    def settings(self) -> Mapping[str, Any]:
        """Whatever else a resume must agree on, as JSON values."""
        return {}

    def component_state(self) -> Mapping[str, Any]:
        """JSON values a checkpoint keeps for the component."""
        return {}

    def restore_component(self, state: Mapping[str, Any]) -> None:
        """Take back what `component_state` gave."""

    def before_training(self) -> None:
        """The last place for refusals: model and rows are there, nothing was trained."""

    # -- public Trainer methods -------------------------------------------------------------------

    @property
    def batch_shape(self) -> BatchShape:
        """How one optimizer step is cut up over ranks and micro-batches."""
        return BatchShape(
            self.args.per_device_train_batch_size * max(1, self.args.n_gpu),
            self.args.gradient_accumulation_steps,
            self.args.world_size,
        )

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """The schedule's budget is the run; an epoch is a whole number of optimizer steps.

        With the stock numbers an epoch may end inside an accumulation window, and the loop then
        counts a step short: boundaries would be skipped.
        """
        rows, batch = len(self.train_dataset), self.batch_shape.rows
        steps_per_epoch = max(1, -(-rows // batch))
        budget = self.schedule.budget
        epochs = -(-budget // steps_per_epoch)
        steps_in_epoch = steps_per_epoch * args.gradient_accumulation_steps
        return epochs, steps_per_epoch, rows, budget * batch, batch, steps_in_epoch, budget

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Restore what `state.json` keeps, then train."""
        if resume_from_checkpoint:
            self._restore(load_state(Path(str(resume_from_checkpoint))))
        self.before_training()
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401
        num_batches: int,
        device: torch.device,
    ) -> tuple[list[Any], Any]:
        """The micro-batches of the coming step, from the interval it belongs to.

        Leaves every random state as it found it: after a resume the Trainer restores the states
        behind this call, so a single draw here would make the two runs differ.
        """
        step = int(self.state.global_step)
        if step >= self.state.max_steps:
            # A run resumed at its last step would train one too many.
            self.control.should_training_stop = True
            return [], None
        with random_states_kept():
            self._enter(step)
            window = [next(self._batches) for _ in range(self.batch_shape.accumulation)]
            self._rate_sum += float(self.lr_scheduler.get_last_lr()[0])
            self._rate_steps += 1
            return super().get_batch_samples(iter(window), len(window), device)  # type: ignore[misc, no-any-return]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's state goes in before trainer_state.json, which completes it."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        is_checkpoint = output_dir is not None and Path(output_dir) != Path(self.args.output_dir)
        if is_checkpoint and _internal_call and self.args.should_save:
            self.save_state_beside(Path(str(output_dir)))

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write `dataflex/state.json` of the current step into a checkpoint folder."""
        interval = {} if self._interval is None else asdict(self._interval)
        RunState(
            step=int(self.state.global_step),
            run_id=self.run_id,
            schedule=self._schedule_key(),
            rows_sha256=self.rows_sha256,
            settings=self.settings(),
            interval=interval,
            rows=tuple(self._rows.tolist()),
            rate_sum=self._rate_sum,
            rate_steps=self._rate_steps,
            component=self.component_state(),
        ).save(checkpoint)

    # -- intervals --------------------------------------------------------------------------------

    def _enter(self, step: int) -> None:
        """Open the interval of `step` if it is not the one being served."""
        held = self._interval
        if held is None or not held.start <= step < held.stop:
            interval = self.schedule.interval(step)
            mean_rate = self._rate_sum / self._rate_steps if self._rate_steps else self._rate()
            self._rows = self.rows_for(interval, mean_rate)
            if len(self._rows) == 0:
                raise BadInput(f"the component chose no row at step {step}.")
            self._interval = interval
            if interval.kind is EventKind.UPDATE:
                self._rate_sum, self._rate_steps = 0.0, 0
            self._serve(interval, step)

    def _serve(self, interval: Interval, step: int) -> None:
        seed = None if self._in_given_order() else (int(self.args.seed), interval.start)
        workers = self.args.dataloader_num_workers
        self._batches = loader(
            self.train_dataset,
            RowOrder(self._rows, seed),
            range(step - interval.start, interval.stop - interval.start),
            self.args.process_index,
            self.batch_shape,
            self.data_collator,
            workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _in_given_order(self) -> bool:
        finetuning = getattr(self, "finetuning_args", None)
        return self.ordered or bool(getattr(finetuning, "disable_shuffling", False))

    def _rate(self) -> float:
        return float(self.lr_scheduler.get_last_lr()[0])

    def _schedule_key(self) -> tuple[int, int, int]:
        s = self.schedule
        return (s.warmup_step, s.update_step, s.update_times)

    def _restore(self, state: RunState) -> None:
        """Go on where the checkpoint was: same rows, same position, same component."""
        if state.schedule != self._schedule_key():
            raise BadInput(
                f"the checkpoint was made with (warmup_step, update_step, update_times) = "
                f"{state.schedule}, this configuration has {self._schedule_key()}. "
                "Restore the values, or start anew with overwrite_output_dir: true."
            )
        now = self.settings()
        changed = sorted(k for k in {*now, *state.settings} if now.get(k) != state.settings.get(k))
        if changed:
            raise BadInput(
                "the checkpoint was made with other settings: "
                + "; ".join(f"{k} {state.settings.get(k)!r}, now {now.get(k)!r}" for k in changed)
                + ". Restore them, or start anew with overwrite_output_dir: true."
            )
        if state.rows_sha256 != self.rows_sha256:
            raise ProvenanceMismatch(
                "the checkpoint was made on other training rows (data, template, tokenizer or "
                "cutoff_len changed). Restore them, or start anew with overwrite_output_dir: true."
            )
        self._rate_sum, self._rate_steps = state.rate_sum, state.rate_steps
        self.restore_component(state.component)
        if state.interval:
            held = {**state.interval, "kind": EventKind(state.interval["kind"])}
            self._interval = Interval(**held)
            self._rows = np.asarray(state.rows, dtype=np.int64)
            if not set(state.rows) <= set(range(len(self.train_dataset))):
                raise DamagedData("the checkpoint's state.json names rows that do not exist.")
            if state.step < self._interval.stop:
                self._serve(self._interval, state.step)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, NumPy's, torch's CPU and CUDA random states come out as they went in."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
