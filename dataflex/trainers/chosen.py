"""The files of a selection: its rows and scores, and the rows themselves to be read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.data.kinds import Kinds, kinds_of
from dataflex.data.texts import RowsText
from dataflex.run.log import RunLog, finite
from dataflex.run.spread import told_spread
from dataflex.trainers.job import Job

#: Rows whose text is read at once.
CHUNK = 1024


class ChosenRows:
    """Writer of `selections/step_<g>.json` and what lies beside it; rank 0 alone uses it."""

    def __init__(self, job: Job, log: RunLog) -> None:
        """Take the run's rows, and the log that writes its files."""
        self._data = job.data
        self._keeps_text = job.config.dataflex.store_text
        self._log = log

    def write(
        self,
        step: int,
        rows: npt.NDArray[np.int64],
        scores: npt.NDArray[np.floating[Any]] | None,
        manifest: Mapping[str, Any],
    ) -> None:
        """Write a selection.

        `step_<g>.jsonl` has a line per chosen row, in the strategy's order; `lowest_<g>.jsonl` the
        usable rows with the lowest scores, from the lowest, where the strategy has told them.

        Args:
            step: g, optimizer steps finished.
            rows: (k,) positions in the training set.
            scores: (k,) in the same order, or None.
            manifest: for `step_<g>.json`; gets the chosen rows by kind.
        """
        kinds = self._kinds
        if kinds is not None:
            by_kind = {"column": kinds.column, "chosen": kinds.count(rows), "all": self._all_kinds}
            manifest = {**manifest, "kinds": by_kind}
        self._log.selection(step, rows, scores, manifest)
        listed = [None] * len(rows) if scores is None else [finite(s) for s in scores.tolist()]
        self._log.rows(f"step_{step}", self._lines(rows.tolist(), listed))
        if spread := told_spread(manifest):
            lowest = self._lines(spread["lowest_rows"], spread["lowest_scores"])
            self._log.rows(f"lowest_{step}", lowest)

    def _lines(
        self, rows: Sequence[int], scores: Sequence[float | None]
    ) -> Iterator[dict[str, Any]]:
        """Give the lines of a file of rows; null stands for what is not known."""
        train, texts = self._data.train, self._texts
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            read = [None] * len(part) if texts is None else texts.read(part)
            for i, (row, text) in enumerate(zip(part, read, strict=True), start):
                yield {
                    "rank": i + 1,
                    "row": row,
                    "score": scores[i],
                    "source": None if train.sources is None else list(train.sources[row]),
                    "prompt": None if text is None else text.prompt,
                    "response": None if text is None else text.response,
                }

    @cached_property
    def _texts(self) -> RowsText | None:
        return self._data.texts(self._data.train) if self._keeps_text else None

    @cached_property
    def _kinds(self) -> Kinds | None:
        return kinds_of(self._data.raw)

    @cached_property
    def _all_kinds(self) -> dict[str, int]:
        """Count all training rows by kind."""
        return {} if self._kinds is None else self._kinds.count(np.arange(len(self._data.train)))
