"""Scores that `gradstore eval` judges: a store's influence, or those of a file.

Letters: n training rows, q queries, q' of them that are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dataflex.config.keys import RunConfig
from dataflex.data.rows import RunData
from dataflex.launch.retraining import store_differs
from dataflex.pipelines.pipeline import build_strategy
from dataflex.selectors.base import Selector
from dataflex.selectors.by_influence import InfluenceSelector
from dataflex.selectors.landmarks import LandmarksSelector
from gradstore.errors import BadInput
from gradstore.evaluation.estimates import score_matrix
from gradstore.format.layout import RowStatus
from gradstore.scoring.best_rows import usable_targets
from gradstore.scoring.combine import CHUNK_ROWS, combine
from gradstore.scoring.pairing import checkpoint_features, parse_which
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.scan import as_device
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Scored:
    """Scores of training rows.

    Attributes:
        values: (q', n), 0 for a training row without a feature: no step moves it.
        queries: (q',) positions among the queries.
    """

    values: Floats
    queries: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Component:
    """The part of a configured component that a store's influence stands for.

    Attributes:
        product: that it selects by; cosines where it is none's.
        left_out: lines that say what else it does, of which the influence holds nothing.
    """

    product: InnerProduct = COSINE
    left_out: tuple[str, ...] = ()


def component_of(config: RunConfig) -> Component:
    """Return what of the configured component is judged, and what is not."""
    ours = config.dataflex
    if ours.train_type == "static":
        return Component()
    component = config.component(ours.train_type, ours.component_name, ours.component_params)
    strategy = build_strategy(component)
    stages = [stage.strategy for stage in getattr(strategy, "everyone", ())]
    selectors = [each for each in (strategy, *stages) if isinstance(each, InfluenceSelector)]
    if selectors:
        return Component(selectors[0].product, tuple(_left_out(selectors[0])))
    if not isinstance(strategy, Selector):
        return Component()
    return Component(left_out=(
        f"{ours.component_name} does not select by a store's influence, whose cosines are judged "
        "here; give its own scores with --scores",
    ))  # fmt: skip


def _left_out(selector: InfluenceSelector) -> list[str]:
    """Say, a line for each, what a selector does beside the product of stored features."""
    found = []
    if (rerank := selector.rerank) is not None:
        found.append(
            f"rerank: the component ranks its best {rerank.top:.3g} of rows again (by: "
            f"{rerank.by}), and judged is the store's own order; give the scores of whole "
            "gradients with --scores"
        )
    if selector.scoring == "direct":
        found.append(
            "scoring: direct: the component takes whole gradients, and judged are the store's "
            "projected ones; give the scores of whole gradients with --scores"
        )
    if not selector.rule.plain:
        told = ", ".join(f"{key}: {value}" for key, value in selector.rule.told().items())
        found.append(
            f"{told}: the component chooses rows by that rule, and judged are the scores that it "
            "starts from"
        )
    if isinstance(selector, LandmarksSelector):
        found.append(
            f"landmarks: the component estimates influence from {selector.landmarks:,} rows' "
            "gradients, and judged are the gradients of all rows; give the estimates with --scores"
        )
    return found


def influence(
    store: Path, checkpoints: str, run: str, data: RunData, queries: Mask, product: InnerProduct
) -> Scored:
    """Score each training row for each target row that a store can use.

    Args:
        store: its path.
        checkpoints: to combine, as text: last, all or a number.
        run: prefix of the generations.
        data: rows of the configuration.
        queries: of its target rows, all sets in a row, those that are queries.
        product: of a training row's feature and a target row's.

    Raises:
        BadInput: no such checkpoint, or no target row that can be used.
        ProvenanceMismatch: the store is of other rows.
    """
    sets = [rows.name for rows in data.targets]
    pairs = checkpoint_features(open_store(store), parse_which(checkpoints), run=run, targets=sets)
    held = (pairs[-1].train, *pairs[-1].targets)
    for rows, generation in zip((data.train, *data.targets), held, strict=True):
        store_differs(store, rows, generation.row_hash)  # type: ignore[attr-defined]
    starts = np.cumsum([0, *(len(rows) for rows in data.targets)])
    numbers = np.cumsum(queries) - 1  # target row -> its number among the queries
    wanted = [each for each in usable_targets(pairs) if queries[starts[each.target] + each.start]]
    if not wanted:
        raise BadInput(f'store "{store}" has no usable target row; build it again')
    found = np.zeros((len(wanted), len(data.train)))

    def keep(start: int, stop: int, products: npt.NDArray[np.float32]) -> None:
        found[:, start:stop] = products.T

    codes = combine(pairs, wanted, keep, as_device("cpu"), CHUNK_ROWS, product)
    found[:, codes != RowStatus.OK] = 0
    return Scored(found, np.array([numbers[starts[one.target] + one.start] for one in wanted]))


def read_scores(path: Path, rows: int, queries: int) -> Scored:
    """Read scores of every query: a matrix (q, n), or one score for each row, for all of them.

    Raises:
        BadInput: they can't be read, or are of other rows or queries.
    """
    import pyarrow.parquet as pq

    matrix = path.suffix == ".npy"
    try:
        held = np.load(path, allow_pickle=False) if matrix else pq.read_table(path)
    except (OSError, ValueError) as error:
        raise BadInput(f'"{path}" cannot be read as scores: {error}') from error
    values = held if matrix else _one_for_each(path, held, rows)
    scores = score_matrix(values, str(path)) if matrix else np.tile(values, (queries, 1))
    if scores.shape != (queries, rows):
        raise BadInput(
            f'"{path}" has shape {scores.shape}; give ({queries}, {rows}): a line for each '
            "target row with a target token, a column for each training row"
        )
    return Scored(scores, np.arange(queries))


def _one_for_each(path: Path, table: pa.Table, rows: int) -> Floats:
    """Read (n,) scores in the order of the rows; one that is null is 0, as in `influence`."""
    for column in ("row", "score"):
        if column not in table.column_names:
            raise BadInput(f'"{path}" has no column {column!r}; give row and score')
    at = table["row"].to_numpy()
    if not np.array_equal(np.sort(at), np.arange(rows)):
        raise BadInput(f'"{path}" does not score each of the {rows:,} training rows once')
    given = table["score"].to_pylist()
    values = np.zeros(rows)
    values[at] = [0.0 if each is None else each for each in given]
    return values
