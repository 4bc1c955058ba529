"""A training run, recorded step by step while LlamaFactory's own trainer trains it.

Which rows a step has, what its loss is divided by and its learning rate are taken from the trainer
as it goes, so no sampler, schedule or rule of accumulation is written down a second time here.

Letters: b rows of a micro-batch, t tokens.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from dataflex.bridge import running
from dataflex.config.keys import RunConfig
from dataflex.data.rows import RunData, check_rows
from dataflex.launch.plain_run import plain_arguments
from dataflex.models.dropout import dropouts
from dataflex.models.vocabulary import check_vocabulary
from dataflex.models.widened import Widened
from gradstore.capture.losses import IGNORED_LABEL
from gradstore.errors import BadInput
from gradstore.export.moments import AdamMoments
from gradstore.replay.run import AdamW, MicroBatch, Moments, Parameters, Step, TrainingRun

#: Column of a row's position among the training rows; taken off again before a model sees it.
_ROW = "_replayed_row"


@dataclass(frozen=True)
class Batch:
    """Inputs of the loss of a micro-batch.

    Attributes:
        tensors: for the model, on its device, without labels.
        labels: (b, t).
        denominator: what the trainer divides the sum of token losses by.
    """

    tensors: Mapping[str, Any]
    labels: Tensor
    denominator: float


@dataclass(frozen=True)
class Recording:
    """A run that was trained.

    Attributes:
        run: as replay takes it, the parameters it ended with included.
        model: that trained, in eval mode.
        data: its rows.
        collate: rows -> padded batch.
    """

    run: TrainingRun
    model: nn.Module
    data: RunData
    collate: Callable[[list[Any]], Any]

    def in_float64(self) -> Recording:
        """Return the same run with model, parameters and moments in float64.

        It does not end where the real one did: Adam amplifies the rounding of float32.
        """
        run, moments = self.run, self.run.moments
        if moments is not None:
            moments = replace(moments, first=_double(moments.first), second=_double(moments.second))
        as_double = replace(run, parameters=_double(run.parameters), moments=moments, ended=None)
        self.model.double()
        return replace(self, run=as_double)


def record(
    config: RunConfig,
    begin: Callable[[Recording], None],
    tell: Callable[[int], object] = lambda steps: None,
) -> Recording:
    """Train a run as LlamaFactory does, and note each step; nothing of it is kept on disk.

    Args:
        config: of the run; it starts anew, or from `resume_from_checkpoint`.
        begin: called before the first step with a run in which that step stands for each, for a
            forecast; what it raises ends the training.
        tell: called with 1 before each step.

    Raises:
        BadInput: LlamaFactory refuses the configuration; the model, optimizer or trainer are none
            that replay can follow.
    """
    args = plain_arguments(config)
    args["resume_from_checkpoint"] = config.known.resume_from_checkpoint
    session = _Session(args, begin, tell)
    with tempfile.TemporaryDirectory() as folder:
        session.args["output_dir"] = folder
        running.run_replaced(config, session)
    if session.recording is None:
        raise BadInput("the run trains no step: raise num_train_epochs or max_steps.")
    return session.recording


def row_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the token losses of each row, (b,), from logits (b, t, v) and labels (b, t).

    The logits of a token predict the next one; every operation can be differentiated twice.
    """
    targets = labels[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORED_LABEL,
        reduction="none",
    )
    return losses.view(targets.shape).sum(1)


def logits_of(model: nn.Module, parameters: Parameters, tensors: Mapping[str, Any]) -> Tensor:
    """Compute logits (b, t, v) with `parameters` in the place of the model's own."""
    given = {**tensors, "use_cache": False}
    in_float64 = next(iter(parameters.values())).dtype == torch.float64
    with Widened() if in_float64 else contextlib.nullcontext():
        logits: Tensor = functional_call(model, dict(parameters), (), given).logits
    return logits


class _Session:
    """One recorded training; `running.Session`."""

    arrange = None

    def __init__(
        self,
        args: dict[str, Any],
        begin: Callable[[Recording], None],
        tell: Callable[[int], object],
    ) -> None:
        self.args, self.begin, self.tell = args, begin, tell
        self.recording: Recording | None = None
        self._data: RunData | None = None

    def take_data(self, data: RunData, training_args: Any, tuned: Any) -> None:  # noqa: ANN401
        """Keep the rows, before a model is loaded.

        Raises:
            BadInput: no training or no target row has a target token; several processes.
        """
        check_rows(data, needs_targets=True, subtask_sizes=None)
        if (devices := training_args.world_size * max(1, training_args.n_gpu)) > 1:
            raise BadInput(
                f"the run would train on {devices} devices; replay follows one: start one process, "
                "and show it one device (CUDA_VISIBLE_DEVICES=0)."
            )
        self._data = data

    def trainer_for(self, base: type) -> Callable[..., Any]:
        """Build LlamaFactory's own trainer, which tells each step."""
        session = self

        class Recorded(_RecordedTrainer, base):  # type: ignore[misc]
            pass

        def build(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            from transformers import PrinterCallback

            assert session._data is not None
            rows = kwargs["train_dataset"]
            kwargs["train_dataset"] = rows.add_column(_ROW, np.arange(len(rows)))
            trainer = Recorded(*args, **kwargs)
            trainer.remove_callback(PrinterCallback)
            trainer.prepare_recording(session, session._data)
            return trainer

        return build


class _RecordedTrainer:
    """Mixin that goes before a transformers Trainer, and changes nothing of what it does."""

    args: Any
    state: Any
    model: Any
    optimizer: Any
    accelerator: Any
    data_collator: Any
    compute_loss_func: Any
    label_smoother: Any
    model_accepts_loss_kwargs: bool

    def prepare_recording(self, session: _Session, data: RunData) -> None:
        """Give batches the positions of their rows; refuse a model that replay can't follow."""
        self._session, self._data = session, data
        self._steps: list[Step] = []
        self._start: TrainingRun | None = None
        self._collate = self.data_collator
        self.data_collator = self._numbered
        check_vocabulary(self.model, data)
        _check_model(self.model, self.accelerator.mixed_precision or "no")
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise BadInput("the trainer has a loss of its own; replay follows the plain one.")

    def _numbered(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows; their positions go beside the tensors."""
        rows = [feature[_ROW] for feature in features]
        plain = [{k: v for k, v in feature.items() if k != _ROW} for feature in features]
        return {**self._collate(plain), _ROW: torch.tensor(rows)}

    def train(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Train, and make the recording of it."""
        found = super().train(*args, **kwargs)  # type: ignore[misc]
        if self._start is not None:
            run = replace(self._start, steps=self._steps, ended=self._trained())
            self._session.recording = self._recorded(run)
        return found

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Note the micro-batches of the step that comes, before the trainer gets them."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        if not batches:
            return batches, items
        rate = float(self.optimizer.param_groups[0]["lr"])
        noted = [self._noted(batch.pop(_ROW), batch, items, len(batches)) for batch in batches]
        self._steps.append(Step(noted, rate))
        if self._start is None:
            # One step stands for each, until all are known.
            left = max(1, int(self.state.max_steps) - int(self.state.global_step))
            self._start = self._first_state(self._steps * left)
            self._session.begin(self._recorded(self._start))
        self._session.tell(1)
        return batches, items

    def save_model(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Keep nothing."""

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Print nothing."""

    def _noted(
        self,
        rows: Tensor,
        batch: Mapping[str, Any],
        items: Any,  # noqa: ANN401 - a tensor, a number or None
        micro_batches: int,
    ) -> MicroBatch:
        device = self.args.device
        held = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        labels = held.pop("labels")
        if items is not None and self.model_accepts_loss_kwargs:
            denominator = float(items)
        else:  # the model's own mean over a micro-batch, then that over the step's
            denominator = float((labels[:, 1:] != IGNORED_LABEL).sum()) * micro_batches
        return MicroBatch(rows.cpu().numpy().astype(np.int64), Batch(held, labels, denominator))

    def _first_state(self, steps: list[Step]) -> TrainingRun:
        model = self.accelerator.unwrap_model(self.model)
        rule, moments = _optimizer_of(self.optimizer, model)

        def loss(parameters: Parameters, batch: Batch, weights: Tensor) -> Tensor:
            sums = row_sums(logits_of(model, parameters, batch.tensors), batch.labels)
            return (weights * sums).sum() / batch.denominator

        clip = float(self.args.max_grad_norm or 0.0)
        return TrainingRun(
            self._trained(), loss, steps, len(self._data.train), rule, max(clip, 0.0), moments
        )

    def _trained(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        named = model.named_parameters()
        return {name: value.detach().clone() for name, value in named if value.requires_grad}

    def _recorded(self, run: TrainingRun) -> Recording:
        model = self.accelerator.unwrap_model(self.model)
        # Without dropout the two modes differ in gradient checkpointing alone, which training has.
        return Recording(run, model.eval(), self._data, self._collate)


def _check_model(model: nn.Module, precision: str) -> None:
    """Refuse a model that is random, or that computes with fewer bits than float32."""
    if found := dropouts(model):
        name, share = next(iter(found.items()))
        raise BadInput(
            f"{len(found)} modules of the model have dropout ({name}: {share:g}), and replay "
            "follows a deterministic run; set lora_dropout: 0, and dropout in the model's "
            "config.json to 0."
        )
    others = {str(value.dtype) for value in model.parameters() if value.dtype != torch.float32}
    if others or precision != "no":
        told = ", ".join(sorted(others)) or f"mixed precision {precision}"
        raise BadInput(
            f"the model computes in {told}, whose rounding hides the derivatives that replay "
            "takes; remove bf16, fp16 and quantization, and use weights in float32."
        )


def _optimizer_of(optimizer: Any, model: nn.Module) -> tuple[AdamW, Moments | None]:  # noqa: ANN401
    """Read the rule of an AdamW and where it is.

    Raises:
        BadInput: another optimizer; groups that differ in more than their weight decay.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    rates = {group["lr"] for group in inner.param_groups}
    follows = "replay follows AdamW with one learning rate: set optim: adamw_torch, and no "
    if type(inner) is not torch.optim.AdamW or len(rates) > 1:
        raise BadInput(
            f"the optimizer is {type(inner).__name__} with {len(rates)} learning rates; {follows}"
            "loraplus_lr_ratio."
        )
    groups = [group for group in inner.param_groups if group["params"]]
    constants = {(group["eps"], *group["betas"]) for group in groups}
    decays = {group["weight_decay"] for group in groups} - {0}
    odd = any(group["amsgrad"] or group["maximize"] for group in groups)
    if odd or len(constants) > 1 or len(decays) > 1:
        raise BadInput(
            f"the optimizer's groups have {len(constants)} kinds of constants, amsgrad or maximize;"
            f" {follows}optim_args."
        )
    named = {id(value): name for name, value in model.named_parameters()}
    free = {named[id(p)] for g in groups if not g["weight_decay"] for p in g["params"]}
    eps, *betas = next(iter(constants))
    rule = AdamW((float(betas[0]), float(betas[1])), float(eps), float(max(decays, default=0.0)),
                 frozenset(free))  # fmt: skip
    held = AdamMoments.from_optimizer(optimizer, model).parameters
    taken = {moments.constants.step for moments in held.values()}
    if taken == {0}:
        return rule, None
    if len(taken) > 1:
        raise BadInput(
            f"parameters have taken {min(taken)} to {max(taken)} optimizer steps; replay goes on "
            "from a checkpoint in which all have taken as many."
        )
    first, second = ({n: m.m for n, m in held.items()}, {n: m.v for n, m in held.items()})
    return rule, Moments(first, second, taken.pop())


def _double(named: Parameters) -> dict[str, Tensor]:
    return {name: value.double() for name, value in named.items()}
