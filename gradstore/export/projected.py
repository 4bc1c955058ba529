"""Model + rows -> projected gradient features, group by group or as the rows of one unit.

The way of one batch: token ids (b, t) -> gradient blocks (b, p_block) from `GradientCapture` ->
feature blocks from `FeatureMap` -> accumulated projection (b, d). The full (b, p) matrix exists
only where a dense projection wants many rows at once (`buffer_bytes` bounds it), and not of models
without an adapter for which that would be too much. On a CUDA device the blocks of neighbours are
joined (`gradstore.export.joined`), and the projection makes features, and their norms, as it reads
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import Accumulator, ProjectionSpec
from gradkernels.dispatch import fuses
from gradkernels.methods import entry_of
from torch import Tensor, nn

from gradstore.capture.hooks import Sink
from gradstore.capture.limits import free_on
from gradstore.capture.losses import BatchStats
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.export.features import FeatureSpec, Recipe
from gradstore.export.joined import JoiningSink, Run, runs_of
from gradstore.export.moments import AdamMoments
from gradstore.export.smaller import computed_parts
from gradstore.export.units import (
    Batch,
    Batches,
    FeatureRows,
    OnRows,
    RowBatch,
    UnitFeatures,
    join_unit,
    row_status,
)
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange

#: Rows a dense projection multiplies at once: fewer underuse the matrix product (BLAS, tensor
#: cores) because the random matrix has to be made again for every group of rows.
DENSE_ROWS = 64
#: Memory for whole gradients when a dense projection gathers rows, on a CPU and in the RAM of TRAK.
BUFFER_BYTES = 2 << 30
#: The same on a CUDA device: a part of what is free when a pass begins, and at most so much. With
#: r = 16 on all linear layers an 8B model has p = 41.9 M: 64 rows of it are 10 GiB.
FREE_SHARE, MOST_BUFFER_BYTES = 4, 16 << 30
#: Types of devices on which features are made by the projection. On a CPU they are made first.
FUSED = ("cuda",)


def export_features(
    model: nn.Module,
    batches: Iterable[RowBatch],
    *,
    features: FeatureSpec,
    projection: ProjectionSpec,
    moments: AdamMoments | None = None,
    buffer_bytes: int | None = None,
) -> Generator[FeatureRows, None, None]:
    """Yield the features of every row of `batches`, in the order of the batches.

    The model is frozen and hooked until the generator is exhausted or closed.

    Args:
        model: any module whose forward takes a batch without labels and returns `.logits`.
        batches: (row positions (b,), tensors `input_ids`, `labels`, ... (b, t)).
        features: how a gradient becomes a feature.
        projection: p must equal the model's trainable parameters.
        moments: Adam moments by parameter name, for features that need them.
        buffer_bytes: memory for whole gradients when a dense projection gathers rows; None goes by
            the device (`buffer_bytes_on`).

    Yields:
        One `FeatureRows` per projected group of rows.
    """
    recipe = Recipe(features, projection, moments)
    if buffer_bytes is not None:
        expect_whole(buffer_bytes, "buffer_bytes")
    yield from exported(model, batches, recipe, buffer_bytes)


def exported(
    model: nn.Module,
    batches: Iterable[RowBatch],
    recipe: Recipe,
    buffer_bytes: int | None = None,
) -> Generator[FeatureRows, None, None]:
    """Yield the features of every row, as `export_features`, by a recipe that may be used again."""
    with GradientCapture(model, recipe.features.modules) as capture:
        device = next(model.parameters()).device
        if buffer_bytes is None:
            buffer_bytes = buffer_bytes_on(device, recipe.projection)
        exporter = _Exporter(capture, device, recipe, buffer_bytes)
        pairs = _pairs(batches)
        if exporter.streams:
            yield from (exporter.streamed(rows, batch) for rows, batch in pairs)
        else:
            yield from exporter.gathered(pairs)


def compute_unit(
    model: nn.Module,
    batches: Batches,
    recipe: Recipe,
    unit: UnitRange,
    on_rows: OnRows | None = None,
) -> UnitFeatures:
    """Compute the features of one unit: a function of its rows and the model, on whatever rank.

    Needs no store; `UnitSink` (gradstore.store.filling) writes the result where the lock is held.

    Args:
        model: the model whose gradients are taken.
        batches: the rows; their batches have `labels` (b, t).
        recipe: how gradients become features (k, d); one for all units of a generation.
        unit: which rows.
        on_rows: called with the number of rows each time some are done.
    """
    expect(isinstance(recipe, Recipe), "recipe", recipe, "Recipe(features, projection, moments)")
    expect(isinstance(batches, Batches), "batches", batches, "Batches(rows, collate, lengths)")
    export = partial(exported, model, recipe=recipe)
    with closing(computed_parts(batches, unit, export)) as parts:
        return join_unit(unit, recipe.projection.d, parts, batches.tokens(unit), on_rows)


def _pairs(batches: Iterable[RowBatch]) -> Iterator[RowBatch]:
    """Yield the batches, each with the positions of its rows; raise BadInput for anything else."""
    wanted = "pairs: positions of the rows (b,) and a mapping of tensors (b, t)"
    expect(isinstance(batches, Iterable) and not isinstance(batches, Mapping), "batches", batches,
           wanted)  # fmt: skip
    for pair in batches:
        fits = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Mapping)
        expect(fits, "a batch", pair, wanted)
        yield pair


class _Kept(NamedTuple):
    """Rows of a batch whose features, or gradients and their factors (b,), wait in the buffer."""

    rows: npt.NDArray[np.int64]
    stats: BatchStats
    factors: Tensor | None


class _Exporter:
    """Capture, feature map and projection, joined for one pass."""

    def __init__(
        self,
        capture: GradientCapture,
        device: torch.device,
        recipe: Recipe,
        buffer_bytes: int,
    ) -> None:
        projection = recipe.projection
        if projection.p != capture.p:
            raise BadInput(
                f"the projection is made for p={projection.p} parameters, "
                f"the model trains {capture.p}: make one with p={capture.p}."
            )
        self.capture = capture
        self.projection = projection
        self.device = device
        self.map = recipe.map_of(capture.slots, device)
        # A curvature mixes parameters: no projection can do that as it reads them.
        self.fused = device.type in FUSED and recipe.features.curvature is None
        if self.fused:  # test its kernels now, not inside the first backward
            fuses(projection, device, self.map.kind)
        # Whole weights are large by themselves, and come in parts.
        self.joins = self.fused and not capture.dense
        hooked = capture.hooked if self.joins else ()
        self.runs = runs_of(capture.slots, self.map, hooked) if self.fused else []
        self.gather_rows = waiting_rows(projection, buffer_bytes, dense=capture.dense)
        self.streams = not self.gather_rows

    def streamed(self, rows: npt.NDArray[np.int64], batch: Batch) -> FeatureRows:
        """Project each block as it leaves the backward pass; nothing of size (b, p) is kept."""
        b = len(rows)
        accumulator = Accumulator(self.projection, b, device=self.device, squares=self.fused)
        squares = torch.zeros(b, dtype=torch.float64, device=self.device)
        tokens = self.map.tokens_of(batch)

        def project(slot: ParameterSlot, gradient: Tensor) -> None:
            feature = self.map.apply_(slot, gradient, tokens)
            squares.add_(sum_of_squares(feature))
            accumulator.add(feature, slot.start)

        sink: Sink = project
        if self.fused:
            factors = self.map.factors(tokens)
            sink = self._by_runs(lambda run, g: accumulator.add(g, run.start, run.feature, factors))
        stats = self.capture.capture(self._move(batch), sink)
        if self.fused:
            squares = accumulator.squares()
        return finished_rows(rows, accumulator.result(), squares, stats)

    def gathered(self, batches: Iterable[RowBatch]) -> Iterator[FeatureRows]:
        """Collect several small batches, features or their gradients, and project them together."""
        group: list[_Kept] = []
        buffer = torch.empty((self.gather_rows, self.capture.p), device=self.device)
        filled = 0
        for rows, batch in batches:
            if filled and filled + len(rows) > len(buffer):
                yield self._project(buffer[:filled], group)
                group, filled = [], 0
            if len(rows) > len(buffer):  # enough rows by itself, or too large to be kept
                yield self.streamed(rows, batch)
                continue
            part = buffer[filled : filled + len(rows)]
            tokens = self.map.tokens_of(batch)
            stats = self.capture.capture(self._move(batch), self._keeping(part, tokens))
            group.append(_Kept(rows, stats, self.map.factors(tokens) if self.fused else None))
            filled += len(rows)
        if filled:
            yield self._project(buffer[:filled], group)

    def _keeping(self, part: Tensor, tokens: Tensor | None) -> Sink:
        """Return a sink that writes features, or gradients, into their columns of (b, p)."""

        def keep(start: int, block: Tensor) -> None:
            part[:, start : start + block.shape[1]] = block

        if self.fused:
            return self._by_runs(lambda run, gradient: keep(run.start, gradient))
        return lambda slot, gradient: keep(slot.start, self.map.apply_(slot, gradient, tokens))

    def _by_runs(self, take: Callable[[Run, Tensor], None]) -> Sink:
        """Return a sink that hands on gradients of runs; each part of whole weights is its own."""
        if self.joins:
            return JoiningSink(self.runs, take)
        return lambda slot, gradient: take(self._alone(slot), gradient)

    def _alone(self, slot: ParameterSlot) -> Run:
        return Run((slot,), self.map.of(slot))

    def _project(self, kept: Tensor, group: list[_Kept]) -> FeatureRows:
        accumulator = Accumulator(self.projection, len(kept), device=self.device,
                                  squares=self.fused)  # fmt: skip
        if self.fused:
            factors = [each.factors for each in group if each.factors is not None]
            joined = torch.cat(factors) if factors else None
            for run in self.runs:
                block = kept[:, run.start : run.stop]
                accumulator.add(block, run.start, run.feature, joined)
        else:
            accumulator.add(kept, 0)
        squares = accumulator.squares() if self.fused else sum_of_squares(kept)
        rows = np.concatenate([each.rows for each in group])
        stats = BatchStats(
            torch.cat([each.stats.loss for each in group]),
            torch.cat([each.stats.target_tokens for each in group]),
        )
        return finished_rows(rows, accumulator.result(), squares, stats)

    def _move(self, batch: Batch) -> dict[str, Any]:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def buffer_bytes_on(device: torch.device, projection: ProjectionSpec) -> int:
    """Return the memory for whole gradients that wait for a dense projection.

    `BUFFER_BYTES` on a CPU, and for TRAK's own code, which takes them to the RAM. On a CUDA device
    a fourth of what is free (`FREE_SHARE`), 16 GiB at most: rows are gathered until there are
    `DENSE_ROWS`, and the batches that are captured meanwhile need memory, too.
    """
    if device.type != "cuda" or projection.method == "trak":
        return BUFFER_BYTES
    return max(1, min(MOST_BUFFER_BYTES, free_on(device) // FREE_SHARE))


def gathered_rows(p: int, buffer_bytes: int = BUFFER_BYTES) -> int:
    """Count the rows of p parameters that are gathered for a dense projection."""
    return max(1, min(DENSE_ROWS, buffer_bytes // (4 * p)))


def waiting_rows(projection: ProjectionSpec, buffer_bytes: int, *, dense: bool) -> int:
    """Count the rows whose gradients wait for others; 0 where each block is projected as it comes.

    Args:
        projection: p is that of the model.
        buffer_bytes: memory for them.
        dense: whether they are of whole weights, which come in parts so that (b, p) need not fit
            into memory.
    """
    method, rows = entry_of(projection.method), gathered_rows(projection.p, buffer_bytes)
    few = rows < DENSE_ROWS and dense
    return 0 if method.sparse or (few and not method.whole) else rows


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum squares per row, (b, k) float32 -> (b,) float64; one row's NaN stays in its own row."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.double().square_()


def finished_rows(
    rows: npt.NDArray[np.int64], projected: Tensor, squares: Tensor, stats: BatchStats
) -> FeatureRows:
    """Build host rows with status from projected (b, d), squared norms (b,) and the batch's own."""
    norm = squares.sqrt()
    # A projected row may overflow where its norm does not.
    finite = torch.isfinite(projected).all(dim=1)
    status = row_status(torch.where(finite, norm, torch.nan), stats.target_tokens)
    projected[status != RowStatus.OK] = torch.nan
    # One copy for all: on a GPU each waits for it. Counts below 2**24 are exact in float32.
    beside = (norm, status, stats.target_tokens, stats.loss)
    packed = torch.cat([projected, torch.stack([x.float() for x in beside], dim=1)], dim=1)
    host = packed.cpu().numpy()
    d = projected.shape[1]
    return FeatureRows(
        rows=rows,
        features=host[:, :d],
        norm=host[:, d],
        status=host[:, d + 1].astype(np.uint8),
        tokens=host[:, d + 2].astype(np.int32),
        loss=host[:, d + 3],
    )
