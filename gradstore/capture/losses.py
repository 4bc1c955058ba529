"""Each row's own loss: mean cross-entropy over its target tokens, in float32.

Letters: b batch, t tokens, s selected positions (those that predict a target token), h hidden
size, V vocabulary. The output layer is the largest matrix product of a small model and the loss
reads only the selected positions, so both run on (s, h) instead of (b, t, h) where that is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradstore.capture.crossentropy import weighted_cross_entropy
from gradstore.errors import BadInput, expect

IGNORED_LABEL = -100
#: What collators and the mixers put beside the model's own inputs.
_NOT_MODEL_INPUTS = frozenset({"labels", "shift_labels", "num_items_in_batch", "domain_id"})


@dataclass(frozen=True)
class BatchStats:
    """Statistics of a batch's rows other than their gradients.

    Attributes:
        loss: (b,) float32, mean over the row's target tokens; nan where it has none.
        target_tokens: (b,) int64, how many target tokens each row has.
    """

    loss: Tensor
    target_tokens: Tensor


@dataclass(frozen=True)
class Targets:
    """The positions of a batch that predict a target token, row by row.

    Attributes:
        rows: (s,) int64.
        columns: (s,) int64; position c predicts the label at c + 1.
        tokens: (s,) int64, the labels.
        counts: (b,) int64, target tokens per row.
        grid: (b, t), the shape of the batch.
        scale: (b,) float32, that rows' losses are multiplied by; None leaves them as they are.
    """

    rows: Tensor
    columns: Tensor
    tokens: Tensor
    counts: Tensor
    grid: tuple[int, int]
    scale: Tensor | None = None

    @staticmethod
    def of(batch: Mapping[str, Tensor]) -> Targets:
        """Find the target positions of `batch["labels"]` (b, t).

        Padding, by an `attention_mask` (b, t), predicts none.

        Raises:
            BadInput: there are no labels, or they are not (b, t).
        """
        expect(isinstance(batch, Mapping), "a batch", batch, "a mapping of tensors (b, t)")
        labels = batch.get("labels")
        expect(labels is None or isinstance(labels, Tensor), "labels", labels, "a tensor (b, t)")
        if labels is None:
            raise BadInput("a batch without `labels` has no loss; its keys: " + ", ".join(batch))
        if labels.dim() != 2:
            raise BadInput(
                f"labels must be (rows, tokens), got shape {tuple(labels.shape)}; "
                "give the collator's"
            )
        shifted = labels[:, 1:]
        chosen = shifted != IGNORED_LABEL
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == labels.shape:
            # Padding predicts nothing: where it is on the left, it would the row's first token.
            chosen = chosen & (mask[:, :-1] != 0)
        rows, columns = chosen.nonzero(as_tuple=True)
        grid = (labels.shape[0], labels.shape[1])
        return Targets(rows, columns, shifted[rows, columns], chosen.sum(1), grid)

    def weights(self) -> Tensor:
        """Return (s,) float32: one over the target tokens of a position's row, times its scale."""
        weights = self.counts[self.rows].float().reciprocal()
        return weights if self.scale is None else weights * self.scale[self.rows]

    def scaled(self, scale: Tensor) -> Targets:
        """Return the same targets of rows whose losses are multiplied by (b,)."""
        return replace(self, scale=scale)

    def unscaled(self, values: Tensor) -> Tensor:
        """Divide (b,) numbers by the rows' scales."""
        return values if self.scale is None else values / self.scale

    def row_means(self, token_loss: Tensor) -> Tensor:
        """Average (s,) token losses per row: (b,) float32, nan where a row has no target."""
        sums = torch.zeros(self.grid[0], device=token_loss.device)
        sums.index_add_(0, self.rows, token_loss)
        return sums / self.counts  # 0 / 0 is the nan wanted


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop keys that are not model inputs; with labels the model would compute its own loss."""
    return {key: value for key, value in batch.items() if key not in _NOT_MODEL_INPUTS}


def logits_of(output: Any) -> Tensor:  # noqa: ANN401 - models return what they like
    """Find the logits in a model's output: the output, its `.logits`, or its first part."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    first = output[0] if logits is None else logits
    if not isinstance(first, Tensor):
        raise BadInput(
            f"no logits in the model's output of type {type(output).__name__}; "
            "return a tensor, or an output with .logits"
        )
    return first


class RowLoss:
    """Computation of a batch's losses with one forward.

    Args:
        model: a causal language model, its logits (b, t, V).
    """

    #: True where logits at gathered positions equal the gathered logits; asked once per model.
    _verified: ClassVar[WeakKeyDictionary[nn.Module, bool]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = _plain_head(model)

    def __call__(self, batch: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Compute the rows' summed loss, with its graph, and (s,) token losses without a graph.

        The sum is of scaled losses where `targets` has a scale.
        """
        logits, alone = self._logits(batch, targets)
        return weighted_cross_entropy(logits, targets.tokens, targets.weights(), overwrites=alone)

    def logits(self, batch: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Compute the logits (s, V) at the targets, with their graph."""
        return self._logits(batch, targets)[0]

    def _logits(self, batch: Mapping[str, Tensor], targets: Targets) -> tuple[Tensor, bool]:
        """Compute the logits; say whether nothing else reads them, not even the graph."""
        gathered = self._gathered_logits(batch, targets)
        # Those of chosen positions are a copy.
        return (self._full_logits(batch, targets), True) if gathered is None else gathered

    def _full_logits(self, batch: Mapping[str, Tensor], targets: Targets) -> Tensor:
        logits = logits_of(self._model(**model_inputs(batch)))
        if tuple(logits.shape[:2]) != targets.grid:
            raise BadInput(
                f"logits of shape {tuple(logits.shape)} for labels of shape {targets.grid}: "
                "only causal language models with one logit row per token are supported"
            )
        return logits[targets.rows, targets.columns]  # (s, V)

    def _gathered_logits(
        self, batch: Mapping[str, Tensor], targets: Targets
    ) -> tuple[Tensor, bool] | None:
        """Return (s, V) logits, or None if the output layer can't run on chosen positions alone.

        With them, whether they are the layer's own output, which a linear layer does not keep.
        """
        head = self._head
        if head is None or self._verified.get(self._model) is False:
            return None
        with _head_at(head, targets) as seen:
            logits = logits_of(self._model(**model_inputs(batch)))
        if len(seen) == 1 and seen[0].shape[:2] == logits.shape[:2] == (1, len(targets.rows)):
            own, logits = logits is seen[0], logits.flatten(0, 1)
            if own or self._verified.get(self._model):
                return logits, own
            # Something follows the output layer (soft capping, scaling, a cast): compare once.
            self._verified[self._model] = self._equals_full(head, batch, targets)
        else:
            self._verified[self._model] = False
        return (logits, False) if self._verified[self._model] else None

    @torch.no_grad()
    def _equals_full(self, head: nn.Module, batch: Mapping[str, Tensor], targets: Targets) -> bool:
        # Both without gradients: with them layers may round otherwise (`gradstore.capture.lora`).
        with _head_at(head, targets):
            gathered = logits_of(self._model(**model_inputs(batch))).flatten(0, 1)
        full = self._full_logits(batch, targets).float()
        # Products of another shape round differently: a few units in the last place of the dtype.
        tolerance = 32 * torch.finfo(gathered.dtype).eps
        scale = full[full.isfinite()].abs().max().item() if full.isfinite().any() else 0.0
        return torch.allclose(
            gathered.float(), full, rtol=tolerance, atol=tolerance * scale, equal_nan=True
        )


def target_losses(model: nn.Module, batch: Mapping[str, Tensor], targets: Targets) -> Tensor:
    """Compute (s,) float32 token losses at the targets; the caller sets mode and autograd."""
    if len(targets.rows) == 0:
        return torch.zeros(0, device=targets.counts.device)
    return RowLoss(model)(batch, targets)[1]


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """Return the output layer if it is a plain linear layer, which works position by position."""
    getter: Callable[[], nn.Module | None] | None = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward:
        return head
    return None


@contextmanager
def _head_at(head: nn.Module, targets: Targets) -> Iterator[list[Tensor]]:
    """Feed the output layer only the target positions, as (1, s, h); yield its outputs."""
    seen: list[Tensor] = []

    def gather(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or tuple(args[0].shape[:2]) != targets.grid:
            return None
        return (args[0][targets.rows, targets.columns].unsqueeze(0), *args[1:])

    def note(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output)

    handles = [head.register_forward_pre_hook(gather), head.register_forward_hook(note)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
