"""Filling a generation: computed units are written by the one process that holds the lock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gradkernels import ProjectionSpec
from torch import Tensor, nn

from gradstore.export.embeddings import compute_embedding_unit
from gradstore.export.features import FeatureSpec
from gradstore.export.moments import AdamMoments
from gradstore.export.pooling import Embed, attention_tokens
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batch, Collate, Lengths, UnitFeatures, check_bad_rows
from gradstore.format.layout import EMBEDDING, RowStatus
from gradstore.store.generation_writer import GenerationWriter


def export_embeddings(
    embed: Embed,
    dataset: Sequence[Any],
    collate: Collate,
    writer: GenerationWriter,
    *,
    lengths: Lengths,
    token_budget: int = 2048,
    longest: int | None = None,
    tokens_of: Callable[[Batch], Tensor] = attention_tokens,
    max_bad_fraction: float = 0.01,
    on_rows: Callable[[int], None] | None = None,
) -> ExportSummary:
    """Write the units of a generation of embeddings that are not done yet; does not commit.

    Args:
        embed: batch -> (b, d) vectors; they are brought to length 1.
        dataset: n rows; `dataset[i]` is what `collate` takes a list of.
        collate: rows -> padded batch.
        writer: from `SpaceWriter.begin` or `StoreWriter.begin`.
        lengths: (n,) tokens of each row.
        token_budget: tokens of a padded batch.
        longest: rows with more tokens get status `TOO_LONG`; None where `collate` cuts them.
        tokens_of: batch -> (b,) usable tokens; a row with none is `MASKED`.
        max_bad_fraction: share of non-finite rows above which the export stops.
        on_rows: called with the number of rows each time some are done.

    Raises:
        BadInput: more than `max_bad_fraction` of the rows have a non-finite embedding, or `embed`
            gives another shape than (b, d).
    """
    sink = UnitSink(writer, max_bad_fraction=max_bad_fraction)
    sizes = np.asarray(lengths, dtype=np.int64)
    for unit in list(writer.pending):
        sink.write(
            compute_embedding_unit(
                embed,
                dataset,
                collate,
                unit,
                dim=writer.plan.dim,
                lengths=sizes,
                token_budget=token_budget,
                longest=longest,
                tokens_of=tokens_of,
                on_rows=on_rows,
            )
        )
    return sink.summary


def export_generation(
    model: nn.Module,
    dataset: Sequence[Any],
    collate: Collate,
    writer: GenerationWriter,
    *,
    features: FeatureSpec,
    projection: ProjectionSpec,
    moments: AdamMoments | None = None,
    lengths: Lengths,
    token_budget: int = 2048,
    longest: int | None = None,
    max_bad_fraction: float = 0.01,
    on_rows: Callable[[int], None] | None = None,
) -> ExportSummary:
    """Export the units of a generation that are not done yet; does not commit.

    Args:
        model: the model whose gradients are taken.
        dataset: n rows.
        collate: rows -> padded batch with `labels` (b, t).
        writer: from `StoreWriter.begin`.
        features: how a gradient becomes a feature.
        projection: with the effective seed of this generation.
        moments: Adam moments where `features` needs them.
        lengths: (n,) tokens of each row.
        token_budget: tokens of a padded batch.
        longest: rows with more tokens get status `TOO_LONG`.
        max_bad_fraction: share of non-finite rows above which the export stops.
        on_rows: called with the number of rows each time some are done.

    Raises:
        BadInput: more than `max_bad_fraction` of the rows have non-finite gradients.
    """
    sink = UnitSink(writer, max_bad_fraction=max_bad_fraction)
    sizes = np.asarray(lengths, dtype=np.int64)
    for unit in list(writer.pending):
        sink.write(
            compute_unit(
                model,
                dataset,
                collate,
                unit,
                features=features,
                projection=projection,
                moments=moments,
                lengths=sizes,
                token_budget=token_budget,
                longest=longest,
                on_rows=on_rows,
            )
        )
    return sink.summary


@dataclass
class ExportSummary:
    """What one pass over a data set did."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    status_counts: dict[str, int] = field(default_factory=dict)


class UnitSink:
    """Writes computed units of one generation and stops where too many rows are bad.

    The rows of all units given count together, whoever computed them, and so do those of an
    earlier, interrupted export.
    """

    def __init__(self, writer: GenerationWriter, *, max_bad_fraction: float = 0.01) -> None:
        """Begins a pass; does not commit.

        Args:
            writer: from `StoreWriter.begin`.
            max_bad_fraction: share of non-finite rows above which `write` stops.
        """
        self.summary = ExportSummary()
        self._writer = writer
        self._limit = max_bad_fraction
        self._earlier = writer.bad_counts["non_finite"]
        self._non_finite: list[int] = []
        self._what = EMBEDDING if writer.plan.record.feature == EMBEDDING else "gradient"
        self._began = time.perf_counter()

    def write(self, done: UnitFeatures) -> None:
        """Publishes one pending unit; when this returns it survives a crash.

        Raises:
            BadInput: more than `max_bad_fraction` of the rows are non-finite, or the unit is not
                pending.
        """
        bad = done.unit.start + np.flatnonzero(done.status == RowStatus.NON_FINITE)
        self._non_finite += bad.tolist()
        check_bad_rows(
            self._earlier + len(self._non_finite),
            sorted(self._non_finite),
            len(self._writer.plan.rows),
            self._limit,
            self._what,
        )
        self._writer.write_unit(done.unit.index, done.features, done.norm, done.status, done.tokens)
        summary = self.summary
        summary.rows += len(done.status)
        summary.tokens += done.model_tokens
        for status, count in zip(*np.unique(done.status, return_counts=True), strict=True):
            name = RowStatus(int(status)).name.lower()
            summary.status_counts[name] = summary.status_counts.get(name, 0) + int(count)
        summary.seconds = time.perf_counter() - self._began
