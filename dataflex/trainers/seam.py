"""The base of our trainers: life cycle, checkpointed state, log.

A mixin over public Trainer methods (and two inner ones in `sealing.py`, around a checkpoint); it
changes nothing about data or loss. `row_seam.py` adds the data of exact steps, `loss_seam.py` the
weights of samples; a trainer of one kind is thin over them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.checkpoints.saving import disk_faults
from dataflex.checkpoints.state import STATE, RunState, load_state
from dataflex.features.step_share import step_of
from dataflex.models.experts import freeze_routers, load_experts
from dataflex.models.passes import own_labels, row_losses
from dataflex.models.vocabulary import check_vocabulary
from dataflex.run.board import Scoreboard
from dataflex.run.context import RunContext
from dataflex.run.log import RunLog, as_json
from dataflex.run.output_owner import remember_identity
from dataflex.run.schedule import Schedule
from dataflex.run.strategy import FSDP, ZERO3
from dataflex.trainers.job import Job, Run
from dataflex.trainers.sealing import SealedCheckpoints
from dataflex.trainers.settings import check_agreement, comparable, of_run, rows_sha256
from gradstore.capture.modelstate import random_states_kept
from gradstore.errors import BadInput, DamagedData, StoreError
from gradstore.store.cleaning import store_set_aside

if TYPE_CHECKING:
    from gradstore.export.moments import AdamMoments


class Seam(SealedCheckpoints):
    """Mixin that goes before a transformers Trainer; `trainer_class` sets `run`."""

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
    callback_handler: Any
    is_deepspeed_enabled: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self.rows_sha256 = rows_sha256(self.run.data)
        self.log_files = RunLog(Path(self.args.output_dir))
        self._numbers: dict[str, float] = {}
        # Those of before training: creating a scheduler changes the Trainer's arguments.
        self._agreed: Mapping[str, Any] = {}
        _set_early_stopping(self, self.run.config.dataflex.early_stopping_min_delta)
        if self.run.config.dataflex.freeze_gate:
            freeze_routers(self.model)

    # -- what a kind of trainer decides -----------------------------------------------------------

    @classmethod
    def plan(cls, job: Job) -> Schedule:
        """Plan the schedule of a run; refusals come before the model is loaded.

        Raises:
            BadInput: the rows do not suffice for an interval, or W, U, T make no schedule.
        """
        raise TypeError(f"{cls.__name__} does not implement plan")

    def more_state(self) -> Mapping[str, Any]:
        """Give what a checkpoint keeps beside the strategy's state: JSON values and arrays."""
        return {}

    def restore_more(self, state: RunState) -> None:
        """Restore what `more_state` gave."""

    # -- public Trainer methods -------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Restore what `state.json` keeps, start the strategy, train, finish it."""
        checkpoint = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        self._agreed = self.settings(self.run)
        with contextlib.ExitStack() as stack:
            # An earlier run's store, until the strategy has started: put back where it has not.
            former = stack.enter_context(contextlib.ExitStack())
            stack.callback(self.run.strategy.finish)
            step = 0
            if checkpoint is not None:
                state = load_state(checkpoint)
                self._restore(state, checkpoint)
                step = state.step
            self._begin(former, step, fresh=checkpoint is None)
            if checkpoint is not None:
                load_experts(self.model, checkpoint)
            self.seal_last()
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Add the numbers since the last line to the Trainer's own, but not to an evaluation's.

        A model card takes every key of an evaluation's line for a metric of that evaluation.
        """
        added: dict[str, float] = {}
        if not any(key.startswith("eval_") for key in logs):
            added, self._numbers = self._numbers, {}
        super().log({**logs, **added}, *args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save; a checkpoint's state goes in before trainer_state.json, which completes it."""
        with disk_faults(Path(output_dir or self.args.output_dir)):
            super().save_model(output_dir, _internal_call)
        is_checkpoint = output_dir is not None and Path(output_dir) != Path(self.args.output_dir)
        if is_checkpoint and _internal_call:
            # Of DeepSpeed's moments every rank has a part, so that all put them together.
            saves, gathers = self.args.should_save, self.is_deepspeed_enabled
            moments = self.present_moments() if saves or gathers else None
            if saves:
                self.save_state_beside(Path(str(output_dir)), moments)

    def present_moments(self) -> AdamMoments | None:
        """Copy Adam's moments by name, which let `gradstore build` do without optimizer.pt.

        None where no strategy takes gradients of LoRA matrices: those of a whole model, twice as
        large as itself, stay in that file alone.
        """
        is_lora = self.run.config.known.finetuning_type == "lora"
        if not (is_lora and self.run.strategy.needs_lora and keeps_moments(self.optimizer)):
            return None
        from gradstore.export.moments import AdamMoments

        return AdamMoments.from_optimizer(self.optimizer, self.model)

    def save_state_beside(self, checkpoint: Path, moments: AdamMoments | None) -> None:
        """Write `dataflex/state.json` of the current step into a checkpoint folder, and moments."""
        if moments is not None:
            moments.save(checkpoint / "dataflex" / "moments.safetensors")
        self.present_state().save(checkpoint)

    def present_state(self) -> RunState:
        """Take the state between two optimizer steps."""
        s = self.run.schedule
        return RunState(
            step=int(self.state.global_step),
            run_id=self.run.run_id,
            schedule=(s.warmup_step, s.update_step, s.update_times),
            rows_sha256=self.rows_sha256,
            settings=comparable(self._agreed),
            component=self.run.strategy.state(),
            more=self.more_state(),
        )

    @classmethod
    def settings(cls, run: Run) -> Mapping[str, Any]:
        """List what a resume must agree on; the rows of `run` are known, no model is needed."""
        return of_run(run)

    # -- log --------------------------------------------------------------------------------------

    def add_to_log(self, numbers: Mapping[str, float]) -> None:
        """Add numbers to the Trainer's next log line, as `dataflex/<name>`."""
        self._numbers |= {f"dataflex/{k}": v for k, v in as_json(numbers).items()}

    # -- life cycle -------------------------------------------------------------------------------

    @cached_property
    def context(self) -> RunContext:
        """The view that strategies have of the run."""
        return RunContext(
            config=self.run.config,
            data=self.run.data,
            collate=own_labels(self.data_collator),
            model=self.model,
            output_dir=Path(self.args.output_dir),
            run_id=self.run.run_id,
            seed=int(self.args.seed),
            autocast=str(self.accelerator.mixed_precision or "no").replace("no", "off"),
            shows_progress=self.run.ranks.leads and not self.args.disable_tqdm,
            ranks=self.run.ranks,
            board=Scoreboard(self.run.data.train, self._measured),
            step=step_of(self.args),
        )

    def _measured(
        self, positions: npt.NDArray[np.int64], *, max_rows: int
    ) -> npt.NDArray[np.float64]:
        """Measure losses (n,) of training rows under the present model, for the scoreboard."""
        return row_losses(self.context, positions, max_rows=max_rows)

    def _begin(self, former: contextlib.ExitStack, step: int, *, fresh: bool) -> None:
        """Start the strategy: the last place for refusals, before a step is trained.

        Args:
            former: takes an earlier run's store that must be put back if the strategy refuses.
            step: g, optimizer steps finished.
            fresh: whether the run starts from the beginning.
        """
        config = self.run.config
        check_vocabulary(self.model, self.run.data)
        if spread := sharding(self) & self.run.strategy.whole_model:
            raise BadInput(
                f"component {self.run.name!r} makes passes of its own over the model in training, "
                f"which cannot be made under {' and '.join(sorted(spread))}: use DDP."
            )
        fresh = fresh and config.known.overwrite_output_dir

        def set_aside() -> None:
            if fresh and (own := config.own_store) is not None:
                former.enter_context(store_set_aside(own))

        def own() -> None:
            remember_identity(config.output_dir, self.run.run_id)
            # After the strategy's refusals: they leave an earlier run's records as they were.
            if fresh:
                self.log_files.clear()
            self.log_files.receipt.begin(*self._told(), step)
            former.close()

        ranks = self.run.ranks
        ranks.decide(set_aside)
        with random_states_kept():
            ranks.gather(lambda: self.run.strategy.start(self.context))
        ranks.decide(own)

    def _told(self) -> tuple[str, dict[str, Any], dict[str, Any]]:
        """Give what the receipt says of the run: its id, its configuration, its rows."""
        run, data = self.run, self.run.data
        config = {**vars(run.config.dataflex), "component_params": dict(run.params)}
        rows = {
            "train_rows": len(data.train),
            "train_sha256": self.rows_sha256,
            "targets": {t.name: [len(t), t.row_set.sha256] for t in data.targets},
            "template": data.template,
            "stage": data.stage,
            "dropped": dict(data.dropped),
        }
        return run.run_id, {**run.config.llamafactory, **config}, rows

    def _restore(self, state: RunState, checkpoint: Path) -> None:
        """Go on where the checkpoint was: same rows, same position, same component."""
        check_agreement(state, self.run, self._agreed, self.rows_sha256)
        with state_taken(self.run.name, checkpoint):
            self.run.strategy.restore(state.component)
            self.restore_more(state)


@contextlib.contextmanager
def state_taken(name: str, checkpoint: Path) -> Iterator[None]:
    """Name the checkpoint where what it keeps of a component cannot be taken back.

    Args:
        name: of the component.
        checkpoint: whose state is restored in the context.

    Raises:
        DamagedData: in the place of what a state of another shape makes a component raise.
    """
    try:
        yield
    except StoreError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DamagedData(
            f"{checkpoint / STATE} does not hold what component {name!r} keeps there "
            f"({type(error).__name__}: {error}). Resume from another checkpoint, or start a "
            "new run with overwrite_output_dir: true."
        ) from error


def trainer_class(seam: type[Seam], base: type, run: Run) -> type:
    """Derive a trainer class from LlamaFactory's, with `seam` before it, for one run."""
    return type(f"{seam.__name__.removesuffix('Seam')}{base.__name__}", (seam, base), {"run": run})


def sharding(trainer: Any) -> set[str]:  # noqa: ANN401 - a transformers Trainer
    """Name how a trainer shards its model over devices; empty where each has all of it."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    found = {FSDP} if getattr(trainer, "is_fsdp_enabled", False) else set()
    return found | ({ZERO3} if plugin is not None and plugin.zero_stage == 3 else set())


def keeps_moments(optimizer: Any) -> bool:  # noqa: ANN401 - an optimizer or accelerate's wrapper
    """Return true for an optimizer of the Adam family, also before its first step."""
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
