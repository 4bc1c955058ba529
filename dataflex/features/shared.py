"""One generation, made by all ranks: each computes units of one plan, rank 0 writes and commits.

One process holds the store, so there is one lock and nothing to merge; the units, and with them
every feature, are those a single process would have computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dataflex.run.log import OnRows, progress
from dataflex.run.ranks import Ranks
from gradstore.export.units import UnitFeatures
from gradstore.format.plans import UnitRange
from gradstore.store.filling import ExportSummary, UnitSink
from gradstore.store.generation_writer import GenerationWriter

Compute = Callable[[UnitRange, OnRows], UnitFeatures]


@dataclass
class _OpenGeneration:
    """State that rank 0 holds while units arrive."""

    writer: GenerationWriter
    sink: UnitSink


def export_shared(
    ranks: Ranks,
    name: str,
    begin: Callable[[], GenerationWriter],
    compute: Compute,
    *,
    max_bad_fraction: float,
    shows_progress: bool,
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

    Returns:
        What the pass did, on every rank.

    Raises:
        StoreError: on every rank, whatever failed on one.
    """
    held: list[_OpenGeneration] = []

    def plan() -> list[UnitRange]:
        writer = begin()
        held.append(_OpenGeneration(writer, UnitSink(writer, max_bad_fraction=max_bad_fraction)))
        return list(writer.pending)

    pending = ranks.decide(plan)
    waiting = sum(unit.stop - unit.start for unit in pending)
    with progress(name, waiting, shown=shows_progress and waiting > 0) as advance:
        for start in range(0, len(pending), ranks.world):
            units = pending[start : start + ranks.world]
            mine = units[ranks.rank] if ranks.rank < len(units) else None

            def work(mine: UnitRange | None = mine) -> UnitFeatures | None:
                return None if mine is None else compute(mine, advance)

            parts = ranks.collect(work)
            ranks.decide(lambda parts=parts: _write(held[0].sink, parts))  # type: ignore[misc]
            advance(sum(unit.stop - unit.start for unit in units if unit is not mine))
    ranks.decide(lambda: held[0].writer.commit())
    return ranks.decide(lambda: held[0].sink.summary)


def _write(sink: UnitSink, parts: list[UnitFeatures | None]) -> None:
    for part in parts:
        if part is not None:
            sink.write(part)
