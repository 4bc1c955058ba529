"""Per-sample gradients of parameters that no hook covers: norms, biases, magnitudes, embeddings.

`torch.func.vmap(grad)` over the rows where the model can be traced that way; row by row through
plain autograd where it cannot (SDPA masks branch on their data, for one).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from gradstore.capture.limits import ran_out_of_memory, release_memory
from gradstore.capture.losses import IGNORED_LABEL, RowLoss, Targets, logits_of, model_inputs
from gradstore.capture.modelstate import without_autocast
from gradstore.capture.rows import check_apart, row_axis, row_of
from gradstore.capture.slots import ParameterSlot

_log = logging.getLogger(__name__)

Made = tuple[list[Tensor], Tensor]

#: Most that a row's loss is multiplied by: elements of a mean gradient up to 64 fit float16 then.
MOST_SCALE = 1024.0


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
        self._at_once: int | None = None

    def __call__(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> Made:
        """Compute one (b, numel) float32 block per parameter, and the rows' losses (b,).

        Blocks are of the scaled losses where `targets` has a scale, losses are not. Here autograd
        adds a row's tokens up in float16 itself: so the scale is at most `MOST_SCALE` until then.

        Raises:
            BadInput: an input of several rows is not divided by row.

        Raises that memory ran out, if it did for a single row or for the blocks.
        """
        check_apart(batch, targets.grid)
        if targets.scale is None:
            return self._made(parameters, batch, targets)
        scale = targets.scale.clamp(max=MOST_SCALE)
        blocks, losses = self._made(parameters, batch, targets.scaled(scale))
        for block in blocks:
            block.mul_((targets.scale / scale).to(block.device)[:, None])
        return blocks, losses

    def _made(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> Made:
        while self._vmap_works and targets.grid[0] > 1:
            made = self._vectorised(parameters, batch, targets)
            if made is not None:
                return made
        return self._row_by_row(parameters, batch, targets)

    def _vectorised(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> Made | None:
        """Try `vmap`; None if it has to be tried with fewer rows at once, or not again."""
        rows = targets.grid[0]
        at_once = min(rows, self._at_once or rows)
        try:
            return self._all_rows(parameters, batch, targets, at_once)
        except RuntimeError as error:
            ran_out = ran_out_of_memory(error)
            if ran_out and at_once == 1:
                raise
            if not ran_out:
                # functorch reports each operation it cannot batch as a RuntimeError; a real fault
                # of the model shows again, by itself, in the row-by-row pass.
                self._vmap_works = False
                _log.debug("vmap is not possible for this model: %s", error)
        if ran_out:  # here, where nothing holds what filled the memory
            self._at_once = at_once // 2
            release_memory()
        return None

    def _all_rows(
        self,
        parameters: Sequence[nn.Parameter],
        batch: Mapping[str, Tensor],
        targets: Targets,
        at_once: int,
    ) -> Made:
        """Take the gradients of all rows, vectorised over some of them at once."""
        wanted = {id(parameter): index for index, parameter in enumerate(parameters)}
        named = [(n, p) for n, p in self._model.named_parameters() if id(p) in wanted]
        values = {name: parameter.detach() for name, parameter in named}
        order = [wanted[id(parameter)] for _, parameter in named]
        rows = targets.grid[0]
        inputs = {**model_inputs(batch), "labels": _labels(targets)}
        axes = {key: row_axis(key, value, targets.grid) for key, value in inputs.items()}

        def row_loss(given: dict[str, Tensor], row: dict[str, Tensor], share: Tensor) -> Tensor:
            own = {
                key: value if (axis := axes[key]) is None else value.unsqueeze(axis)
                for key, value in row.items()
                if key != "labels"
            }
            logits = logits_of(functional_call(self._model, given, (), own))[0, :-1].float()
            total = F.cross_entropy(
                logits, row["labels"][1:], ignore_index=IGNORED_LABEL, reduction="sum"
            )
            return total / share

        each = vmap(grad_and_value(row_loss), in_dims=(None, axes, 0))
        shares = targets.unscaled(targets.counts.clamp(min=1))
        blocks = [torch.empty(rows, p.numel(), device=p.device) for p in parameters]
        losses = torch.empty(rows, device=shares.device)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            some = {
                key: value if (axis := axes[key]) is None else value.narrow(axis, start, count)
                for key, value in inputs.items()
            }
            with torch.enable_grad():
                gradients, found = each(values, some, shares[start : start + count])
            losses[start : start + count] = found.detach()
            for index, gradient in zip(order, gradients.values(), strict=True):
                blocks[index][start : start + count] = gradient.detach().reshape(count, -1)
        losses = torch.where(targets.counts > 0, targets.unscaled(losses), torch.nan)
        return blocks, losses

    def _row_by_row(
        self, parameters: Sequence[nn.Parameter], batch: Mapping[str, Tensor], targets: Targets
    ) -> Made:
        rows = targets.grid[0]
        device = targets.counts.device
        blocks = [torch.zeros(rows, p.numel(), device=p.device) for p in parameters]
        losses = torch.full((rows,), torch.nan, device=device)
        for row, count in enumerate(targets.counts.tolist()):
            if count == 0:
                continue
            own = batch if rows == 1 else row_of(batch, row, targets.grid)
            scale = None if targets.scale is None else targets.scale[row : row + 1]
            loss, gradients = self._one_row(parameters, own, scale)
            losses[row] = loss
            for block, gradient in zip(blocks, gradients, strict=True):
                if gradient is not None:  # None: the parameter took no part
                    block[row] = gradient.reshape(-1)
        return blocks, targets.unscaled(losses)

    def _one_row(
        self, parameters: Sequence[nn.Parameter], row: Mapping[str, Tensor], scale: Tensor | None
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        try:
            for parameter in parameters:
                parameter.requires_grad = True
            with torch.enable_grad():
                loss, _ = self._loss(row, replace(Targets.of(row), scale=scale))
            if not loss.requires_grad:
                return loss, [None] * len(parameters)
            with without_autocast(loss.device):
                gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
            return loss.detach(), gradients
        finally:
            for parameter in parameters:
                parameter.requires_grad = False


def tell_of_fallback(slots: Collection[ParameterSlot], of: str) -> None:
    """Say which parameters take a further pass.

    Args:
        slots: theirs; of none nothing is said.
        of: what hooks cover.
    """
    if slots:
        names = sorted(slot.name for slot in slots)
        _log.info(
            "%d trainable parameters are not plain %s (%s%s): their gradients take "
            "a further pass, row by row where the model cannot be vectorised",
            len(names), of, ", ".join(names[:3]), ", ..." if len(names) > 3 else "",
        )  # fmt: skip


def _labels(targets: Targets) -> Tensor:
    """Return (b, t) labels of the target tokens alone: what predicts from padding has none."""
    labels = targets.tokens.new_full(targets.grid, IGNORED_LABEL)
    labels[targets.rows, targets.columns + 1] = targets.tokens
    return labels
