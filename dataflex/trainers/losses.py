"""Weighted losses of an optimizer step, with one denominator over micro-batches and ranks.

Mixed in before a seam (and thus before the Trainer). `contributors` weight samples; their weights
are multiplied. Without any, the loss is the Trainer's own, untouched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from dataflex.trainers.seam import Seam, random_states_kept
from dataflex.weighters.base import LossContributor, MeasuredBatch, WeightContext
from dataflex.window import FloatArray, Weighted, coefficients, summary
from gradstore.capture.losses import Targets, logits_of
from gradstore.capture.modelstate import borrowed


@dataclass
class SampleStats:
    """What one rank knows of the samples of some micro-batches; n samples.

    Attributes:
        loss_sums: (n,) float64, summed token losses.
        tokens: (n,) float64, target tokens.
        measured: one (n, m) float64 per contributor that measures.
    """

    loss_sums: FloatArray
    tokens: FloatArray
    measured: list[FloatArray]

    @staticmethod
    def joined(parts: Sequence[SampleStats]) -> SampleStats:
        """Samples of several parts, end to end."""
        columns = zip(*(part.measured for part in parts), strict=True)
        return SampleStats(
            np.concatenate([part.loss_sums for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            [np.concatenate(column) for column in columns],
        )


class LossSeam(Seam):
    """Weights samples of a step; keeps the plain loss where nothing weights."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self._micro = 0
        self._step_tokens = 0.0
        self._micro_rows: list[npt.NDArray[np.int64]] | None = None
        #: Coefficients of this rank's micro-batches, where the window was scored beforehand.
        self._scored: list[FloatArray] | None = None
        #: What the training passes of this step saw, for `after_step`.
        self._seen: list[SampleStats] = []

    # -- what a subclass decides ------------------------------------------------------------------

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """Who weights the samples of a step; empty: the plain loss."""
        return ()

    def observes(self, step: int) -> bool:
        """Whether `after_step` wants the losses of a step that nobody weights."""
        return False

    def rows_of_step(self, step: int) -> list[npt.NDArray[np.int64]] | None:
        """Positions of this rank's micro-batches, None where the stock loader serves."""
        return None

    def after_step(self, seen: SampleStats, rows: npt.NDArray[np.int64] | None) -> None:
        """Called on every rank when all micro-batches of a step have been through the model.

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
        self._micro, self._scored, self._seen = 0, None, []
        contributors = self.contributors(step) if batches else ()
        if not batches or not (contributors or self.observes(step)):
            return batches, items
        self._micro_rows = self.rows_of_step(step)
        if contributors:
            with random_states_kept():
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
        """The weighted loss of a micro-batch in training; evaluation keeps the plain one."""
        plain = partial(super().compute_loss, model)  # type: ignore[misc]
        step = int(self.state.global_step)
        contributors = self.contributors(step) if model.training else ()
        if not contributors:
            if not (model.training and self.observes(step)):
                return plain(inputs, return_outputs=return_outputs,
                             num_items_in_batch=num_items_in_batch)  # fmt: skip
            loss, outputs = plain(
                dict(inputs), return_outputs=True, num_items_in_batch=num_items_in_batch
            )
            with torch.no_grad():
                self._after(self._statistics(inputs, outputs, ()))
            return (loss, outputs) if return_outputs else loss
        outputs = model(**_without_labels(inputs), **_hidden_option(contributors))
        targets = Targets.of(inputs)
        token_losses = self._token_losses(outputs, targets)
        sums = torch.zeros(targets.grid[0], device=token_losses.device)
        sums = sums.index_add(0, targets.rows, token_losses)
        stats = self._statistics(inputs, outputs, contributors, token_losses.detach())
        each = self._coefficients_of(stats, contributors, step)
        loss = (torch.as_tensor(each, dtype=torch.float32, device=sums.device) * sums).sum()
        loss = loss * self._scale(num_items_in_batch)
        self._after(stats)
        return (loss, outputs) if return_outputs else loss

    # -- the parts --------------------------------------------------------------------------------

    def _count(self, batches: Sequence[Mapping[str, torch.Tensor]], items: Any) -> float:  # noqa: ANN401
        """Target tokens of the step over all ranks: the plain trainer's own denominator."""
        if items is not None and self.args.average_tokens_across_devices:
            return float(items)
        own = sum(float((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        return float(self.ranks.summed(np.array([own]))[0])

    def _score(
        self,
        batches: Sequence[Mapping[str, torch.Tensor]],
        contributors: Sequence[LossContributor],
        step: int,
    ) -> list[FloatArray]:
        """Coefficients of every micro-batch, from one pass in eval mode over all of them."""
        parts = []
        with borrowed(self.model, freeze=False), torch.no_grad():
            for batch in batches:
                inputs = self._prepare_inputs(dict(batch))  # type: ignore[attr-defined]
                with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    outputs = self.model(**_without_labels(inputs), **_hidden_option(contributors))
                parts.append(self._statistics(inputs, outputs, contributors))
        rows = None if self._micro_rows is None else np.concatenate(self._micro_rows)
        each = self._weigh(SampleStats.joined(parts), contributors, step, rows)
        return np.split(each, np.cumsum([len(part.tokens) for part in parts])[:-1])

    def _coefficients_of(
        self, stats: SampleStats, contributors: Sequence[LossContributor], step: int
    ) -> FloatArray:
        """(b,) coefficients of the micro-batch at hand."""
        if self._scored is not None:
            return self._scored[self._micro]
        rows = None if self._micro_rows is None else self._micro_rows[self._micro]
        return self._weigh(stats, contributors, step, rows)

    def _weigh(
        self,
        stats: SampleStats,
        contributors: Sequence[LossContributor],
        step: int,
        rows: npt.NDArray[np.int64] | None,
    ) -> FloatArray:
        """(n,) coefficients of this rank's samples, weighted together with those of all ranks."""
        held = self.ranks.gather(lambda: (stats, rows))
        everyone = SampleStats.joined([part for part, _ in held])
        positions = None if rows is None else np.concatenate([r for _, r in held if r is not None])
        tokens = everyone.tokens.astype(np.int64)
        with np.errstate(invalid="ignore"):
            losses = everyone.loss_sums / everyone.tokens
        columns = iter(everyone.measured)
        weights = np.ones(len(tokens))
        for contributor in contributors:
            context = WeightContext(
                run=self.context,
                step=step,
                tokens=tokens,
                rows=positions,
                domains=self._domains_of(positions),
                measured=next(columns) if contributor.measures else None,
            )
            weights = weights * np.asarray(contributor.weights(losses, context), np.float64)
        relative = any(c.relative for c in contributors)
        self.tell(summary(weights))
        start = sum(len(part.tokens) for part, _ in held[: self.ranks.rank])
        each = coefficients(Weighted(weights, relative), tokens, self._step_tokens)
        return each[start : start + len(stats.tokens)]

    def _statistics(
        self,
        inputs: Mapping[str, torch.Tensor],
        outputs: Any,  # noqa: ANN401
        contributors: Sequence[LossContributor],
        token_losses: torch.Tensor | None = None,
    ) -> SampleStats:
        targets = Targets.of(inputs)
        if token_losses is None:
            token_losses = self._token_losses(outputs, targets)
        sums = torch.zeros(targets.grid[0], dtype=torch.float64, device=token_losses.device)
        sums.index_add_(0, targets.rows, token_losses.double())
        measured = []
        for contributor in contributors:
            if contributor.measures:
                layer = contributor.hidden_layer
                hidden = None if layer is None else outputs.hidden_states[layer].detach()
                batch = MeasuredBatch(inputs, targets, token_losses, hidden)
                with torch.no_grad():
                    measured.append(np.asarray(contributor.measure(batch), dtype=np.float64))
        counts = targets.counts.double().cpu().numpy()
        return SampleStats(sums.cpu().numpy(), counts, measured)

    def _token_losses(self, outputs: Any, targets: Targets) -> torch.Tensor:  # noqa: ANN401
        """(s,) float32 cross-entropy at the target positions."""
        logits = logits_of(outputs)[targets.rows, targets.columns].float()
        return functional.cross_entropy(
            logits,
            targets.tokens,
            reduction="none",
            label_smoothing=float(self.args.label_smoothing_factor),
        )

    def _scale(self, items: Any) -> float:  # noqa: ANN401
        """Undo what the Trainer and DDP will divide a micro-batch's loss by."""
        accepts = self.model_accepts_loss_kwargs and items is not None  # type: ignore[attr-defined]
        divides = not accepts and self.compute_loss_func is None  # type: ignore[attr-defined]
        steps = self.current_gradient_accumulation_steps if divides else 1  # type: ignore[attr-defined]
        return float(self.ranks.world * steps)

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


def _without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model gets: with labels it would compute a loss of its own."""
    return {k: v for k, v in inputs.items() if k not in ("labels", "domain_id")}


def _hidden_option(contributors: Sequence[LossContributor]) -> dict[str, bool]:
    """Ask the model for hidden states only where somebody reads them."""
    wanted = any(c.measures and c.hidden_layer is not None for c in contributors)
    return {"output_hidden_states": True} if wanted else {}
