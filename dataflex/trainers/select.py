"""Training on rows a selector chooses, anew at every update."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.config import RunConfig
from dataflex.data import RunData
from dataflex.events import RunLog, SelectionEvent
from dataflex.failures import Failure, ToldFailure
from dataflex.identity import remember_identity
from dataflex.registry import RETIRED
from dataflex.schedule import EventKind, Interval, Schedule, select_budget
from dataflex.selectors.base import RunContext, SelectContext, Selection, Selector
from dataflex.trainers.seam import Seam
from gradstore.discard import discard_store
from gradstore.errors import BadInput, StoreError

_log = logging.getLogger(__name__)


#: component_params that change no answer: a resume may set them anew.
NEUTRAL = frozenset(
    {"tokens_per_batch", "max_bad_fraction", "keep_generations", "score_batch_size",
     *RETIRED}
)  # fmt: skip


@dataclass(frozen=True)
class SelectRun:
    """What a run hands to its trainer."""

    config: RunConfig
    data: RunData
    selector: Selector
    selector_name: str
    run_id: str


class SelectSeam(Seam):
    """Warm-up draws, then the selector's answer at every update."""

    #: Set on the class made for one run (`select_trainer`).
    run: SelectRun
    finetuning_args: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        ours = self.run.config.dataflex
        self.schedule = select_schedule(self.run.config, len(self.run.data.train),
                                        self.batch_shape.rows, self.args)  # fmt: skip
        self.run_id = self.run.run_id
        self.rows_sha256 = hashlib.sha256(self.run.data.train.row_set.hashes.tobytes()).hexdigest()
        self.log_files = RunLog(Path(self.args.output_dir))
        _set_early_stopping(self, ours.early_stopping_min_delta)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Start the selector, train, and let it go."""
        self._fresh = not resume_from_checkpoint
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.run.selector.finish()

    def before_training(self) -> None:
        """Open what the selector needs, on the rank that decides."""
        if self.args.process_index == 0:
            config = self.run.config
            anew = self._fresh and bool(config.get("overwrite_output_dir", False))
            if anew and config.owns_store:
                discard_store(config.store_path)
            self.run.selector.start(self._context())
            remember_identity(config.output_dir, self.run_id)
            # After the selector's refusals: they leave an earlier run's records as they were.
            if anew:
                self.log_files.clear()

    def rows_for(self, interval: Interval, learning_rate: float) -> npt.NDArray[np.int64]:
        """A warm-up draw, or the selector's choice, decided on rank 0 and the same everywhere."""
        began = time.perf_counter()
        count = interval.steps * self.batch_shape.rows
        if interval.kind is EventKind.WARMUP:
            return self._warmup_rows(count, interval.stage)
        return self._decide(lambda: self._select(count, interval, learning_rate, began))

    def settings(self) -> Mapping[str, Any]:
        """The component, what of its parameters changes an answer, and the rows of a step."""
        params = self.run.config.dataflex.component_params
        return {
            "component_name": self.run.selector_name,
            "component_params": {k: v for k, v in params.items() if k not in NEUTRAL},
            "rows_per_step": self.batch_shape.rows,
        }

    def component_state(self) -> Mapping[str, Any]:
        """The selector's."""
        return self.run.selector.state()

    def restore_component(self, state: Mapping[str, Any]) -> None:
        """The selector's."""
        self.run.selector.restore(state)

    def save_state_beside(self, checkpoint: Path) -> None:
        """Adam moments by name go beside the state: `gradstore build` needs no optimizer.pt."""
        if self.run.selector.needs_lora and keeps_moments(self.optimizer):
            from gradstore.moments import AdamMoments

            moments = AdamMoments.from_optimizer(self.optimizer, self.model)
            moments.save(checkpoint / "dataflex" / "moments.safetensors")
        super().save_state_beside(checkpoint)

    def _warmup_rows(self, count: int, stage: int) -> npt.NDArray[np.int64]:
        """Rows with a target, uniform without replacement, another draw in every stage."""
        usable = np.flatnonzero(self.run.data.train.target_tokens > 0)
        generator = np.random.default_rng([int(self.args.seed), stage])
        return generator.permutation(usable)[:count]

    def _select(
        self, count: int, interval: Interval, learning_rate: float, began: float
    ) -> npt.NDArray[np.int64]:
        context = SelectContext(
            run=self._context(),
            step=interval.start,
            update=interval.update,
            updates=self.schedule.updates_per_stage,
            learning_rate=learning_rate,
            optimizer=self.optimizer,
        )
        selection = self.run.selector.select(count, context)
        if not isinstance(selection, Selection):
            raise BadInput(
                f"component {self.run.selector_name!r} answered a {type(selection).__name__}; "
                "expected a dataflex.selectors.base.Selection."
            )
        rows = np.asarray(selection.indices, dtype=np.int64)
        _check_answer(rows, len(self.run.data.train), self.run.selector_name)
        self._record(interval.start, rows, selection, time.perf_counter() - began)
        return rows

    def _record(
        self, step: int, rows: npt.NDArray[np.int64], selection: Selection, pause: float
    ) -> None:
        train = self.run.data.train
        sources = train.sources
        names = [sources[i][0] if sources else train.name for i in rows.tolist()]
        manifest = {
            "component": self.run.selector_name,
            "params": dict(self.run.config.dataflex.component_params),
            "count": len(rows),
            "rows_sha256": self.rows_sha256,
            "run_id": self.run_id,
            **selection.manifest,
        }
        self.log_files.selection(step, rows, selection.scores, manifest)
        self.log_files.event(
            SelectionEvent(
                step=step,
                component=self.run.selector_name,
                train_rows=len(train),
                target_rows=selection.target_rows,
                tokens=selection.tokens,
                export_seconds=selection.export_seconds,
                score_seconds=selection.score_seconds,
                select_seconds=selection.select_seconds,
                pause_seconds=pause,
                skipped=dict(selection.skipped),
                chosen=dict(Counter(names).most_common(8)),
            )
        )
        _log.info("step %d: %s chose %d of %d rows in %.1f s",
                  step, self.run.selector_name, len(rows), len(train), pause)  # fmt: skip

    def _decide(self, choose: Any) -> npt.NDArray[np.int64]:  # noqa: ANN401 - a zero-argument call
        """Run `choose` on rank 0; give every rank its answer, or its failure."""
        if self.args.world_size == 1:
            return np.asarray(choose(), dtype=np.int64)
        import torch.distributed as dist

        answer: list[Any] = [None]
        told: StoreError | None = None
        if self.args.process_index == 0:
            try:
                answer = [choose().tolist()]
            except StoreError as error:
                told, answer = error, [Failure(error.exit_code, str(error))]
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], Failure):
            raise told or ToldFailure(answer[0])
        return np.asarray(answer[0], dtype=np.int64)

    def _context(self) -> RunContext:
        return RunContext(
            config=self.run.config,
            data=self.run.data,
            collate=self.data_collator,
            model=self.model,
            output_dir=Path(self.args.output_dir),
            run_id=self.run_id,
            seed=int(self.args.seed),
            autocast=str(self.accelerator.mixed_precision or "no").replace("no", "off"),
            shows_progress=self.args.process_index == 0 and not self.args.disable_tqdm,
        )


def select_trainer(base: type, run: SelectRun) -> type:
    """LlamaFactory's trainer class with the data decided by `run.selector`."""
    return type(f"Select{base.__name__}", (SelectSeam, base), {"run": run})


def select_schedule(config: RunConfig, rows: int, global_batch: int, args: Any) -> Schedule:  # noqa: ANN401
    """The schedule of a select run; `max_steps`, where set, stands in for `train_step`."""
    ours = config.dataflex
    budget = select_budget(
        train_step=ours.train_step or max(0, int(args.max_steps)),
        epochs=float(args.num_train_epochs),
        warmup_step=ours.warmup_step,
        update_step=ours.update_step,
        update_times=ours.update_times,
        rows=rows,
        global_batch=global_batch,
    )
    return Schedule(ours.warmup_step, ours.update_step, ours.update_times, budget)


def keeps_moments(optimizer: Any) -> bool:  # noqa: ANN401 - an optimizer or accelerate's wrapper
    """Whether an optimizer is of the Adam family; true also before its first step."""
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [state for state in inner.state.values() if state]
    if states:
        return all("exp_avg" in state and "exp_avg_sq" in state for state in states)
    return "adam" in type(inner).__name__.lower()


def _check_answer(rows: npt.NDArray[np.int64], n: int, name: str) -> None:
    """A component's answer is used as it is: it must be positions of the training set."""
    if rows.ndim != 1 or len(rows) == 0 or rows.min() < 0 or rows.max() >= n:
        raise BadInput(
            f"component {name!r} answered {rows.shape} rows"
            + (f" between {rows.min()} and {rows.max()}" if rows.size else "")
            + f"; expected a list of positions between 0 and {n - 1}."
        )


def _set_early_stopping(trainer: Any, min_delta: float) -> None:  # noqa: ANN401 - a Trainer
    """Give the callback that LlamaFactory adds for `early_stopping_steps` its threshold."""
    from transformers import EarlyStoppingCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_threshold = min_delta
