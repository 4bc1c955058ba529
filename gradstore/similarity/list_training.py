"""Making of lists of near rows: centroids of a sample, then one pass that fills and measures.

Letters: n rows, d projected dimensions, h held-out rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from gradstore.scoring.best_rows import BestRows, ranked
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, unit_rows
from gradstore.scoring.some_rows import SomeRows
from gradstore.similarity.index import CommittedSource, usable_units
from gradstore.similarity.recalls import NEAREST

_log = logging.getLogger(__name__)

#: Of the sample, and of the first centroids.
SEED = 0
#: Rounds of k-means: FAISS's own default for lists.
_ROUNDS = 10

#: (h, 100) rows each: the nearest, and the farthest, of each held-out row; -1 where there is none.
Truth: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def trained(
    faiss: Any,  # noqa: ANN401
    generation: CommittedSource,
    sample: npt.NDArray[np.int64],
    lists: int,
    large: bool,
) -> Any:  # noqa: ANN401
    """Make an inner-product index without rows, its centroids those of a sample."""
    d = generation.dim
    around = faiss.IndexFlatIP(d)
    if large:
        index = faiss.IndexIVFScalarQuantizer(
            around, d, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
    else:
        index = faiss.IndexIVFFlat(around, d, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter, index.cp.spherical = SEED, _ROUNDS, True
    index.train(units_at(generation, sample))
    return index


def neighbours(
    generation: CommittedSource,
    rows: npt.NDArray[np.int64],
    queries: npt.NDArray[np.float32],
    own: npt.NDArray[np.int64],
    add: Callable[[npt.NDArray[np.float32], npt.NDArray[np.int64]], None] = lambda *_: None,
) -> Truth:
    """Find the true neighbours of some queries in one pass over the rows.

    Args:
        generation: whose rows.
        rows: (n,) usable rows, ascending.
        queries: (h, d) unit rows.
        own: (h,) row that a query is itself, which is not its neighbour; -1 for none.
        add: called with (m, d) unit rows and (m,) their numbers, of each block.

    Raises:
        BadInput: a row marked usable that has no direction.
    """
    sides = BestRows(len(own), NEAREST[-1]), BestRows(len(own), NEAREST[-1])
    for here, units in usable_units(generation, rows):
        add(units, here)
        cosines = units @ queries.T
        cosines[here[:, None] == own[None, :]] = np.nan
        sides[0].add(here, cosines)
        sides[1].add(here, -cosines)
    near, far = (ranked([side]).rows for side in sides)
    return near, far


def units_at(source: FeatureSource, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Read rows here and there as (m, d) float32 unit rows."""
    some = SomeRows(source, rows)
    units = np.empty((len(rows), source.dim), dtype=np.float32)
    for start in range(0, len(rows), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(rows))
        units[start:stop] = unit_rows(some.read(start, stop))[0]
    return units


def on_gpu(faiss: Any, index: Any) -> Any:  # noqa: ANN401
    """Copy lists to the first GPU where FAISS has one and they fit; else return them."""
    if getattr(faiss, "get_num_gpus", lambda: 0)() < 1:
        return index
    try:
        resources = faiss.StandardGpuResources()
        copied = faiss.index_cpu_to_gpu(resources, 0, index)
    except RuntimeError as error:  # FAISS says so where memory is short
        _log.warning("lists stay on the CPU, the GPU can't take them: %s", error)
        return index
    copied.kept_alive = resources  # the copy does not own them
    return copied
