"""Training on all rows, in an order that a reorder decides."""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from dataflex.reorders.base import Ordering
from dataflex.run.log import as_json
from dataflex.run.schedule import EventKind, Interval
from dataflex.trainers.metrics import score_metrics, score_range
from dataflex.trainers.row_seam import RowSeam, check_rows_of
from gradstore.errors import BadInput


class ReorderSeam(RowSeam):
    """The reorder's rows at every boundary, in its order; an interval may exceed the rows."""

    ordered = True

    def rows_for(self, interval: Interval) -> npt.NDArray[np.int64]:
        """Ask on every rank, so that passes are shared; rank 0's answer is everyone's."""
        began = time.perf_counter()
        strategy, context = self.run.strategy, self.update_context(interval)
        ask = strategy.warmup if interval.kind is EventKind.WARMUP else strategy.order
        count = interval.steps * self.run.shape.rows
        ordering = self.run.ranks.gather(lambda: ask(count, context))[0]
        if not isinstance(ordering, Ordering):
            raise BadInput(
                f"component {self.run.name!r} answered a {type(ordering).__name__}; "
                "expected a dataflex.api.Ordering."
            )
        rows = check_rows_of(ordering.rows, len(self.run.data.train), self.run.name)
        if len(rows) != count:
            raise BadInput(
                f"component {self.run.name!r} returned {len(rows)} rows, {count} were requested: "
                "let its order() return as many positions as it is asked for."
            )
        self._record(interval, rows, ordering, time.perf_counter() - began)
        return rows

    def _record(
        self,
        interval: Interval,
        rows: npt.NDArray[np.int64],
        ordering: Ordering,
        pause: float,
    ) -> None:
        """Log one line on the screen, one in events.jsonl; write the order into its own file."""
        numbers = {**ordering.numbers, **score_metrics(ordering.scores)}
        self.add_to_log({**numbers, "pause_seconds": pause})
        if not self.run.ranks.leads:
            return
        manifest = self.manifest(len(rows), self.run.params)
        self.log_files.selection(interval.start, rows, ordering.scores, manifest)
        verb = "opens with" if interval.kind is EventKind.WARMUP else "serves"
        share = f", {numbers['passes']:.2f} passes so far" if "passes" in numbers else ""
        self.log_files.update(
            "reorder",
            step=interval.start,
            component=self.run.name,
            summary=f"{verb} {len(rows)} rows{score_range(numbers)}{share}",
            train_rows=len(self.run.data.train),
            served_rows=len(rows),
            tokens=ordering.tokens,
            score_seconds=ordering.score_seconds,
            pause_seconds=pause,
            numbers=as_json(numbers),
        )
