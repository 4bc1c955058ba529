"""Frames of a store for notebooks: rows and scores as pandas, joined by the row's position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import expect_path
from gradstore.format.layout import RowStatus
from gradstore.scoring.influence import Aggregation, influence_scores
from gradstore.scoring.pairing import Which, checkpoint_features
from gradstore.storage.reading import ReadFiles
from gradstore.store.generation import Generation
from gradstore.store.reader import Store

if TYPE_CHECKING:
    import pandas as pd


def open_store(path: str | Path) -> AskedStore:
    """Open a store for reading, at its newest commit.

    Args:
        path: the store's folder.

    Raises:
        BadInput: there is no store.
        ProvenanceMismatch: it was written by a newer schema; says which release reads it.
        DamagedData: its root or a commit is damaged.
    """
    expect_path(path, "the store")
    return AskedStore(ReadFiles(path))


class AskedStore(Store):
    """A store that answers with frames, as a notebook wants them."""

    def rows_frame(self, generation: str | Generation, *, text: bool = True) -> pd.DataFrame:
        """Return the rows of a generation, one line each, indexed by `row` (0 to n - 1).

        Args:
            generation: its name, such as "train/100", or the generation.
            text: with `prompt` and `response`, where the store keeps them.

        Returns:
            Columns data_set, source_row (null where the origin is unknown), prompt, response (with
            `text`; null where the store keeps none), target_tokens, status, norm, row_hash.

        Raises:
            BadInput: no such generation.
            DamagedData: a file is not the committed one.
        """
        import pandas as pd

        found = self.generation(generation) if isinstance(generation, str) else generation
        sources = found.sources or [(None, None)] * found.rows
        columns: dict[str, object] = {
            "data_set": [name for name, _ in sources],
            "source_row": pd.array([row for _, row in sources], dtype="Int64"),
        }
        if text:
            columns |= self._text_columns(found)
        columns |= {
            "target_tokens": found.tokens,
            "status": [RowStatus(code).name.lower() for code in found.status],
            "norm": found.norm,
            "row_hash": [bytes(one).hex() for one in found.row_hash],
        }
        return pd.DataFrame(columns, index=pd.RangeIndex(found.rows, name="row"))

    def scores_frame(
        self,
        which: Which = "last",
        *,
        run: str = "",
        targets: Sequence[str] | None = None,
        subtask_sizes: Sequence[int] | None = None,
        aggregation: Aggregation = "max",
        text: bool = True,
    ) -> pd.DataFrame:
        """Score every training row, as `gradstore score` does; highest first.

        Args:
            which: the newest checkpoint, all of them, or how many of the newest.
            run: prefix of the generations (`gradstore_run`).
            targets: target sets; None takes all.
            subtask_sizes: cut the one target set into sub-tasks of these sizes.
            aggregation: over sub-tasks.
            text: with `prompt` and `response`.

        Returns:
            The columns of `rows_frame` after `score` (null where the row is not usable) and
            `best_subtask` (its number; -1 where not usable), indexed by `row`.

        Raises:
            BadInput: no such checkpoint or target set, or sizes that do not fit.
            ProvenanceMismatch: generations that cannot be scored together.
        """
        pairs = checkpoint_features(self, which, run=run, sets=targets)
        scores = influence_scores(pairs, subtask_sizes=subtask_sizes, aggregation=aggregation)
        train: Generation = pairs[-1].train  # type: ignore[assignment]
        frame = self.rows_frame(train, text=text)
        frame.insert(0, "score", np.where(scores.usable, scores.values, np.nan))
        frame.insert(1, "best_subtask", scores.best_subtask)
        return frame.sort_values("score", ascending=False, kind="stable")

    def _text_columns(self, generation: Generation) -> dict[str, object]:
        texts = self.texts(generation)
        if texts is None:
            return {"prompt": None, "response": None}
        table = texts.table(["prompt", "response"])
        return {name: table[name].to_pylist() for name in table.column_names}
