"""BM25: rows that share rare words with the target rows; no model, no pass."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Positive, Share
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import RunContext, UpdateContext
from dataflex.selectors.base import Selection, Selector
from dataflex.selectors.by_embedding import scored
from dataflex.selectors.turns import Turns
from gradstore.errors import BadInput
from gradstore.similarity.bm25 import Bm25, words_of

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from dataflex.data.rows import Rows
    from dataflex.run.forecast import Forecast

#: Training rows indexed for a forecast.
_MEASURED = 500


@register("selector", "bm25")
class Bm25Selector(Selector):
    """Selector of rows by the words that their text shares with the target rows' texts.

    Texts are prompt and response, as the data set has them. A baseline: it sees words alone, costs
    no pass, and works with any model.

    Args:
        aggregation: round_robin lets each target row in turn take its best row; max and mean fold a
            row's scores for all target rows into one, which long target rows dominate.
        advance: go on where the last update ended, and from the start when all rows were served;
            false answers the same rows at every update.
        k1: how soon a repeated word stops to count.
        b: how much long rows are marked down, 0 to 1.
        unique: of rows that are copies of one another, choose none but the first.
    """

    needs_targets = True
    distinct = True
    paper = "Kamphuis et al. 2020, Which BM25 Do You Mean?, ECIR (the Lucene variant)"

    def __init__(
        self,
        aggregation: Literal["round_robin", "max", "mean"] = "round_robin",
        advance: bool = True,
        k1: Positive = 1.5,
        b: Share = 0.75,
        unique: bool = False,
    ) -> None:
        self.aggregation = aggregation
        self.advance = advance
        self.k1, self.b = float(k1), float(b)
        self.unique = unique
        self._turns = Turns()
        self._served: npt.NDArray[np.bool_] | None = None
        self._index: Bm25 | None = None
        #: Texts of the target rows that have a word.
        self._queries: list[str] = []
        #: (n,) scores of the rows, folded over the target rows.
        self._folded: npt.NDArray[np.float64] = np.empty(0)

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Refuse target rows without a word."""
        self._queries = [text for rows in data.targets for text in texts_of(data, rows)
                         if words_of(text)]  # fmt: skip
        if data.targets and not self._queries:
            raise BadInput(
                f"bm25: none of the {sum(map(len, data.targets))} target rows has a word in its "
                "text. Name another target_dataset, or another component."
            )

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Forecast the index of all rows and the scores, from some rows."""
        from dataflex.run.forecast import Forecast, timed

        rows = np.linspace(0, (n := len(run.data.train)) - 1, min(n, _MEASURED)).astype(np.int64)
        read = run.data.texts(run.data.train).read(rows)
        texts = [f"{text.prompt}\n{text.response}" for text in read]
        built: list[Bm25] = []
        index = timed(lambda: built.append(Bm25(texts, k1=self.k1, b=self.b)))
        one = timed(lambda: built[0].scores(self._queries[0]))
        scores = one * len(self._queries) * n / len(rows)
        return [
            Forecast("index of the rows' words", 1, n, 0, index * n / len(rows)),
            Forecast(f"BM25 of {len(self._queries)} target rows", len(steps), n, 0, scores),
        ]

    def finish(self) -> None:
        """Drop the index."""
        self._index = None

    def state(self) -> dict[str, Any]:
        """Return the rows served since the start of the order, and whose turn is next."""
        served = {} if self._served is None else {"served": self._served.copy()}
        return {"next": self._turns.next, **served}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the same rows."""
        held = state.get("served")
        self._turns.next = int(state["next"])
        self._served = None if held is None else np.array(held, dtype=np.bool_)

    def select(self, count: int, context: UpdateContext) -> Selection:
        """Choose the next rows by the words of their texts."""
        return context.run.ranks.decide(lambda: self._choose(count, context))

    def _choose(self, count: int, context: UpdateContext) -> Selection:
        from gradstore.scoring.selection import check_k

        began, data = time.perf_counter(), context.run.data
        n = len(data.train)
        if self._index is None:
            self._index = Bm25(texts_of(data, data.train), k1=self.k1, b=self.b)
            self._folded = self._fold(self._index)
        indexed = time.perf_counter()
        allowed = context.among_candidates(np.ones(n, dtype=np.bool_))
        check_k(count, int(allowed.sum()), n)
        rows = self._next_rows(self._index, count, allowed)
        return replace(
            scored(rows, self._folded, allowed, {}),
            target_rows=len(self._queries),
            score_seconds=indexed - began,
            select_seconds=time.perf_counter() - indexed,
        )

    def _fold(self, index: Bm25) -> npt.NDArray[np.float64]:
        """Compute each row's mean score over the target rows, or else its highest."""
        folded = np.zeros(index.documents)
        for query in self._queries:
            scores = index.scores(query)
            if self.aggregation == "mean":
                folded += scores / len(self._queries)
            else:
                np.maximum(folded, scores, out=folded)
        return folded

    def _next_rows(
        self, index: Bm25, count: int, allowed: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Choose `count` of the rows not served yet; of all again, once these are used up."""
        served = np.zeros(len(allowed), dtype=np.bool_) if self._served is None else self._served
        fresh = allowed & ~served
        rows = self._best(index, min(count, int(fresh.sum())), fresh)
        served[rows] = True
        if len(rows) < count:
            served[:] = False
            allowed = allowed.copy()
            allowed[rows] = False
            again = self._best(index, count - len(rows), allowed)
            served[again] = True
            rows = np.concatenate([rows, again])
        if self.advance:
            self._served = served
        else:
            self._turns = Turns()
        return rows

    def _best(
        self, index: Bm25, count: int, allowed: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.int64]:
        """Choose the best `count` of the allowed rows, ties to the lower row."""
        from gradstore.scoring.selection import select_top

        if count == 0:
            return np.empty(0, dtype=np.int64)
        if self.aggregation != "round_robin":
            return select_top(self._folded, count, usable=allowed)
        lists = [select_top(index.scores(q), count, usable=allowed) for q in self._queries]
        return self._turns.take(np.stack(lists), count)


def texts_of(data: RunData, rows: Rows) -> Iterator[str]:
    """Give prompt and response of every row of a set, as one text each."""
    for text in data.texts(rows):
        yield f"{text.prompt}\n{text.response}"
