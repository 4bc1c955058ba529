"""Frames of a store for notebooks: rows and scores as pandas, joined by the row's position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.influence import Aggregation, influence_scores, subtask_influence
from gradstore.scoring.pairing import Which, checkpoint_features
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.query import query_influence
from gradstore.storage.location import Place
from gradstore.storage.places import reads_at
from gradstore.store.generation import Generation
from gradstore.store.reader import Store

if TYPE_CHECKING:
    import pandas as pd


def open_store(path: Place) -> AskedStore:
    """Open a store for reading, at its newest commit.

    Args:
        path: the store's folder, s3://BUCKET/PREFIX, or https://HOST.

    Raises:
        BadInput: there is no store.
        ProvenanceMismatch: it was written by a newer schema; says which release reads it.
        DamagedData: its root or a commit is damaged.
    """
    return AskedStore(reads_at(path))


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
        checkpoints: Which = "last",
        *,
        run: str = "",
        targets: Sequence[str] | None = None,
        subtask_sizes: Sequence[int] | None = None,
        aggregation: Aggregation = "max",
        product: InnerProduct = COSINE,
        until: int | None = None,
        text: bool = True,
    ) -> pd.DataFrame:
        """Score every training row, as `gradstore score` does; highest first.

        Args:
            checkpoints: the newest, all of them, or how many of the newest.
            run: prefix of the generations (`gradstore_run`).
            targets: target sets; None takes all.
            subtask_sizes: cut the one target set into sub-tasks of these sizes.
            aggregation: over sub-tasks.
            product: of a training row and a target row.
            until: no checkpoint of a later step is taken; None takes them up to the newest.
            text: with `prompt` and `response`.

        Returns:
            The columns of `rows_frame` after `score` (null where the row is not usable) and
            `best_subtask` (its number; -1 where not usable), indexed by `row`.

        Raises:
            BadInput: no such checkpoint or target set, or sizes that do not fit.
            ProvenanceMismatch: generations that cannot be scored together.
        """
        pairs = checkpoint_features(self, checkpoints, run=run, targets=targets, until=until)
        scores = influence_scores(
            pairs, subtask_sizes=subtask_sizes, aggregation=aggregation, product=product
        )
        train: Generation = pairs[-1].train  # type: ignore[assignment]
        frame = self.rows_frame(train, text=text)
        frame.insert(0, "score", np.where(scores.usable, scores.values, np.nan))
        frame.insert(1, "best_subtask", scores.best_subtask)
        return frame.sort_values("score", ascending=False, kind="stable")

    def influence_frame(
        self,
        checkpoints: Which = "last",
        *,
        run: str = "",
        targets: Sequence[str] | None = None,
        product: InnerProduct = COSINE,
        until: int | None = None,
    ) -> pd.DataFrame:
        """Score every training row against each target set, in one pass over the features.

        Args:
            checkpoints: as for `scores_frame`.
            run: prefix of the generations (`gradstore_run`).
            targets: target sets; None takes all.
            product: of a training row and a target row.
            until: as for `scores_frame`.

        Returns:
            One column per target set, named as it is, indexed by `row`: the score against that set
            alone, null where the row is not usable.

        Raises:
            BadInput: no such checkpoint or target set.
            ProvenanceMismatch: generations that cannot be scored together.
        """
        import pandas as pd

        pairs = checkpoint_features(self, checkpoints, run=run, targets=targets, until=until)
        values = subtask_influence(pairs, product=product).values
        names = [target.set for target in pairs[-1].targets]  # type: ignore[attr-defined]
        return pd.DataFrame(values, pd.RangeIndex(len(values), name="row"), names)

    def query_frame(
        self,
        target_row: int,
        target: str | None = None,
        checkpoints: Which = "last",
        *,
        run: str = "",
        top: int = 10,
        product: InnerProduct = COSINE,
        text: bool = True,
    ) -> pd.DataFrame:
        """Find the training rows that helped one target row and those that hurt it.

        Args:
            target_row: row of the target set.
            target: the target set; None takes the only one.
            checkpoints: as for `scores_frame`.
            run: prefix of the generations (`gradstore_run`).
            top: rows on each side.
            product: of a training row and a target row.
            text: with `prompt` and `response`.

        Returns:
            The columns of `rows_frame` after `side` ("helped", then "hurt") and `score`, indexed by
            `row`: helpers from the highest score, then the others from the lowest.

        Raises:
            BadInput: no such checkpoint, target set or row, several sets and none named, top < 1.
            ProvenanceMismatch: generations that cannot be scored together.
        """
        import pandas as pd

        sets = None if target is None else [target]
        pairs = checkpoint_features(self, checkpoints, run=run, targets=sets)
        names = [each.set for each in pairs[-1].targets]  # type: ignore[attr-defined]
        if len(names) > 1:
            raise BadInput(f"the store has target sets {', '.join(names)}; name one as target.")
        found = query_influence(pairs, target_row, top=top, product=product)
        train: Generation = pairs[-1].train  # type: ignore[assignment]
        frame = self.rows_frame(train, text=text)
        frame.insert(0, "score", found.values)
        sides = {"helped": frame.loc[found.helped], "hurt": frame.loc[found.hurt]}
        both = pd.concat(sides, names=["side"])
        return both.reset_index("side")

    def _text_columns(self, generation: Generation) -> dict[str, object]:
        texts = self.texts(generation)
        if texts is None:
            return {"prompt": None, "response": None}
        table = texts.table(["prompt", "response"])
        return {name: table[name].to_pylist() for name in table.column_names}
