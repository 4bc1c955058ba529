"""Training on rows that a selector chooses at every update."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RunData
from dataflex.run.log import SelectionEvent, as_json
from dataflex.run.schedule import EventKind, Interval
from dataflex.selectors.base import Selection, ask
from dataflex.trainers.metrics import count_by_set, score_range, selection_metrics
from dataflex.trainers.row_seam import RowSeam, check_rows_of


class SelectSeam(RowSeam):
    """Warm-up draws, then the selector's answer at every update."""

    within_rows = True

    def rows_for(self, interval: Interval) -> npt.NDArray[np.int64]:
        """Draw rows for a warm-up, or let the selector choose."""
        count = interval.steps * self.run.shape.rows
        if interval.kind is EventKind.WARMUP:
            return warmup_rows(self.run.data, count, int(self.args.seed), interval.stage)
        return self._select(count, interval)

    def _select(self, count: int, interval: Interval) -> npt.NDArray[np.int64]:
        """Ask the selector; log and write its answer."""
        began = time.perf_counter()
        context = self.update_context(interval)
        name = f"component {self.run.name!r}"
        selection = ask(self.run.strategy, count, context, name, exact=True)
        rows = check_rows_of(selection.indices, len(self.run.data.train), self.run.name)
        self._record(interval.start, rows, selection, time.perf_counter() - began)
        return rows

    def _record(
        self, step: int, rows: npt.NDArray[np.int64], selection: Selection, pause: float
    ) -> None:
        numbers = selection_metrics(self.run.data, rows, selection)
        self.add_to_log({**numbers, "pause_seconds": pause})
        if not self.run.ranks.leads:
            return
        train = self.run.data.train
        sources = train.sources
        names = [sources[i][0] if sources else train.name for i in rows.tolist()]
        manifest = {**self.manifest(len(rows), self.run.params), **selection.manifest}
        self.log_files.selection(step, rows, selection.scores, manifest)
        event = SelectionEvent(
            step=step,
            component=self.run.name,
            train_rows=len(train),
            target_rows=selection.target_rows,
            tokens=selection.tokens,
            export_seconds=selection.export_seconds,
            score_seconds=selection.score_seconds,
            select_seconds=selection.select_seconds,
            pause_seconds=pause,
            skipped={**self.run.data.dropped, **selection.skipped},
            chosen=dict(Counter(names).most_common(8)),
        )
        summary = f"chose {len(rows)} of {len(train)} rows{count_by_set(event.chosen)}"
        self.log_files.update(
            "select",
            summary=summary + score_range(numbers),
            **asdict(event),
            numbers=as_json(numbers),
        )


def warmup_rows(data: RunData, count: int, seed: int, stage: int) -> npt.NDArray[np.int64]:
    """Draw rows with a target, uniform without replacement, another draw in every stage."""
    usable = np.flatnonzero(data.train.target_tokens > 0)
    return np.random.default_rng([seed, stage]).permutation(usable)[:count]
