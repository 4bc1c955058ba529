"""Rows as a table: filtered, sorted, a page at a time, with their text where the store has it.

Letters: n rows of a generation, m rows that pass the filter.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.serve.asking import RowScores
from gradstore.serve.forms import RowFilter
from gradstore.serve.jobs import Kept
from gradstore.serve.problems import Missing
from gradstore.store.generation import Generation
from gradstore.store.reader import Store

#: What is said where a store has no text.
NO_TEXT = "run `dataflex-cli gradstore build` again with store_text: true"

#: Searches at the same time: each holds a file's text, decompressed on all cores.
_SEARCHES = threading.Semaphore(2)

_STATUSES = {status.name.lower(): int(status) for status in RowStatus}


@dataclass(frozen=True)
class Sources:
    """Sources of a generation's rows as numbers.

    Attributes:
        names: the data sets, sorted.
        code: (n,) int32, position in `names`; -1 where the source is not known.
        row: (n,) int64, position in the data set's file; -1 where it is not known.
    """

    names: tuple[str, ...]
    code: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes of the vectors."""
        return self.code.nbytes + self.row.nbytes

    @classmethod
    def of(cls, generation: Generation) -> Sources:
        """Read the sources that the exporter knew."""
        known = generation.sources
        if not known:
            missing = np.full(generation.rows, -1)
            return cls((), missing.astype(np.int32), missing.astype(np.int64))
        return cls(known.names, known.code, known.row)


class Table:
    """The rows of one generation.

    Args:
        store: for the texts.
        generation: whose rows.
        kept: holds what a next page needs again.
        scores: of the rows, None where none are asked for.
    """

    def __init__(
        self, store: Store, generation: Generation, kept: Kept, scores: RowScores | None = None
    ) -> None:
        self.generation, self.scores = generation, scores
        self._kept = kept
        sha = generation.commit_sha
        self.sources = kept.get_or_make(("sources", sha), lambda: Sources.of(generation))
        self.texts: Any = store.texts(generation)

    def rows(self, wanted: RowFilter) -> npt.NDArray[np.int64]:
        """Return the (m,) rows that pass a filter, in its order.

        Raises:
            BadInput: it asks for text that the store has not, or for an unknown status.
            Missing: it names a row or a data set that there is not.
        """
        mine = wanted.model_dump_json(
            include={"sort", "min_score", "max_score", "source", "status", "contains", "row"}
        )
        scored = None if self.scores is None else self.scores.key
        key = ("rows", self.generation.commit_sha, scored, mine)
        return self._kept.get_or_make(key, lambda: self._sorted(wanted))

    def _sorted(self, wanted: RowFilter) -> npt.NDArray[np.int64]:
        rows = np.flatnonzero(self._passing(wanted))
        name = wanted.sort.lstrip("-")
        if name == "row":
            return rows[::-1].copy() if wanted.sort.startswith("-") else rows
        columns = self._sort_columns(name, rows)
        if wanted.sort.startswith("-"):
            columns = [-column for column in columns]
        return rows[np.lexsort(columns[::-1])]  # ties, and nan at the end, in the order of rows

    def _sort_columns(self, name: str, rows: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        """Return the sort keys of some rows, the most important first."""
        if name == "score":
            assert self.scores is not None
            return [self.scores.values[rows]]
        if name == "length":
            return [self.generation.tokens[rows].astype(np.int64)]
        return [self.sources.code[rows].astype(np.int64), self.sources.row[rows]]

    def _passing(self, wanted: RowFilter) -> npt.NDArray[np.bool_]:
        """Return (n,) bool, True where a row passes every filter."""
        n = self.generation.rows
        passing = np.ones(n, dtype=bool)
        if wanted.row:
            check_rows(self.generation, wanted.row)
            passing[:] = False
            passing[list(wanted.row)] = True
        if self.scores is not None:
            values = self.scores.values.astype(np.float64)  # a bound may lie beyond float32
            if wanted.min_score is not None:
                passing &= values >= wanted.min_score
            if wanted.max_score is not None:
                passing &= values <= wanted.max_score
        if wanted.source:
            passing &= np.isin(self.sources.code, [self._code(name) for name in wanted.source])
        if wanted.status:
            passing &= np.isin(self.generation.status, [_status(name) for name in wanted.status])
        if wanted.contains:
            passing &= self._containing(wanted.contains)
        return passing

    def _code(self, name: str) -> int:
        if name not in self.sources.names:
            there = ", ".join(self.sources.names) or "rows of unknown source"
            raise Missing(
                f"{self.generation.name} has no rows of data set {name!r}; it has {there}."
            )
        return self.sources.names.index(name)

    def _containing(self, words: str) -> npt.NDArray[np.bool_]:
        """Return (n,) bool, True where prompt or response holds the words, in either case."""
        import pyarrow.compute as pc

        if self.texts is None:
            raise BadInput(f"{self.generation.name} has no text to search; {NO_TEXT}.")
        parts = []
        with _SEARCHES:
            for table in self.texts.parts(["prompt", "response"]):
                found = [pc.match_substring(table[name], words, ignore_case=True)
                         for name in ("prompt", "response")]  # fmt: skip
                parts.append(np.asarray(pc.or_(*found).to_numpy(), dtype=bool))
        return np.concatenate(parts)

    def lines(self, rows: Sequence[int], characters: int) -> list[dict[str, Any]]:
        """Describe rows, in the order given.

        Args:
            rows: positions of the generation.
            characters: prompt and response are cut to so many; their lengths are told.
        """
        check_rows(self.generation, rows)
        texts: list[Any] = [None] * len(rows)
        if self.texts is not None:
            texts = self.texts.read(list(rows))
        return [
            self._line(int(row), text, characters) for row, text in zip(rows, texts, strict=True)
        ]

    def _line(self, row: int, text: Any, characters: int) -> dict[str, Any]:  # noqa: ANN401
        code = int(self.sources.code[row])
        line: dict[str, Any] = {
            "row": row,
            "source": None if code < 0 else [self.sources.names[code], int(self.sources.row[row])],
            "status": RowStatus(int(self.generation.status[row])).name.lower(),
            "tokens": int(self.generation.tokens[row]),
        }
        if self.scores is not None:
            score = float(self.scores.values[row])
            line["score"] = None if np.isnan(score) else score
            line["subtask"] = int(self.scores.best_subtask[row])
        for name in ("prompt", "response"):
            whole = None if text is None else getattr(text, name)
            line[name] = None if whole is None else whole[:characters]
            line[f"{name}_length"] = None if whole is None else len(whole)
        return line


def check_rows(generation: Generation, rows: Sequence[int]) -> None:
    """Raise Missing unless a generation has all of these rows."""
    for row in rows:
        if not 0 <= row < generation.rows:
            raise Missing(
                f"{generation.name} has rows 0 to {generation.rows - 1}, not {row}; ask for one of "
                "them."
            )


def _status(name: str) -> int:
    if name not in _STATUSES:
        raise BadInput(f"status is {name!r}; choose {', '.join(_STATUSES)}.")
    return _STATUSES[name]
