"""Rows whose embeddings are nearest to the target's, every target row in turn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.config.parameters import Count
from dataflex.config.registry import register
from dataflex.data.rows import RunData
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.by_embedding import EmbeddingSelector, load_offline, rows_of_file, scored
from dataflex.selectors.subset_rule import rule_of
from gradstore.errors import BadInput
from gradstore.scoring.rules import OfSimilarity
from gradstore.similarity.neighbours import Matrix, Neighbours, column_order, growing_order


@register("selector", "near")
class NearSelector(EmbeddingSelector):
    """Selector of each target row's nearest rows: all first neighbours, then all second ones.

    Args:
        max_K: neighbours looked up for each target row; more where they name too few rows.
        advance: go on where the last update ended, and from the start when all were served; false
            answers the same rows while the embeddings stay the same.
        subset: null reads the table of neighbours column by column; top (mean cosine), round_robin,
            knn_uniform, transport or facility_location choose in its place: docs/subset.md.
        neighbours: rows that a target row names, of knn_uniform; null finds them.
        subset_params: constants of the rule by name, in the place of its own: docs/subset.md.
        quotas: the most rows an update takes of a data set, by name, or a share between 0 and 1;
            with a subset.
        indices_path: a .npy of DataFlex 1.1.0, (target rows, K) numbers of rows of the one training
            file, nearest first; stands for embeddings.
        embedding: as for `EmbeddingSelector`.
    """

    def __init__(
        self,
        max_K: Count = 1000,
        advance: bool = True,
        subset: OfSimilarity | None = None,
        neighbours: Count | None = None,
        subset_params: Mapping[str, float] | None = None,
        quotas: Mapping[str, int | float] | None = None,
        indices_path: str | None = None,
        **embedding: Any,  # noqa: ANN401 - the base's parameters
    ) -> None:
        super().__init__(**embedding)
        self.rule = rule_of(
            subset, neighbours, quotas, subset_params, own="rows are taken column by column"
        )
        if subset is not None and indices_path is not None:
            raise ValueError(
                f"subset is {subset!r}, but indices_path {indices_path!r} holds no similarities to "
                "choose by; leave one of them out"
            )
        self.max_k = max_K
        self.advance = advance
        self.file = None if indices_path is None else Path(indices_path).expanduser()
        self.needs_targets = self.file is None
        self._matrix: Matrix | None = None
        self._served: npt.NDArray[np.bool_] | None = None

    def check_count(self, count: int, data: RunData) -> None:
        """Raise BadInput unless enough rows are usable, and a file made offline names enough."""
        if self.file is None:
            super().check_count(count, data)
            return
        self._matrix = offline_neighbours(self.file, data)
        rows, _ = column_order(self._matrix, data.train.target_tokens > 0)
        if len(rows) < count:
            raise BadInput(
                f"indices_path {str(self.file)!r} names {len(rows)} of the {len(data.train)} "
                f"training rows, an update takes {count}. Lower update_step or look up more "
                "neighbours."
            )

    def state(self) -> dict[str, Any]:
        """Return the rows served since the start of the order."""
        return {} if self._served is None else {"served": self._served.copy()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on behind the same rows."""
        held = state.get("served")
        self._served = None if held is None else np.array(held, dtype=np.bool_)

    def choose(
        self, count: int, context: UpdateContext, neighbours: Neighbours | None
    ) -> Selection:
        """Choose the next rows of the order, or by the rule."""
        n = len(context.run.data.train)
        served = np.zeros(n, dtype=np.bool_) if self._served is None else self._served
        if self.rule is not None and neighbours is not None:
            chosen = self.by_rule(count, context, neighbours, self.rule, served)
            self._served = served if self.advance else None
            return chosen
        if neighbours is None:
            allowed = context.among_candidates(np.ones(n, dtype=np.bool_))
            rows, places = column_order(self._of_file(context), allowed)
            scores = -places.astype(np.float64)
        else:
            allowed = context.among_candidates(neighbours.usable)
            rows, scores = growing_order(neighbours, self.max_k, count, allowed)
        if len(rows) < count:
            raise BadInput(
                f"near: {count} rows requested, {len(rows)} are reachable. "
                "Raise max_K or lower update_step."
            )
        found = next_rows(rows, served, count)
        self._served = served if self.advance else None
        named = np.full(n, np.nan)
        named[rows] = scores
        return scored(rows[found], named, allowed, {"named": float(len(rows))})

    def _of_file(self, context: UpdateContext) -> Matrix:
        if self._matrix is None:
            assert self.file is not None
            self._matrix = offline_neighbours(self.file, context.run.data)
        return self._matrix


def next_rows(
    order: npt.NDArray[np.int64], served: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.int64]:
    """Return positions in `order` of the next rows, from its start again when all were served.

    Args:
        order: (m,) distinct rows, m >= count.
        served: (n,) bool, rows served since the start; brought up to date.
        count: how many; no row twice.
    """
    fresh = np.flatnonzero(~served[order])[:count]
    if len(fresh) == count:
        served[order[fresh]] = True
        return fresh
    served[:] = False
    again = np.setdiff1d(np.arange(len(order)), fresh)[: count - len(fresh)]
    served[order[again]] = True
    return np.concatenate([fresh, again])


def offline_neighbours(path: Path, data: RunData) -> Matrix:
    """Load (q, k) training rows of an offline file; -1 where a search missed or a row was dropped.

    Raises:
        BadInput: the file is no table of row numbers, or numbers rows of several files.
    """
    table = load_offline(path, "indices_path")
    if table.ndim != 2 or not table.size or not np.issubdtype(table.dtype, np.integer):
        raise BadInput(
            f"indices_path {str(path)!r} holds {table.dtype} {table.shape}; whole numbers "
            "(target rows, K) are needed. "
            "Save the nearest training rows of each target row with numpy.save."
        )
    if int(table.min()) < -1:
        raise BadInput(
            f"indices_path {str(path)!r} names row {int(table.min())}; rows start at 0. "
            "Correct the file, or leave indices_path out."
        )
    rows = rows_of_file(data.train, "indices_path")
    within = (table >= 0) & (table < len(rows))
    return np.where(within, rows[np.where(within, table, 0)], -1).astype(np.int64)
