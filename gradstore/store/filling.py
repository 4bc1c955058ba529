"""Filling a generation: computed units are written by a process that holds the store's lock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from gradstore.errors import BadInput, expect
from gradstore.export.units import UnitFeatures, check_bad_rows
from gradstore.format.layout import EMBEDDING, RowStatus
from gradstore.format.plans import UnitRange
from gradstore.store.generation import Generation
from gradstore.store.generation_writer import GenerationWriter

#: Reasons by status.
_UNUSABLE = {
    "zero_norm": "with a gradient that is zero",
    "non_finite": "with a gradient that is not finite",
    "masked": "masked, without a target token",
    "too_long": "longer than the model's context",
    "forgotten": "removed on request",
}


@dataclass
class ExportSummary:
    """Summary of one pass over a data set."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    status_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointExport:
    """The generations of one checkpoint, committed.

    Attributes:
        train: name of the generation of the training rows; "" where there are none.
        targets: one name per target set.
        target_rows: rows of all target sets.
        tokens: tokens that went through the model in this pass; 0 where everything was reused.
        seconds: duration of the passes.
    """

    train: str
    targets: tuple[str, ...]
    target_rows: int
    tokens: int
    seconds: float


class UnitSink:
    """Sink that writes computed units of one generation and stops where too many rows are bad.

    The rows of all units given count together, whichever process computed them, and so do those of
    an earlier, interrupted export and those that other workers have finished.
    """

    def __init__(self, writer: GenerationWriter, *, max_bad_fraction: float = 0.01) -> None:
        """Begin a pass; do not commit.

        Args:
            writer: from `StoreWriter.begin`.
            max_bad_fraction: share of non-finite rows above which `write` stops.
        """
        expect(hasattr(writer, "bad_counts"), "writer", writer, "what StoreWriter.begin returns")
        self.summary = ExportSummary()
        self._writer = writer
        self._limit = max_bad_fraction
        self._non_finite: list[int] = []
        self._what = EMBEDDING if writer.plan.record.feature == EMBEDDING else "gradient"
        self._began = time.perf_counter()

    def check(self, more: int = 0) -> None:
        """Stop where too many rows are bad; once nothing is pending, those of other workers too.

        Args:
            more: non-finite rows that are not written yet.
        """
        check_bad_rows(
            self._writer.bad_counts["non_finite"] + more,
            sorted(self._non_finite),
            len(self._writer.plan.rows),
            self._limit,
            self._what,
        )

    def write(self, done: UnitFeatures) -> None:
        """Publish one pending unit; when this returns it survives a crash.

        Raises:
            BadInput: more than `max_bad_fraction` of the rows are non-finite, or the unit is not
                pending.
        """
        bad = done.unit.start + np.flatnonzero(done.status == RowStatus.NON_FINITE)
        self._non_finite += bad.tolist()
        self.check(len(bad))
        self._writer.write_unit(
            done.unit.index, done.features, done.norm, done.status, done.tokens, done.loss
        )
        summary = self.summary
        summary.rows += len(done.status)
        summary.tokens += done.model_tokens
        for status, count in zip(*np.unique(done.status, return_counts=True), strict=True):
            name = RowStatus(int(status)).name.lower()
            summary.status_counts[name] = summary.status_counts.get(name, 0) + int(count)
        summary.seconds = time.perf_counter() - self._began


def check_usable(generation: Generation) -> None:
    """Refuse a committed set of rows that says nothing.

    Raises:
        BadInput: none of its rows is usable; counts the reasons.
    """
    if not generation.usable.any():
        name = f"target set {generation.set!r}" if generation.set else "the training set"
        counts = generation.status_counts()
        reasons = [f"{counts[status]:,} {why}" for status, why in _UNUSABLE.items()
                   if counts.get(status)]  # fmt: skip
        raise BadInput(
            f"{name} has no usable row among its {generation.rows:,}: "
            f"{', '.join(reasons)}. Give it rows that the model can learn from."
        )


def fill(
    writer: GenerationWriter,
    compute: Callable[[UnitRange], UnitFeatures],
    *,
    max_bad_fraction: float = 0.01,
) -> ExportSummary:
    """Compute and write the units of a generation that are not done yet; does not commit.

    A worker among others computes those that it is handed, and returns when all are done.

    Args:
        writer: from `StoreWriter.begin` or `SpaceWriter.begin`.
        compute: unit -> its features, such as
            `partial(compute_unit, model, batches, recipe)` or
            `partial(compute_embedding_unit, embed, batches, dim=writer.plan.dim)`.
        max_bad_fraction: share of non-finite rows above which it stops.

    Raises:
        BadInput: more than `max_bad_fraction` of the rows are non-finite.
    """
    sink = UnitSink(writer, max_bad_fraction=max_bad_fraction)
    for unit in writer.claimed():
        sink.write(compute(unit))
    sink.check()
    return sink.summary
