"""Training on rows that a selector chooses at every update."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import asdict
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RunData
from dataflex.run.log import SelectionEvent, as_json
from dataflex.run.schedule import EventKind, Interval
from dataflex.selectors.base import Selection, ask
from dataflex.trainers.metrics import (
    count_by_set,
    score_range,
    selection_metrics,
    skipped_rows,
    won_by,
)
from dataflex.trainers.row_seam import RowSeam, check_rows_of

_log = logging.getLogger(__name__)


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
        pause = time.perf_counter() - began
        numbers = selection_metrics(self.run.data, rows, selection)
        self.add_to_log({**numbers, "pause_seconds": pause})
        if self.run.ranks.leads and self._is_told(interval):
            self._record(interval.start, rows, selection, numbers, pause)
        return rows

    def _is_told(self, interval: Interval) -> bool:
        """Return true unless a selector answers more often than the Trainer logs.

        Then the first answer is told, and those after which a log line was due.
        """
        if not self.run.strategy.every_step or interval.update == 1:
            return True
        every = max(1, int(self.state.logging_steps or 1))
        return interval.start // every > (interval.start - interval.steps) // every

    def _record(
        self,
        step: int,
        rows: npt.NDArray[np.int64],
        selection: Selection,
        numbers: dict[str, float],
        pause: float,
    ) -> None:
        """Write a selection, and tell it on the screen and in events.jsonl."""
        train = self.run.data.train
        won = dict(selection.manifest.get("won", {}))
        manifest = {**self.manifest(len(rows), self.run.params), **selection.manifest}
        self.chosen_rows.write(step, rows, selection.scores, manifest)
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
            skipped=skipped_rows(self.run.data, selection),
            chosen=self._by_set(rows),
            train_sets=self._train_sets,
            won=won,
            distinct=len(train.first_of_copies(rows)),
        )
        for warning in warnings_of(event, len(np.unique(rows))):
            _log.warning("step %d: %s", step, warning)
        sets = count_by_set(event.chosen, len(event.train_sets))
        summary = f"chose {len(rows)} of {len(train)} rows{sets}"
        if event.distinct < len(np.unique(rows)):
            summary += f", {event.distinct} of them distinct"
        self.log_files.update(
            "select",
            summary=summary + score_range(numbers) + won_by(won),
            **asdict(event),
            numbers=as_json(numbers),
        )

    @cached_property
    def _train_sets(self) -> dict[str, int]:
        """Count the training rows by data set."""
        return self._by_set(np.arange(len(self.run.data.train)))

    def _by_set(self, rows: npt.NDArray[np.int64]) -> dict[str, int]:
        """Count rows by data set, the largest count first."""
        train = self.run.data.train
        if train.sources is None:
            return {train.name: len(rows)}
        return dict(Counter(train.sources[i][0] for i in rows.tolist()).most_common())


def warnings_of(event: SelectionEvent, rows: int) -> list[str]:
    """List what makes a choice of `rows` different rows hardly one: copies, or a single target."""
    found = []
    if event.distinct == 1 < rows:
        found.append(
            f"all {rows} chosen rows are copies of one row. Set component_params.unique: true "
            "where the component has it, or remove the copies from the data set"
        )
    winners = [name for name, count in event.won.items() if count]
    if len(event.won) > 1 and len(winners) == 1:
        found.append(
            f"target {winners[0]!r} won all {rows} chosen rows, the other {len(event.won) - 1} "
            "had no say; component_params.aggregation: mean lets every target count"
        )
    return found


def warmup_rows(data: RunData, count: int, seed: int, stage: int) -> npt.NDArray[np.int64]:
    """Draw rows with a target, uniform without replacement, another draw in every stage."""
    usable = np.flatnonzero(data.train.target_tokens > 0)
    return np.random.default_rng([seed, stage]).permutation(usable)[:count]
