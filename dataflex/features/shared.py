"""One generation, made by all ranks: each computes units of one plan, rank 0 writes and commits.

Units go to whichever rank is free, so that none idles while any are pending. One process holds
the store, so there is one lock and nothing to merge; the units, and with them every feature, are
those a single process would have computed. A process that has no other ranks writes what it
computes; it may be one of several workers, which share the store instead. A unit is written while
the next one is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from gradkernels import ProjectionSpec

from dataflex.data.rows import Rows
from dataflex.features.settings import FeatureSettings
from dataflex.models.passes import longest_row
from dataflex.models.precision import autocast
from dataflex.run.context import RunContext
from dataflex.run.log import OnRows, Watch, progress
from dataflex.run.queue import share_out
from dataflex.run.ranks import Ranks
from gradstore.capture.limits import token_budget
from gradstore.export.budget import MOST, found_budget, is_measured, tell_budget
from gradstore.export.units import Batches, UnitFeatures
from gradstore.format.layout import generation_bytes
from gradstore.format.plans import UnitRange
from gradstore.store.filling import ExportSummary, UnitSink
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.space_writer import SpaceWriter
from gradstore.store.writer import StoreWriter

Compute = Callable[[UnitRange, OnRows], UnitFeatures]


def gradient_budget(run: RunContext, settings: FeatureSettings, projection: ProjectionSpec) -> int:
    """Return the padded tokens of a gradient batch, the same on every rank; collective.

    The user's, or on a CUDA device what the fullest one has room for (`gradstore.export.budget`).

    Args:
        run: whose training rows are looked at.
        settings: of the features.
        projection: of the model's p.
    """
    if settings.tokens_per_batch is not None or not is_measured(run.model):
        return settings.tokens_per_batch or token_budget(run.model)
    rows = run.data.train
    batches = Batches(rows.dataset, run.collate, rows.lengths, MOST, longest_row(run.model, rows))

    def find() -> int:
        with autocast(run.model, run.autocast):
            return found_budget(
                run.model, batches, settings.train_features, projection, settings.unit_rows
            )

    tokens = min(run.ranks.gather(find))
    if run.ranks.leads:
        tell_budget(tokens)
    return tokens


class _OpenGeneration:
    """State that rank 0 holds while units arrive."""

    def __init__(self, writer: GenerationWriter, max_bad_fraction: float) -> None:
        self.writer = writer
        self.sink = UnitSink(writer, max_bad_fraction=max_bad_fraction, behind=1)

    def committed(self) -> ExportSummary:
        """Commit once all units are written, if not too many rows are bad; say what was done."""
        self.sink.settle()
        self.writer.commit()
        return self.sink.summary


def export_shared(
    ranks: Ranks,
    name: str,
    begin: Callable[[], GenerationWriter],
    compute: Compute,
    *,
    max_bad_fraction: float,
    shows_progress: bool,
    lengths: npt.NDArray[np.int64],
    watch: Watch | None = None,
) -> ExportSummary:
    """Compute the pending units of a generation on all ranks, write and commit it on rank 0.

    Collective. A generation that was committed before costs nothing.

    Args:
        ranks: this process among those of the run.
        name: of the generation, for the progress bar.
        begin: opens the generation for writing; called on rank 0 alone.
        compute: unit and progress callback -> its features, the same on whatever rank.
        max_bad_fraction: share of non-finite rows above which the export stops.
        shows_progress: whether this process draws a bar.
        lengths: (n,) tokens of the generation's rows, which say how long it takes.
        watch: who is told of each unit, where this process has no other ranks.

    Returns:
        What the pass did, on every rank.

    Raises:
        StoreError: on every rank, whatever failed on one.
    """
    if ranks.world == 1:
        shown = shows_progress and watch is None
        return _export_here(
            name, begin(), compute, max_bad_fraction, shown=shown, lengths=lengths, watch=watch
        )
    held: list[_OpenGeneration] = []
    with contextlib.ExitStack() as sinks:

        def plan() -> list[UnitRange]:
            held.append(_OpenGeneration(begin(), max_bad_fraction))
            sinks.enter_context(held[0].sink)
            return list(held[0].writer.pending)

        pending = ranks.decide(plan)
        with progress(
            name,
            _costs(pending, lengths),
            shown=shows_progress and len(pending) > 0,
            told=ranks.leads,
            stored_bytes=_stored_bytes(held[0].writer) if ranks.leads else 0,
        ) as advance:
            share_out(
                ranks,
                pending,
                lambda unit: compute(unit, _looking(held[0].sink if held else None, advance)),
                lambda done: held[0].sink.write(done),
                lambda unit: advance(unit.stop - unit.start),
            )
        return ranks.decide(lambda: held[0].committed())


def _export_here(
    name: str,
    writer: GenerationWriter,
    compute: Compute,
    max_bad_fraction: float,
    *,
    shown: bool,
    lengths: npt.NDArray[np.int64],
    watch: Watch | None,
) -> ExportSummary:
    """Compute, write and commit a generation in this process, as a worker among others too."""
    costs = _costs(writer.pending, lengths)
    shown = shown and len(costs) > 0
    if watch is not None:
        watch.begins(name, len(costs))

    def written(unit: UnitRange) -> None:
        if watch is not None:
            watch.finished(name, unit.index, unit.stop - unit.start)

    sink = UnitSink(writer, max_bad_fraction=max_bad_fraction, behind=1, written=written)
    bar = progress(name, costs, shown=shown, stored_bytes=_stored_bytes(writer))
    with sink, bar as advance:
        for unit in sink.claimed(elsewhere=advance):
            if watch is not None:
                watch.takes(name, unit.index)
            sink.write(compute(unit, _looking(sink, advance)))
    writer.commit()
    return sink.summary


def _looking(sink: UnitSink | None, advance: OnRows) -> OnRows:
    """Look with every batch whether units are written: a unit takes minutes, a full disk none."""
    if sink is None:
        return advance

    def look_and_advance(rows: int) -> None:
        sink.look()
        advance(rows)

    return look_and_advance


def _costs(units: Sequence[UnitRange], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return what each row costs, in the order of the units; a unit takes its longest first."""
    longest_first = [-np.sort(-lengths[unit.start : unit.stop]) for unit in units]
    return np.concatenate([np.empty(0, np.int64), *longest_first])


def keep_text(run: RunContext, writer: StoreWriter | SpaceWriter, rows: Rows) -> None:
    """Keep the text of rows beside their features, unless `store_text` is false; on rank 0."""
    if run.config.dataflex.store_text:
        writer.keep_texts(rows.row_set, run.data.texts(rows), run.data.formats)


def _stored_bytes(writer: GenerationWriter) -> int:
    """Compute the bytes that the pending units will take."""
    rows = sum(unit.stop - unit.start for unit in writer.pending)
    return generation_bytes(rows, writer.plan.dim, writer.plan.dtype, writer.plan.unit_rows)
