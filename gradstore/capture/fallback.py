"""Per-sample gradients of parameters that no hook covers: norms, biases, magnitudes, embeddings.

`torch.func.vmap(grad)` over the rows where the model can be traced that way; row by row through
plain autograd where it cannot (SDPA masks branch on their data, for one).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradstore.capture.limits import ran_out_of_memory
from gradstore.capture.losses import IGNORED_LABEL, RowLoss, Targets, logits_of, model_inputs
from gradstore.capture.modelstate import without_autocast

_log = logging.getLogger(__name__)


class RowwiseGradients:
    """Gradients (b, numel) of chosen parameters of a frozen model, without hooks.

    Args:
        model: the model, frozen and in eval mode.
        loss: its loss.
    """

    def __init__(self, model: nn.Module, loss: RowLoss) -> None:
        self._model = model
        self._loss = loss
        self._vmap_works = True

    def __call__(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> tuple[list[Tensor], Tensor]:
        """Compute one (b, numel) float32 block per parameter, and the rows' losses (b,).

        Raises that memory ran out, whichever way the rows took.
        """
        if self._vmap_works and targets.grid[0] > 1:
            try:
                return self._all_rows(parameters, batch, targets)
            except RuntimeError as error:
                if ran_out_of_memory(error):  # of so many rows: fewer may fit
                    raise
                # functorch reports each operation it cannot batch as a RuntimeError; a real fault
                # of the model shows again, by itself, in the row-by-row pass.
                self._vmap_works = False
                _log.debug("vmap is not possible for this model: %s", error)
        return self._row_by_row(parameters, batch, targets)

    def _all_rows(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> tuple[list[Tensor], Tensor]:
        wanted = {id(parameter): index for index, parameter in enumerate(parameters)}
        values = {
            name: parameter.detach()
            for name, parameter in self._model.named_parameters()
            if id(parameter) in wanted
        }
        order = [wanted[id(p)] for _, p in self._model.named_parameters() if id(p) in wanted]
        rows = targets.grid[0]
        inputs = {**model_inputs(batch), "labels": batch["labels"]}
        dims = {key: 0 if _per_row(value, rows) else None for key, value in inputs.items()}

        def row_loss(given: dict[str, Tensor], row: dict[str, Tensor], count: Tensor) -> Tensor:
            own = {
                key: value if dims[key] is None else value.unsqueeze(0)
                for key, value in row.items()
                if key != "labels"
            }
            logits = logits_of(functional_call(self._model, given, (), own))[0, :-1].float()
            total = F.cross_entropy(
                logits, row["labels"][1:], ignore_index=IGNORED_LABEL, reduction="sum"
            )
            return total / count.clamp(min=1)

        with torch.enable_grad():
            gradients, losses = vmap(grad_and_value(row_loss), in_dims=(None, dims, 0))(
                values, inputs, targets.counts
            )
        blocks: list[Tensor] = [torch.empty(0)] * len(order)
        for index, block in zip(order, gradients.values(), strict=True):
            blocks[index] = block.detach().reshape(rows, -1).float()
        losses = torch.where(targets.counts > 0, losses.detach(), torch.nan)
        return blocks, losses

    def _row_by_row(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> tuple[list[Tensor], Tensor]:
        rows = targets.grid[0]
        device = targets.counts.device
        blocks = [torch.zeros(rows, p.numel(), device=p.device) for p in parameters]
        losses = torch.full((rows,), torch.nan, device=device)
        for row, count in enumerate(targets.counts.tolist()):
            if count == 0:
                continue
            own = {
                key: value[row : row + 1] if _per_row(value, rows) else value
                for key, value in batch.items()
            }
            loss, gradients = self._one_row(parameters, own)
            losses[row] = loss
            for block, gradient in zip(blocks, gradients, strict=True):
                if gradient is not None:  # None: the parameter took no part
                    block[row] = gradient.reshape(-1)
        return blocks, losses

    def _one_row(
        self, parameters: Sequence[nn.Parameter], row: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        try:
            for parameter in parameters:
                parameter.requires_grad = True
            with torch.enable_grad():
                loss, _ = self._loss(row, Targets.of(row))
            if not loss.requires_grad:
                return loss, [None] * len(parameters)
            with without_autocast(loss.device):
                gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            return loss.detach(), gradients
        finally:
            for parameter in parameters:
                parameter.requires_grad = False


def _per_row(value: object, rows: int) -> bool:
    return isinstance(value, Tensor) and value.shape[:1] == (rows,)
