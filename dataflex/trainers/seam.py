"""What every trainer of ours has in common: life cycle, checkpointed state, what a user is told.

A mixin over public Trainer methods; it changes nothing about data or loss. `served.py` adds the
data of exact steps, `losses.py` the weights of samples; a trainer of one kind is thin over them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dataflex.checkpoints.state import RunState, load_state
from dataflex.config.keys import RunConfig
from dataflex.config.presets import RETIRED
from dataflex.config.registry import target_of
from dataflex.data.order import BatchShape
from dataflex.data.rows import RunData
from dataflex.models.experts import freeze_routers, load_experts
from dataflex.models.passes import row_losses
from dataflex.run.board import Scoreboard
from dataflex.run.context import RunContext
from dataflex.run.log import RunLog, as_json
from dataflex.run.output_owner import remember_identity
from dataflex.run.ranks import Ranks
from dataflex.run.schedule import Schedule
from dataflex.run.strategy import FSDP, ZERO3
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.store.cleaning import discard_store

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """What a session hands to its trainer.

    Attributes:
        config: the checked configuration.
        data: the rows.
        strategy: the component, built.
        name: its preset's name, for messages.
        run_id: the same for a run and its resumes.
        params: the preset's parameters with `component_params` over them.
    """

    config: RunConfig
    data: RunData
    strategy: Any
    name: str
    run_id: str
    params: Mapping[str, Any]


#: Keys that say which parameters are trained, and thus what a checkpoint holds.
FINETUNING = ("finetuning_type", "lora_rank", "lora_alpha", "lora_target", "additional_target",
              "use_dora", "use_rslora")  # fmt: skip


class Seam:
    """Mixed in before a transformers Trainer; `trainer_class` sets `run`."""

    run: Run

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
    finetuning_args: Any
    callback_handler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self.ranks = Ranks(int(self.args.process_index), int(self.args.world_size))
        self.schedule = self.plan(
            self.run.strategy, self.run.config, self.run.data, self.batch_shape.rows, self.args
        )
        self.rows_sha256 = hashlib.sha256(self.run.data.train.row_set.hashes.tobytes()).hexdigest()
        self.log_files = RunLog(Path(self.args.output_dir))
        self._numbers: dict[str, float] = {}
        _set_early_stopping(self, self.run.config.dataflex.early_stopping_min_delta)
        if self.run.config.dataflex.freeze_gate:
            freeze_routers(self.model)

    # -- what a kind of trainer decides -----------------------------------------------------------

    @classmethod
    def plan(
        cls,
        strategy: Any,  # noqa: ANN401 - of any kind
        config: RunConfig,
        data: RunData,
        global_batch: int,
        args: Any,  # noqa: ANN401
    ) -> Schedule:
        """The schedule of a run; refusals come before the model is loaded.

        Args:
            strategy: the component, built but not started.
            config: the checked configuration.
            data: rows, as processed.
            global_batch: B, rows of one optimizer step over all ranks.
            args: LlamaFactory's TrainingArguments.

        Raises:
            BadInput: the rows do not suffice for an interval, or W, U, T make no schedule.
        """
        raise TypeError(f"{cls.__name__} does not implement plan")

    def more_state(self) -> Mapping[str, Any]:
        """What a checkpoint keeps beside the strategy's state: JSON values and arrays."""
        return {}

    def restore_more(self, state: RunState) -> None:
        """Take back what this kind of trainer put into a checkpoint."""

    # -- public Trainer methods -------------------------------------------------------------------

    @property
    def batch_shape(self) -> BatchShape:
        """How one optimizer step is cut up over ranks and micro-batches."""
        return BatchShape(
            self.args.per_device_train_batch_size * max(1, self.args.n_gpu),
            self.args.gradient_accumulation_steps,
            self.args.world_size,
        )

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Restore what `state.json` keeps, start the strategy, train, and let it go."""
        try:
            if resume_from_checkpoint:
                self._restore(load_state(Path(str(resume_from_checkpoint))))
            self._begin(anew=not resume_from_checkpoint)
            if resume_from_checkpoint:
                load_experts(self.model, Path(str(resume_from_checkpoint)))
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.run.strategy.finish()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """The Trainer's own log lines carry what the strategy told since the last one."""
        told, self._numbers = self._numbers, {}
        super().log({**logs, **told}, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A checkpoint's state goes in before trainer_state.json, which completes it."""
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        is_checkpoint = output_dir is not None and Path(output_dir) != Path(self.args.output_dir)
        if is_checkpoint and _internal_call and self.args.should_save:
            self.save_state_beside(Path(str(output_dir)))

    def save_state_beside(self, checkpoint: Path) -> None:
        """Write `dataflex/state.json` of the current step into a checkpoint folder.

        Adam moments by name go beside it: `gradstore build` then needs no optimizer.pt.
        """
        if self.run.strategy.needs_lora and keeps_moments(self.optimizer):
            from gradstore.export.moments import AdamMoments

            moments = AdamMoments.from_optimizer(self.optimizer, self.model)
            moments.save(checkpoint / "dataflex" / "moments.safetensors")
        self.present_state().save(checkpoint)

    def present_state(self) -> RunState:
        """The state between two optimizer steps."""
        s = self.schedule
        return RunState(
            step=int(self.state.global_step),
            run_id=self.run.run_id,
            schedule=(s.warmup_step, s.update_step, s.update_times),
            rows_sha256=self.rows_sha256,
            settings=self.settings(),
            component=self.run.strategy.state(),
            more=self.more_state(),
        )

    def settings(self) -> Mapping[str, Any]:
        """What a resume must agree on: what is decided with, and what saved weights have to fit."""
        neutral = {*RETIRED, *getattr(self.run.strategy, "neutral", ())}
        tuned = getattr(self, "finetuning_args", None)
        return {
            "component_name": self.run.name,
            "class": target_of(type(self.run.strategy)),
            "component_params": {k: v for k, v in self.run.params.items() if k not in neutral},
            "rows_per_step": self.batch_shape.rows,
            "seed": int(self.args.seed),
            "targets": {t.name: t.row_set.sha256 for t in self.run.data.targets},
            "optim": str(self.args.optim),
            **{key: getattr(tuned, key) for key in FINETUNING if hasattr(tuned, key)},
        }

    # -- telling ----------------------------------------------------------------------------------

    def tell(self, numbers: Mapping[str, float]) -> None:
        """Hand numbers to the Trainer's next log line, as `dataflex/<name>`."""
        self._numbers |= {f"dataflex/{k}": v for k, v in as_json(numbers).items()}

    # -- life cycle -------------------------------------------------------------------------------

    @cached_property
    def context(self) -> RunContext:
        """What strategies may look at."""
        return RunContext(
            config=self.run.config,
            data=self.run.data,
            collate=self.data_collator,
            model=self.model,
            output_dir=Path(self.args.output_dir),
            run_id=self.run.run_id,
            seed=int(self.args.seed),
            autocast=str(self.accelerator.mixed_precision or "no").replace("no", "off"),
            shows_progress=self.ranks.leads and not self.args.disable_tqdm,
            ranks=self.ranks,
            board=Scoreboard(self.run.data.train, self._measured),
        )

    def _measured(
        self, positions: npt.NDArray[np.int64], *, max_rows: int
    ) -> npt.NDArray[np.float64]:
        """(n,) losses of training rows under the present model; what the scoreboard asks."""
        return row_losses(self.context, positions, max_rows=max_rows)

    def _begin(self, *, anew: bool) -> None:
        """The last place for refusals: model and rows are there, nothing was trained."""
        config = self.run.config
        if spread := self._spread() & getattr(self.run.strategy, "whole_model", frozenset()):
            raise BadInput(
                f"component {self.run.name!r} makes passes of its own over the model in training, "
                f"which cannot be made under {' and '.join(sorted(spread))}: use DDP."
            )
        anew = anew and config.known.overwrite_output_dir

        def discard() -> None:
            if anew and config.owns_store:
                discard_store(config.store_path)

        def own() -> None:
            remember_identity(config.output_dir, self.run.run_id)
            # After the strategy's refusals: they leave an earlier run's records as they were.
            if anew:
                self.log_files.clear()

        self.ranks.decide(discard)
        with random_states_kept():
            self.ranks.gather(lambda: self.run.strategy.start(self.context))
        self.ranks.decide(own)

    def _spread(self) -> set[str]:
        """How the model lies on the devices, where not whole on each."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        found = {FSDP} if getattr(self, "is_fsdp_enabled", False) else set()
        return found | ({ZERO3} if plugin is not None and plugin.zero_stage == 3 else set())

    def _restore(self, state: RunState) -> None:
        """Go on where the checkpoint was: same rows, same position, same component."""
        s = self.schedule
        if state.schedule != (now := (s.warmup_step, s.update_step, s.update_times)):
            raise BadInput(
                f"the checkpoint was made with (warmup_step, update_step, update_times) = "
                f"{state.schedule}, this configuration has {now}. "
                "Restore the values, or start anew with overwrite_output_dir: true."
            )
        settings = self.settings()
        changed = sorted(
            k for k in {*settings, *state.settings} if settings.get(k) != state.settings.get(k)
        )
        if changed:
            raise BadInput(
                "the checkpoint was made with other settings: "
                + "; ".join(
                    f"{k} {state.settings.get(k)!r}, now {settings.get(k)!r}" for k in changed
                )
                + ". Restore them, or start anew with overwrite_output_dir: true."
            )
        if state.step >= s.budget and self.ranks.leads:
            _log.warning("nothing to train: the checkpoint is at step %d, the run ends at step %d",
                         state.step, s.budget)  # fmt: skip
        if state.rows_sha256 != self.rows_sha256:
            raise ProvenanceMismatch(
                "the checkpoint was made on other training rows (data, template, tokenizer or "
                "cutoff_len changed). Restore them, or start anew with overwrite_output_dir: true."
            )
        self.run.strategy.restore(state.component)
        self.restore_more(state)


def trainer_class(seam: type[Seam], base: type, run: Run) -> type:
    """LlamaFactory's trainer class with `seam` before it, for one run."""
    return type(f"{seam.__name__.removesuffix('Seam')}{base.__name__}", (seam, base), {"run": run})


def keeps_moments(optimizer: Any) -> bool:  # noqa: ANN401 - an optimizer or accelerate's wrapper
    """Whether an optimizer is of the Adam family; true also before its first step."""
    inner = getattr(optimizer, "optimizer", optimizer)
    states = [state for state in inner.state.values() if state]
    if states:
        return all("exp_avg" in state and "exp_avg_sq" in state for state in states)
    return "adam" in type(inner).__name__.lower()


def _set_early_stopping(trainer: Any, min_delta: float) -> None:  # noqa: ANN401 - a Trainer
    """Give the callback that LlamaFactory adds for `early_stopping_steps` its threshold."""
    from transformers import EarlyStoppingCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_threshold = min_delta


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
