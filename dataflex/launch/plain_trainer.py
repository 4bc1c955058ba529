"""transformers' Trainer, or TRL's SFTTrainer, without LlamaFactory: its features in a store.

The callback only looks: a training with it makes the same weights, bit by bit, as one without.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.registry import grouped
from dataflex.data.rows import Rows, RunData
from dataflex.features.gradients import FeatureService
from dataflex.features.settings import FeatureSettings
from dataflex.features.step_share import step_of
from dataflex.features.store_owner import built_by
from dataflex.models.vocabulary import check_vocabulary
from dataflex.run.context import RunContext
from dataflex.run.ranks import Ranks
from dataflex.trainers.seam import sharding
from gradstore.capture.adapters import check_frozen
from gradstore.capture.modelstate import random_states_kept
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.export.features import FeatureMap
from gradstore.export.moments import AdamMoments
from gradstore.export.token_rows import read_rows, tokenizer_of
from gradstore.storage.location import Place, location
from gradstore.store.building import OWN, TARGET, TRAIN

_log = logging.getLogger(__name__)


def past_rates(scheduler: Any, step: int, steps: range) -> list[float]:  # noqa: ANN401
    """Compute the learning rates of steps that a resumed training took before.

    Args:
        scheduler: of the trainer, as it is after `step` steps.
        step: where the training resumes.
        steps: those whose rates are wanted, from 0.

    Returns:
        One each; none, with a warning, where the schedule is not a function of the step.
    """
    if not steps:
        return []
    inner = getattr(scheduler, "scheduler", scheduler)  # accelerate wraps it
    made, left = divmod(int(getattr(inner, "last_epoch", 0)), step)
    if made < 1 or left or not isinstance(inner, LambdaLR):
        _log.warning(
            "the schedule %s does not say its learning rates of steps %d to %d, before the resume: "
            "the weight of the next export (checkpoints=all) is of the steps after it",
            type(inner).__name__, steps.start + 1, steps.stop,
        )  # fmt: skip
        return []
    # accelerate advances the schedule once a process for each step.
    rate, factor = float(inner.base_lrs[0]), inner.lr_lambdas[0]
    return [rate * float(factor(each * made)) for each in steps]


class GradientStoreCallback(TrainerCallback):
    """Callback that exports the features of training and target rows at chosen optimizer steps.

    ```
    trainer.add_callback(GradientStoreCallback(trainer, "out/gradstore", every=100))
    ```

    Interrupted, by a kill too, the next training with the same settings computes only what is
    missing. Several processes share the passes, and rank 0 writes; the store is locked during an
    export alone.
    """

    def __init__(
        self,
        trainer: Any,  # noqa: ANN401 - a Trainer
        store: Place,
        *,
        steps: Collection[int] = (),
        every: int | None = None,
        train_rows: Sequence[Any] | None = None,
        target_rows: Mapping[str, Sequence[Any]] | Sequence[Any] | None = None,
        gradstore_run: str | None = None,
        **settings: Any,  # noqa: ANN401 - of FeatureSettings
    ) -> None:
        """Check the settings; rows and model are checked when training begins.

        Args:
            trainer: whose model, optimizer, collator, tokenizer and rows are used.
            store: the store's folder, made if need be; s3://BUCKET/PREFIX; or https://HOST.
            steps: optimizer steps after which to export, beside the last one.
            every: export after every so many steps, too.
            train_rows: rows to score; None for the trainer's `train_dataset`. Given ones have
                `input_ids` and `labels`, or `prompt` and `response`.
            target_rows: what to become good at: rows of each set by its name, or of one set; None
                for the trainer's `eval_dataset`.
            gradstore_run: prefix of the generations, where several runs share a store.
            **settings: of the features: `gradient_type`, `proj_dim` and the others of `less`.

        Raises:
            BadInput: a setting that there is not, or a value that it can't have.
        """
        expect(hasattr(trainer, "callback_handler"), "trainer", trainer, "a transformers Trainer")
        self._trainer = trainer
        self._store = location(store)
        self._steps = {expect_whole(step, "a step of `steps`") for step in steps}
        self._every = None if every is None else expect_whole(every, "every")
        self._given = train_rows, target_rows
        self._prefix = gradstore_run
        self._settings = grouped(FeatureSettings, "GradientStoreCallback", settings)
        self._service: FeatureService | None = None
        self._exported = -1
        #: Learning rate of each step since the last export, by the step's number from 1.
        self._rates: dict[int, float] = {}

    # -- events of the Trainer --------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Make every refusal before the first step: rows, model, moments, the store."""
        late = sorted(step for step in self._steps if step > state.max_steps)
        if late:
            raise BadInput(
                f"steps names {', '.join(map(str, late))}, the training ends at step "
                f"{state.max_steps}: leave out what is later (the last step is exported anyway)."
            )
        if spread := sharding(self._trainer):
            raise BadInput(
                f"gradients of single rows can't be taken under {' and '.join(sorted(spread))}, "
                "which shards the model: use DDP."
            )
        self._exported = -1
        with random_states_kept():
            run = self._context(args)
            check_frozen(run.model)
            check_vocabulary(run.model, run.data)
            self._service = FeatureService(run, self._settings)
            try:
                # A wrong optimizer is told now: before its first step it has moments of zero.
                FeatureMap(self._settings.train_features, self._service.space.slots,
                           self._moments())  # fmt: skip
                step = int(state.global_step)
                before = range(self._previous(step + 1), step)
                rates = past_rates(self._trainer.lr_scheduler, step, before)
                self._rates = dict(zip(range(step - len(rates) + 1, step + 1), rates, strict=True))
            finally:
                self._service.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Add up the learning rate that the coming step uses."""
        rate = float(self._trainer.lr_scheduler.get_last_lr()[0])
        self._rates[int(state.global_step) + 1] = rate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Export where this step is one of those asked for, or the last."""
        step = int(state.global_step)
        periodic = self._every is not None and step % self._every == 0
        if periodic or step in self._steps or step >= state.max_steps:
            self._export(step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Export the end of a training that stopped early."""
        step = int(state.global_step)
        if step == self._exported:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _log.warning(
                "step %d is not exported: the best checkpoint was loaded, whose moments are gone; "
                "`steps` and `every` export on the way",
                step,
            )
            return
        self._export(step)

    # -- exporting --------------------------------------------------------------------------------

    def _export(self, step: int) -> None:
        """Commit the generations of a step; collective."""
        assert self._service is not None  # made when training began
        service = self._service
        with random_states_kept():
            service.open()
            try:
                last = self._previous(step)
                rates = [rate for each, rate in self._rates.items() if each > last]
                rate = sum(rates) / len(rates) if rates else 0.0
                service.export(step, rate, self._moments())
            finally:
                service.close()
        self._exported, self._rates = step, {}

    def _previous(self, step: int) -> int:
        """Return the last step before this one that has an export, or should; 0 if none.

        A training that ended between two of `every` exported its last step, too.
        """
        service = self._service
        assert service is not None
        periodic = 0 if self._every is None else (step - 1) // self._every * self._every
        asked = max([periodic, *(each for each in self._steps if each < step)])
        found = service.run.ranks.decide(
            lambda: max((each for each in service.steps() if each < step), default=0)
        )
        return max(asked, found)

    def _moments(self) -> AdamMoments | None:
        if not self._settings.train_features.needs_moments:
            return None
        return AdamMoments.from_optimizer(self._trainer.optimizer, self._trainer.model)

    def _context(self, args: Any) -> RunContext:  # noqa: ANN401 - TrainingArguments
        """Build the view that the feature service has of a run."""
        from gradstore.export.token_rows import padded

        trainer = self._trainer
        tokenizer = tokenizer_of(getattr(trainer, "processing_class", None))
        ours = DataFlexConfig(
            gradstore=str(self._store),
            gradstore_run=self._prefix,
            store_text=tokenizer is not None,
        )
        config = RunConfig(ours, {"output_dir": args.output_dir}, Path(type(self).__name__))
        train, targets = self._rows(tokenizer)
        precision = str(trainer.accelerator.mixed_precision or "no")
        return RunContext(
            config=config,
            data=RunData(train, targets, tokenizer, OWN, None, "sft"),
            collate=padded,
            model=trainer.model,
            output_dir=Path(args.output_dir),
            run_id=built_by(config),
            seed=int(args.seed),
            autocast=precision.replace("no", "off"),
            shows_progress=args.process_index == 0 and not args.disable_tqdm,
            ranks=Ranks(int(args.process_index), int(args.world_size)),
            step=step_of(args),
        )

    def _rows(self, tokenizer: Any) -> tuple[Rows, tuple[Rows, ...]]:  # noqa: ANN401
        """Read the rows given, else the trainer's own through its collator."""
        train, targets = self._given
        if getattr(self._trainer.args, "packing", False) and (train is None or targets is None):
            raise BadInput(
                "the trainer packs several samples into one row: a row's features would be those "
                "of all of them. Set packing=False, or give train_rows and target_rows."
            )
        own = train is None, targets is None
        train = self._trainer.train_dataset if own[0] else train
        targets = self._trainer.eval_dataset if own[1] else targets
        if targets is None:
            raise BadInput("no target rows: give the trainer an eval_dataset, or target_rows.")
        if not isinstance(targets, Mapping):
            targets = {TARGET: targets}

        def read(name: str, rows: Any, of_trainer: bool) -> Rows:  # noqa: ANN401
            if not of_trainer:
                return _as_rows(name, rows, tokenizer)
            # Sequential, made by public means, and never iterated: unused columns are gone.
            loader = self._trainer.get_test_dataloader(rows)
            return _as_rows(name, loader.dataset, loader.collate_fn)

        return read(TRAIN, train, own[0]), tuple(
            read(str(name), rows, own[1]) for name, rows in targets.items()
        )


def _as_rows(name: str, rows: Any, by: Any) -> Rows:  # noqa: ANN401
    from datasets import Dataset

    found = read_rows(name, rows, by)
    columns = {"input_ids": found.input_ids, "labels": found.labels}
    return Rows(name, Dataset.from_dict(columns), tuple((name, i) for i in range(len(found))))
