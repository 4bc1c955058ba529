"""Weighted losses of an optimizer step, with one denominator over micro-batches and ranks.

Mixed in before a seam (and thus before the Trainer). `contributors` weight samples; their weights
are multiplied. Without any, the loss is the Trainer's own, untouched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from dataflex.trainers.seam import Seam
from dataflex.trainers.weights import (
    SampleStats,
    check_weights,
    hidden_option,
    multipliers,
    rows_of,
    statistics,
    summary,
)
from dataflex.weighters.base import FloatArray, LossContributor, WeightContext
from gradstore.capture.losses import (
    IGNORED_LABEL,
    Targets,
    logits_of,
    model_inputs,
    target_losses,
)
from gradstore.capture.modelstate import borrowed, random_states_kept

_log = logging.getLogger(__name__)


class LossSeam(Seam):
    """Seam that weights samples of a step; the plain loss stays where nothing weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self._micro = 0
        self._step_tokens = 0.0
        self._micro_rows: list[npt.NDArray[np.int64]] | None = None
        #: Multipliers of this rank's micro-batches, where the window was scored beforehand.
        self._scored: list[FloatArray] | None = None
        #: What the training passes of this step saw, for `after_step`.
        self._seen: list[SampleStats] = []
        #: Multipliers of all ranks' samples since the last log line.
        self._pending: list[FloatArray] = []
        self._warned: set[str] = set()

    # -- what a subclass decides ------------------------------------------------------------------

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """List what weights the samples of a step; empty: the plain loss."""
        return ()

    def observes(self, step: int) -> bool:
        """Return true if `after_step` needs the losses of a step that nothing weights."""
        return False

    def rows_of_step(self, step: int) -> list[npt.NDArray[np.int64]] | None:
        """Return positions of this rank's micro-batches, None where the stock loader serves."""
        return None

    def after_step(self, seen: SampleStats, rows: npt.NDArray[np.int64] | None) -> None:
        """Look at a step whose micro-batches have all been through the model; called on every rank.

        Args:
            seen: this rank's samples, in the order they were trained on.
            rows: their positions, or None.
        """

    # -- public Trainer methods -------------------------------------------------------------------

    def get_batch_samples(
        self,
        epoch_iterator: Any,  # noqa: ANN401
        num_batches: int,
        device: torch.device,
    ) -> tuple[list[Any], Any]:
        """Count the step's target tokens; score its samples where weights need all of them."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        step = int(self.state.global_step)
        contributors = self.contributors(step) if batches else ()
        self._micro, self._scored, self._seen, self._micro_rows = 0, None, [], None
        if batches and (contributors or self.observes(step)):
            self._micro_rows = self.rows_of_step(step)
        if contributors:
            with random_states_kept():
                for contributor in contributors:
                    contributor.refresh(self.context, step)
                self._step_tokens = self._count(batches, items)
                if len(batches) > 1 and any(c.scope == "window" for c in contributors):
                    self._scored = self._score(batches, contributors, step)
        return batches, items

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Weight the loss of a micro-batch in training; evaluation keeps the plain one."""
        step = int(self.state.global_step)
        contributors = self.contributors(step) if model.training else ()
        if contributors:
            outputs, loss = self._weighted(model, inputs, contributors, step, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        plain = partial(super().compute_loss, model)  # type: ignore[misc]
        if not (model.training and self.observes(step)):
            return plain(inputs, return_outputs=return_outputs,
                         num_items_in_batch=num_items_in_batch)  # fmt: skip
        loss, outputs = plain(
            dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        with torch.no_grad():
            targets = Targets.of(inputs)
            token_losses = self._token_losses(outputs, targets)
            stats = statistics(inputs, outputs, targets, token_losses, ())
            if not np.isfinite(stats.loss_sums).all():
                self._warn_once("loss", f"step {step}: samples have a loss that is not finite")
            self._after(stats)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Add the weights since the last line: to the screen, events.jsonl and the log.

        The last line, `train_runtime`, has those of steps that no other line came after.
        """
        if self._pending and not {"loss", "train_runtime"}.isdisjoint(logs):
            numbers = summary(np.concatenate(self._pending))
            self._pending = []
            self.add_to_log(numbers)
            if numbers and self.run.ranks.leads:
                text = (
                    "weights {weight_min:.3g} to {weight_max:.3g}, mean {weight_mean:.3g}, "
                    "effective share {effective_share:.0%}"
                ).format(**numbers)
                self.log_files.update("weight", int(self.state.global_step), self.run.name, text,
                                      in_table=False, **numbers)  # fmt: skip
        super().log(logs, *args, **kwargs)

    # -- the parts --------------------------------------------------------------------------------

    def _count(self, batches: Sequence[Mapping[str, torch.Tensor]], items: Any) -> float:  # noqa: ANN401
        """Count the plain trainer's denominator: labels of the step over all ranks.

        It counts a label at the first position too, though nothing predicts it.
        """
        if items is not None and self.args.average_tokens_across_devices:
            return float(items)
        own = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches)
        return float(self.run.ranks.summed(np.array([own], dtype=np.float64))[0])

    def _score(
        self,
        batches: Sequence[Mapping[str, torch.Tensor]],
        contributors: Sequence[LossContributor],
        step: int,
    ) -> list[FloatArray]:
        """Compute multipliers of every micro-batch from one pass in eval mode over all of them."""
        parts = []
        with borrowed(self.model, freeze=False), torch.no_grad():
            for batch in batches:
                inputs = self._prepare_inputs(dict(batch))  # type: ignore[attr-defined]
                with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    parts.append(self._scored_samples(inputs, contributors))
        rows = None if self._micro_rows is None else np.concatenate(self._micro_rows)
        each = self._weigh(SampleStats.joined(parts), contributors, step, rows)
        return np.split(each, np.cumsum([len(part.tokens) for part in parts])[:-1])

    def _scored_samples(
        self, inputs: Mapping[str, Any], contributors: Sequence[LossContributor]
    ) -> SampleStats:
        """Measure one micro-batch; where no hidden state is read, the head runs on targets only."""
        if hidden_option(contributors):
            return statistics(
                inputs, *self._forward(self.model, inputs, contributors), contributors
            )
        targets = Targets.of(inputs)
        token_losses = target_losses(self.model, inputs, targets)
        return statistics(inputs, None, targets, token_losses, contributors)

    def _weighted(
        self,
        model: Any,  # noqa: ANN401
        inputs: Mapping[str, Any],
        contributors: Sequence[LossContributor],
        step: int,
        items: Any,  # noqa: ANN401
    ) -> tuple[Any, torch.Tensor]:
        """Compute the model's outputs and this micro-batch's part of the step's weighted loss."""
        # Samples measured while the window was scored are not measured again.
        asked = contributors if self._scored is None else ()
        outputs, targets, token_losses = self._forward(model, inputs, asked)
        stats = statistics(inputs, outputs, targets, token_losses.detach(), asked)
        if self._scored is not None:
            each = self._scored[self._micro]
        else:
            rows = None if self._micro_rows is None else self._micro_rows[self._micro]
            each = self._weigh(stats, contributors, step, rows)
        self._after(stats)
        sound = np.isfinite(stats.loss_sums)
        if not sound.all() and self._passes_freely():
            self._warn_once("loss", f"step {step}: samples with a non-finite loss get weight 0")
            if (kept := rows_of(inputs, sound)) is None:
                nothing = [(p * 0).sum() for p in model.parameters() if p.requires_grad]
                return outputs, torch.stack(nothing).sum()
            # 0 times NaN is NaN in the backward pass, too: these rows must not be part of it. Not
            # DDP's forward, which waits for the other ranks; its hooks on gradients are there.
            outputs, targets, token_losses = self._forward(self.model, kept, ())
            each = each[sound]
        if smoothing := float(self.args.label_smoothing_factor):
            token_losses = self._token_losses(outputs, targets, smoothing)
        of_row = torch.as_tensor(each, dtype=torch.float32, device=token_losses.device)
        loss = (of_row[targets.rows] * token_losses).sum() / self._step_tokens
        # The Trainer's own factors: DDP takes the mean over ranks; without a count of items the
        # micro-batches' losses are averaged.
        world = self.run.ranks.world
        if self._counts_items(items):
            return outputs, (loss + self._auxiliary(outputs)) * world
        steps = self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        return outputs, loss * (world * steps) + self._auxiliary(outputs)

    def _weigh(
        self,
        stats: SampleStats,
        contributors: Sequence[LossContributor],
        step: int,
        rows: npt.NDArray[np.int64] | None,
    ) -> FloatArray:
        """Weight this rank's samples together with those of all ranks; (n,) multipliers."""
        held = self.run.ranks.gather(lambda: (stats, rows))
        everyone = SampleStats.joined([part for part, _ in held])
        positions = None if rows is None else np.concatenate([r for _, r in held if r is not None])
        losses = everyone.losses
        columns = iter(everyone.measured)
        weights = np.isfinite(losses).astype(np.float64)
        for contributor in contributors:
            context = WeightContext(
                run=self.context,
                step=step,
                tokens=everyone.tokens,
                rows=positions,
                domains=self._domains_of(positions),
                measured=next(columns) if contributor.measures else None,
            )
            answer = contributor.weights(losses, context)
            weights = weights * check_weights(answer, losses, type(contributor).__name__)
        relative = any(c.relative for c in contributors)
        each = multipliers(weights, everyone.tokens, relative=relative)
        self._pending.append(each[everyone.tokens > 0])
        if not each.any():
            self._warn_once("zero", f"step {step}: all weights are 0: no gradient from these")
        start = sum(len(part.tokens) for part, _ in held[: self.run.ranks.rank])
        return each[start : start + len(stats.tokens)]

    def _forward(
        self,
        model: Any,  # noqa: ANN401
        inputs: Mapping[str, Any],
        contributors: Sequence[LossContributor],
    ) -> tuple[Any, Targets, torch.Tensor]:
        """Pass without the model's own loss; outputs, targets, and token losses (s,)."""
        outputs = model(**model_inputs(inputs), **hidden_option(contributors))
        targets = Targets.of(inputs)
        return outputs, targets, self._token_losses(outputs, targets)

    def _token_losses(
        self,
        outputs: Any,  # noqa: ANN401
        targets: Targets,
        smoothing: float = 0.0,
    ) -> torch.Tensor:
        """Compute (s,) float32 cross-entropy at the target positions.

        Samples are compared by the plain one; labels are smoothed in what is trained on alone.
        """
        logits = logits_of(outputs)[targets.rows, targets.columns].float()
        return functional.cross_entropy(
            logits, targets.tokens, reduction="none", label_smoothing=smoothing
        )

    def _passes_freely(self) -> bool:
        """Return true if one rank alone can make a pass: not where parameters are sharded."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)  # type: ignore[attr-defined]

    def _auxiliary(self, outputs: Any) -> Any:  # noqa: ANN401
        """Return the loss that balances a mixture of experts; 0 for other models."""
        if (loss := getattr(outputs, "aux_loss", None)) is None:
            return 0.0
        return loss * float(getattr(self.model.config, "router_aux_loss_coef", 0.0))

    def _counts_items(self, items: Any) -> bool:  # noqa: ANN401
        """Return true if the plain loss is a sum over tokens divided by the step's count."""
        accepts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None  # type: ignore[attr-defined]
        return bool(accepts and items is not None)

    def _after(self, stats: SampleStats) -> None:
        """Collect what training saw; hand over a whole step."""
        self._seen.append(stats)
        self._micro += 1
        if self._micro == self.current_gradient_accumulation_steps:  # type: ignore[attr-defined]
            rows = None if self._micro_rows is None else np.concatenate(self._micro_rows)
            self.after_step(SampleStats.joined(self._seen), rows)

    def _domains_of(self, rows: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64] | None:
        domains = self.run.data.domains
        return None if rows is None or domains is None else domains.of_row[rows]

    def _warn_once(self, kind: str, message: str) -> None:
        if kind not in self._warned and self.run.ranks.leads:
            _log.warning("%s (logged once)", message)
        self._warned.add(kind)
