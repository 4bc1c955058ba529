"""Model + rows -> projected gradient features, unit by unit into a store.

The way of one batch: token ids (b, t) -> gradient blocks (b, p_block) from `GradientCapture` ->
feature blocks from `FeatureMap` -> accumulated projection (b, d). The full (b, p) matrix exists
only where a dense projection wants many rows at once (`buffer_bytes` bounds it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import Accumulator, ProjectionSpec
from torch import Tensor, nn

from gradstore.disk.generation_writer import GenerationWriter
from gradstore.errors import BadInput
from gradstore.features import FeatureMap, FeatureSpec
from gradstore.gradients import GradientCapture, ParameterSlot
from gradstore.layout import RowStatus
from gradstore.moments import AdamMoments

Batch = Mapping[str, Tensor]
Collate = Callable[[list[Any]], Batch]

#: Rows a dense projection multiplies at once: fewer leave the matrix product starved (BLAS, tensor
#: cores) because the random matrix has to be made again for every group of rows.
DENSE_ROWS = 64


@dataclass(frozen=True)
class FeatureRows:
    """Features of some rows, on the host.

    Attributes:
        rows: (b,) int64, positions in the processed dataset.
        features: (b, d) float32; NaN where the row cannot be used.
        norm: (b,) float32, Euclidean norm of the feature before projection.
        status: (b,) uint8, `RowStatus`.
        tokens: (b,) int32, target tokens.
    """

    rows: npt.NDArray[np.int64]
    features: npt.NDArray[np.float32]
    norm: npt.NDArray[np.float32]
    status: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.int32]


@dataclass
class ExportSummary:
    """What one pass over a data set did."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    status_counts: dict[str, int] = field(default_factory=dict)


def plan_batches(
    lengths: Sequence[int] | npt.NDArray[np.int64], token_budget: int, max_rows: int = 1024
) -> list[npt.NDArray[np.int64]]:
    """Group positions 0..n-1 by length so that a padded batch holds at most `token_budget` tokens.

    Args:
        lengths: (n,) tokens of each row.
        token_budget: rows x longest row of a batch; a single longer row makes a batch of its own.
        max_rows: upper bound on the rows of a batch.

    Returns:
        Position arrays, longest rows first, so that a batch too large for memory fails at once.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    batches, start = [], 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = start + max(1, min(max_rows, token_budget // longest))
        batches.append(order[start:stop])
        start = stop
    return batches


def export_features(
    model: nn.Module,
    batches: Iterable[tuple[npt.NDArray[np.int64], Batch]],
    *,
    features: FeatureSpec,
    projection: ProjectionSpec,
    moments: AdamMoments | None = None,
    buffer_bytes: int = 2 << 30,
) -> Generator[FeatureRows, None, None]:
    """Features of every row of `batches`, in the order they come.

    The model is frozen and hooked until the generator is exhausted or closed.

    Args:
        model: any module whose forward takes a batch without labels and returns `.logits`.
        batches: (row positions (b,), tensors `input_ids`, `labels`, ... (b, t)).
        features: how a gradient becomes a feature.
        projection: p must equal the model's trainable parameters.
        moments: Adam moments by parameter name, for features that need them.
        buffer_bytes: memory for whole gradients when a dense projection gathers rows.

    Yields:
        One `FeatureRows` per projected group of rows.
    """
    with GradientCapture(model) as capture:
        device = next(model.parameters()).device
        exporter = _Exporter(capture, device, features, projection, moments, buffer_bytes)
        if projection.method == "sjlt":
            yield from (exporter.streamed(rows, batch) for rows, batch in batches)
        else:
            yield from exporter.gathered(batches)


def export_generation(
    model: nn.Module,
    dataset: Sequence[Any],
    collate: Collate,
    writer: GenerationWriter,
    *,
    features: FeatureSpec,
    projection: ProjectionSpec,
    moments: AdamMoments | None = None,
    lengths: Sequence[int] | npt.NDArray[np.int64],
    token_budget: int = 2048,
    longest: int | None = None,
    max_bad_fraction: float = 0.01,
    on_rows: Callable[[int], None] | None = None,
) -> ExportSummary:
    """Export the units of a generation that are not done yet; does not commit.

    Args:
        model: the model whose gradients are taken.
        dataset: n rows; `dataset[i]` is what `collate` takes a list of.
        collate: rows -> padded batch with `labels` (b, t).
        writer: from `StoreWriter.begin`.
        features: how a gradient becomes a feature.
        projection: with the effective seed of this generation.
        moments: Adam moments where `features` needs them.
        lengths: (n,) tokens of each row.
        token_budget: tokens of a padded batch.
        longest: rows with more tokens get status `TOO_LONG` (the model's position limit).
        max_bad_fraction: share of non-finite rows above which the export stops.
        on_rows: called with the number of rows each time some are done.

    Raises:
        BadInput: more than `max_bad_fraction` of the rows have non-finite gradients.
    """
    began = time.perf_counter()
    summary = ExportSummary()
    non_finite: list[int] = []
    # Rows of an interrupted export count too: else running again would slip past the limit.
    earlier = writer.bad_counts["non_finite"]
    sizes = np.asarray(lengths, dtype=np.int64)
    for unit in list(writer.pending):
        fits = np.arange(unit.start, unit.stop)
        if longest is not None:
            fits = fits[sizes[fits] <= longest]
        planned = [fits[b] for b in plan_batches(sizes[fits], token_budget)]
        done = _UnitRows(unit.start, unit.stop, projection.d)
        batches = ((rows, collate([dataset[int(i)] for i in rows])) for rows in planned)
        parts = export_features(
            model, batches, features=features, projection=projection, moments=moments
        )
        with closing(parts):  # or a traceback would keep the model frozen
            for part in parts:
                done.put(part)
                if on_rows is not None:
                    on_rows(len(part.rows))
        non_finite += (unit.start + np.flatnonzero(done.status == RowStatus.NON_FINITE)).tolist()
        check_bad_rows(earlier + len(non_finite), non_finite, len(dataset), max_bad_fraction)
        writer.write_unit(unit.index, done.features, done.norm, done.status, done.tokens)
        summary.rows += unit.stop - unit.start
        summary.tokens += int(sizes[fits].sum())
        for status, count in zip(*np.unique(done.status, return_counts=True), strict=True):
            name = RowStatus(int(status)).name.lower()
            summary.status_counts[name] = summary.status_counts.get(name, 0) + int(count)
    summary.seconds = time.perf_counter() - began
    return summary


class _UnitRows:
    """Host arrays of one unit, filled in any order; a row never filled stays TOO_LONG."""

    def __init__(self, start: int, stop: int, d: int) -> None:
        n = stop - start
        self.start = start
        self.features = np.full((n, d), np.nan, dtype=np.float32)
        self.norm = np.full(n, np.nan, dtype=np.float32)
        self.status = np.full(n, RowStatus.TOO_LONG, dtype=np.uint8)
        self.tokens = np.zeros(n, dtype=np.int32)

    def put(self, part: FeatureRows) -> None:
        at = part.rows - self.start
        self.features[at] = part.features
        self.norm[at] = part.norm
        self.status[at] = part.status
        self.tokens[at] = part.tokens


class _Exporter:
    """Joins capture, feature map and projection for one pass."""

    def __init__(
        self,
        capture: GradientCapture,
        device: torch.device,
        features: FeatureSpec,
        projection: ProjectionSpec,
        moments: AdamMoments | None,
        buffer_bytes: int,
    ) -> None:
        if projection.p != capture.p:
            raise BadInput(
                f"the projection is made for p={projection.p} parameters, "
                f"the model trains {capture.p}."
            )
        self.capture = capture
        self.projection = projection
        self.device = device
        self.map = FeatureMap(features, capture.slots, moments, device=self.device)
        self.gather_rows = max(1, min(DENSE_ROWS, buffer_bytes // (4 * capture.p)))

    def streamed(self, rows: npt.NDArray[np.int64], batch: Batch) -> FeatureRows:
        """Project each block as it leaves the backward pass; nothing of size (b, p) is kept."""
        b = len(rows)
        accumulator = Accumulator(self.projection, b, device=self.device)
        squares = torch.zeros(b, dtype=torch.float64, device=self.device)

        def sink(slot: ParameterSlot, gradient: Tensor) -> None:
            feature = self.map.apply_(slot, gradient)
            squares.add_(_sum_of_squares(feature))
            accumulator.add(feature, slot.start)

        stats = self.capture.capture(self._move(batch), sink)
        return _finish(rows, accumulator.result(), squares, stats.target_tokens)

    def gathered(
        self, batches: Iterable[tuple[npt.NDArray[np.int64], Batch]]
    ) -> Iterator[FeatureRows]:
        """Collect whole features of several small batches, then project them together."""
        group: list[tuple[npt.NDArray[np.int64], Tensor]] = []
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

            def sink(slot: ParameterSlot, gradient: Tensor, part: Tensor = part) -> None:
                part[:, slot.start : slot.start + slot.numel] = self.map.apply_(slot, gradient)

            stats = self.capture.capture(self._move(batch), sink)
            group.append((rows, stats.target_tokens))
            filled += len(rows)
        if filled:
            yield self._project(buffer[:filled], group)

    def _project(
        self, features: Tensor, group: list[tuple[npt.NDArray[np.int64], Tensor]]
    ) -> FeatureRows:
        accumulator = Accumulator(self.projection, len(features), device=self.device)
        accumulator.add(features, 0)
        rows = np.concatenate([rows for rows, _ in group])
        tokens = torch.cat([tokens for _, tokens in group])
        return _finish(rows, accumulator.result(), _sum_of_squares(features), tokens)

    def _move(self, batch: Batch) -> dict[str, Any]:
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _sum_of_squares(x: Tensor) -> Tensor:
    """(b, k) float32 -> (b,) float64; a row's own dot product, so one row's NaN stays its own."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1)
    return norms.double().square_()


def row_status(norm: Tensor, target_tokens: Tensor) -> Tensor:
    """What a row is worth, from its feature's norm (b,) and its target tokens (b,): (b,) uint8."""
    status = torch.full_like(target_tokens, RowStatus.OK, dtype=torch.uint8)
    status[norm == 0] = RowStatus.ZERO_NORM
    status[~torch.isfinite(norm)] = RowStatus.NON_FINITE
    status[target_tokens == 0] = RowStatus.MASKED
    return status


def check_bad_rows(bad: int, named: Sequence[int], rows: int, max_bad_fraction: float) -> None:
    """Stop where too many rows have a non-finite gradient.

    Args:
        bad: how many there are.
        named: some of them, for the message.
        rows: of the whole data set.
        max_bad_fraction: the share that is still accepted.

    Raises:
        BadInput: there are more; names up to ten.
    """
    if bad > max_bad_fraction * rows:
        raise BadInput(
            f"{bad} of {rows} rows have a non-finite gradient, more than "
            f"max_bad_fraction={max_bad_fraction:g} allows; the first: "
            f"{list(named[:10])}. Look at these rows, lower the learning rate, or raise "
            "max_bad_fraction."
        )


def _finish(
    rows: npt.NDArray[np.int64], projected: Tensor, squares: Tensor, target_tokens: Tensor
) -> FeatureRows:
    norm = squares.sqrt()
    # A projected row may overflow where its norm does not.
    finite = torch.isfinite(projected).all(dim=1)
    status = row_status(torch.where(finite, norm, torch.nan), target_tokens)
    projected[status != RowStatus.OK] = torch.nan
    return FeatureRows(
        rows=rows,
        features=projected.cpu().numpy(),
        norm=norm.float().cpu().numpy(),
        status=status.cpu().numpy(),
        tokens=target_tokens.to(torch.int32).cpu().numpy(),
    )
