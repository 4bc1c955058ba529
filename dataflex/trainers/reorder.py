"""Training on all rows, in an order that a reorder decides."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.data.rows import RunData
from dataflex.reorders.base import Ordering
from dataflex.run.log import as_json
from dataflex.run.schedule import EventKind, Interval, Schedule
from dataflex.trainers.metrics import score_metrics, score_range
from dataflex.trainers.row_seam import ServedSeam, check_rows_of, select_schedule
from gradstore.errors import BadInput


class ReorderSeam(ServedSeam):
    """The reorder's rows at every boundary, in its order; an interval may exceed the rows."""

    ordered = True

    @classmethod
    def plan(
        cls,
        strategy: Any,  # noqa: ANN401
        config: RunConfig,
        data: RunData,
        global_batch: int,
        args: Any,  # noqa: ANN401
    ) -> Schedule:
        """W + U·T steps a stage, as for select."""
        return select_schedule(config, len(data.train), global_batch, args)

    def rows_for(self, interval: Interval, learning_rate: float) -> npt.NDArray[np.int64]:
        """Ask on every rank, so that passes are shared; rank 0's answer is everyone's."""
        began = time.perf_counter()
        strategy, context = self.run.strategy, self.update_context(interval, learning_rate)
        ask = strategy.warmup if interval.kind is EventKind.WARMUP else strategy.order
        count = interval.steps * self.batch_shape.rows
        ordering = self.ranks.gather(lambda: ask(count, context))[0]
        if not isinstance(ordering, Ordering):
            raise BadInput(
                f"component {self.run.name!r} answered a {type(ordering).__name__}; "
                "expected a dataflex.reorders.base.Ordering."
            )
        rows = check_rows_of(ordering.rows, len(self.run.data.train), self.run.name)
        if len(rows) != count:
            raise BadInput(
                f"component {self.run.name!r} answered {len(rows)} rows, was asked for {count}."
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
        """One line on the screen, one in events.jsonl, the order itself in a file of its own."""
        numbers = {**ordering.numbers, **score_metrics(ordering.scores)}
        self.add_to_log({**numbers, "pause_seconds": pause})
        if not self.ranks.leads:
            return
        manifest = {
            "component": self.run.name,
            "params": dict(self.run.params),
            "count": len(rows),
            "rows_sha256": self.rows_sha256,
            "run_id": self.run.run_id,
        }
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
