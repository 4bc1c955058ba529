"""Fit of Kronecker factors: moments of what enters and leaves LoRA matrices, in a pass over rows.

The tokens of a row are those up to the last that predicts a target: on later ones, and on padding,
no loss depends. Whether a token's gradient is zero would not do to tell them apart: that of the
first token's attention query is, up to rounding. A parameter that hooks don't cover (a bias, DoRA's
magnitudes) gets the diagonal of its gradients' second moment. A side of a matrix that is too wide
for the memory (`full_width`) has moments of its coordinates alone, which take the place of its
eigenvectors.

Letters: b rows of a batch, t tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from gradstore.capture.losses import Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput, expect
from gradstore.export.kronecker import BlockFactors, Kind, KroneckerFactors
from gradstore.export.smaller import computed_whole
from gradstore.export.units import Batch, RowBatch

#: Memory of all moments, beyond which the widest sides are diagonal.
MOST_BYTES = 4 << 30


def fit_factors(
    model: nn.Module,
    batches: Iterable[RowBatch],
    kind: Kind = "ekfac",
    *,
    most_bytes: int = MOST_BYTES,
) -> KroneckerFactors:
    """Fit the factors of everything that a model trains, at its present state.

    The gradients are those of the rows' own labels, so that H is the empirical Fisher matrix, as
    `fisher` has it of stored features. Labels drawn from the model's predictions, whose matrix is
    the Fisher itself, scored no better (docs/adr/0016-kronecker.md).

    A forward and backward of the rows for `kfac`, and another one for the eigenvalues of `ekfac`.

    Args:
        model: whose gradients are taken, in eval mode.
        batches: training rows by lot (`Batches.sample`), which are kept meanwhile; where memory
            runs out, the fit begins again with smaller ones.
        kind: kfac | ekfac.
        most_bytes: memory of the factors on the model's device.

    Raises:
        BadInput: another kind, or none of the rows has a target token, or the model has no adapter.
    """
    expect(kind in get_args(Kind), "kind", kind, " or ".join(get_args(Kind)))
    return computed_whole(batches, lambda pairs: _fitted(model, pairs, kind, most_bytes))


def _fitted(
    model: nn.Module, batches: Iterable[RowBatch], kind: Kind, most_bytes: int
) -> KroneckerFactors:
    """Fit factors in batches that are given; see `fit_factors`."""
    device = next(model.parameters()).device
    held: list[Batch] = [_moved(batch, device) for _, batch in batches]
    held = [batch for batch in held if int(Targets.of(batch).counts.sum())]
    rows = sum(int((Targets.of(batch).counts > 0).sum()) for batch in held)
    expect(rows > 0, "sampled training rows", rows, "rows with target tokens")
    with GradientCapture(model) as capture:
        if capture.dense:
            raise BadInput(
                f"{kind} factors are fitted of LoRA matrices, and the model has no adapter: take "
                "preconditioner none (or fisher or subspace, of stored features)"
            )
        moments = _Moments(capture.slots, full_width(capture.slots, most_bytes), device)
        for batch in held:
            moments.start_batch(batch)
            capture.capture(batch, moments.add_squares, moments.add_tokens)
            moments.end_batch()
        blocks = {slot.name: moments.block(slot, rows) for slot in capture.slots}
        if kind == "ekfac":
            squares = {name: torch.zeros_like(block.values) for name, block in blocks.items()}

            def sink(slot: ParameterSlot, gradient: Tensor) -> None:
                along = blocks[slot.name].along(_finite(gradient))
                squares[slot.name] += along.square().sum(dim=0)

            for batch in held:
                capture.capture(batch, sink)
            blocks = {
                name: BlockFactors(block.outputs, block.inputs, squares[name] / rows)
                for name, block in blocks.items()
            }
    return KroneckerFactors(kind, blocks, rows)


def full_width(slots: Sequence[ParameterSlot], most_bytes: int = MOST_BYTES) -> int:
    """Return the widest side of a matrix whose moments are whole; wider ones are diagonal.

    The widest for which all whole sides, of n² float32 each, fit into `most_bytes`.
    """
    widths = sorted(n for slot in slots if len(slot.shape) == 2 for n in slot.shape)
    taken, widest = 0, 0
    for width in sorted(set(widths)):
        taken += 4 * width**2 * widths.count(width)
        if taken > most_bytes:
            break
        widest = width
    return widest


def whole_bytes(slots: Sequence[ParameterSlot], most_bytes: int = MOST_BYTES) -> int:
    """Compute the bytes of the factors: eigenvectors of whole sides, and an eigenvalue a number."""
    widest = full_width(slots, most_bytes)
    sides = (n for slot in slots if len(slot.shape) == 2 for n in slot.shape if n <= widest)
    return 4 * (sum(n * n for n in sides) + sum(slot.numel for slot in slots))


class _Moments:
    """Second moments of inputs and output gradients, by parameter, summed over tokens."""

    def __init__(self, slots: Sequence[ParameterSlot], widest: int, device: torch.device) -> None:
        self._widest = widest
        self._sides: dict[str, list[Tensor]] = {}  # of outputs (out, out), of inputs (in, in)
        self._tokens: dict[str, Tensor] = {}
        self._squares = {s.name: torch.zeros(s.numel, device=device) for s in slots}
        self._whole = set(self._squares)
        self._called: set[str] = set()
        self._tokens_of_batch = torch.zeros(0, 0, dtype=torch.bool)

    def start_batch(self, batch: Batch) -> None:
        """Find the tokens (b, t) that count."""
        targets = Targets.of(batch)
        last = targets.counts.new_full((targets.grid[0],), -1)
        last = last.scatter_reduce(0, targets.rows, targets.columns, "amax")
        self._tokens_of_batch = torch.arange(targets.grid[1], device=last.device) <= last[:, None]
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape == targets.grid:
            self._tokens_of_batch &= mask != 0

    def add_squares(self, slot: ParameterSlot, gradient: Tensor) -> None:
        """Add the squares of the rows' gradients (b, numel)."""
        self._squares[slot.name] += _finite(gradient).square().sum(dim=0)

    def add_tokens(self, slot: ParameterSlot, x: Tensor, gradient: Tensor) -> None:
        """Add inputs (b, t, in) and output gradients (b, t, out) of one call of a matrix."""
        # A matrix that doesn't see the batch's tokens (of an image, say) counts all of its own.
        fits = self._tokens_of_batch.shape == x.shape[:2]
        counts = self._tokens_of_batch if fits else x.new_ones(x.shape[:2], dtype=torch.bool)
        counts, x, gradient = (
            counts.flatten(),
            x.flatten(0, 1).float(),
            gradient.flatten(0, 1).float(),
        )
        # A token that is not finite stops no fit: the export counts and refuses its row.
        counts = counts & torch.isfinite(x).all(dim=1) & torch.isfinite(gradient).all(dim=1)
        found = [self._moment(torch.where(counts[:, None], each, 0.0)) for each in (gradient, x)]
        name = slot.name
        self._called.add(name)
        if name in self._sides:
            found = [old + new for old, new in zip(self._sides[name], found, strict=True)]
        self._sides[name] = found
        self._tokens[name] = self._tokens.get(name, 0) + counts.sum()

    def end_batch(self) -> None:
        """Take the diagonal for matrices whose tokens a batch did not show."""
        self._whole &= self._called
        self._called = set()

    def block(self, slot: ParameterSlot, rows: int) -> BlockFactors:
        """Return eigenvectors, and the eigenvalues of `kfac`, after all batches of `rows` rows."""
        name = slot.name
        if name not in self._whole:
            shape = slot.shape if len(slot.shape) == 2 else (1, slot.numel)
            return BlockFactors(None, None, (self._squares[name] / rows).reshape(shape))
        outputs, inputs = self._sides.pop(name)
        over = self._tokens[name].clamp(min=1)
        (outer, left), (inner, right) = (
            _eigen(outputs.double() / rows), _eigen(inputs.double() / over),
        )  # fmt: skip
        return BlockFactors(left, right, (outer[:, None] * inner).float())

    def _moment(self, tokens: Tensor) -> Tensor:
        """Compute the second moment of (b * t, n), summed up: (n, n), or (n,) where n is wide."""
        if tokens.shape[1] > self._widest:
            return tokens.square().sum(dim=0)
        return tokens.T @ tokens


def _eigen(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues (n,) float64 and vectors (n, n) float32 of (n, n), or of a diagonal."""
    if moment.dim() == 1:
        return moment, None
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0), vectors.float().contiguous()


def _finite(gradient: Tensor) -> Tensor:
    """Return (b, numel) with zeros for rows that are not finite."""
    return torch.where(torch.isfinite(gradient).all(dim=1, keepdim=True), gradient, 0.0)


def _moved(batch: Batch, device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
