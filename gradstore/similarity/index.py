"""Nearest rows of one committed generation, asked again and again: FAISS behind one class.

Letters: n rows of the generation, d projected dimensions, q queries, k nearest.

Selection never uses this (it is an exact stream, any k); it serves interactive questions. An index
belongs to a commit and is derived from it, so it may be thrown away at any time.
"""

from __future__ import annotations

import importlib
import logging
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import CHUNK_ROWS
from gradstore.scoring.scan import BLOCK_ROWS, FeatureSource, Scan, exact_float32, unit_rows
from gradstore.scoring.selection import check_k, select_top
from gradstore.similarity.index_cache import IndexCache

_log = logging.getLogger(__name__)

FAISS_MAX_K = 2048
"""Largest k given to FAISS: its GPU indexes refuse more, its CPU heaps slow down beyond."""

FLAT_LIMIT_BYTES = 1 << 30
"""Above this size in float32 the index keeps float16 (cosines then err by less than 0.001)."""

_QUERIES_PER_CALL = 16
"""From 20 queries FAISS switches to BLAS, whose rounding depends on a row's place: ties break."""

Backend = Literal["auto", "faiss", "torch"]


class CommittedSource(FeatureSource, Protocol):
    """A generation, as far as an index needs it."""

    @property
    def name(self) -> str:
        """Such as "train/16"."""

    @property
    def commit_sha(self) -> str | None:
        """The commit that published the generation; None before that."""


class FeatureIndex:
    """Cosine search over the usable rows of one generation; made by `build`.

    Row numbers are the generation's own (positions in the processed dataset); rows that cannot be
    used are never found. Exact, except that above `FLAT_LIMIT_BYTES` FAISS keeps float16.
    """

    def __init__(
        self,
        generation: FeatureSource,
        faiss_index: Any,  # noqa: ANN401 - faiss has no types
        rows: npt.NDArray[np.int64],
    ) -> None:
        """Wraps an open FAISS index, or none; use `build`."""
        self._generation = generation
        self._faiss = faiss_index
        self.rows = rows

    @property
    def backend(self) -> Literal["faiss", "torch"]:
        """What answers searches up to `FAISS_MAX_K`."""
        return "torch" if self._faiss is None else "faiss"

    @classmethod
    def build(
        cls,
        generation: CommittedSource,
        cache_dir: str | Path | None = None,
        *,
        backend: Backend = "auto",
    ) -> FeatureIndex:
        """Opens the index of a generation, from the cache where it holds a sound one.

        A cached index that is damaged, older or of another commit is rebuilt, with a warning; it is
        never searched. Where the cache cannot be written the index lives in memory only.

        Args:
            generation: a committed generation.
            cache_dir: the store's `index` folder; None keeps the index in memory.
            backend: "auto" takes FAISS where it is installed, else exact torch.

        Raises:
            BadInput: the generation is not committed, has no usable row, or FAISS was asked for and
                is not installed.
        """
        usable = np.flatnonzero(np.asarray(generation.usable, dtype=bool)).astype(np.int64)
        if usable.size == 0:
            raise BadInput(f"{generation.name} has no usable row; there is nothing to index")
        faiss = None if backend == "torch" else _import_faiss()
        if faiss is None:
            if backend == "faiss":
                raise BadInput("faiss is not installed; install it, or use backend='torch'")
            return cls(generation, None, usable)
        if generation.commit_sha is None:
            raise BadInput(f"{generation.name} is not committed; an index belongs to a commit")
        large = usable.size * generation.dim * 4 > FLAT_LIMIT_BYTES
        cache = None
        if cache_dir is not None:
            identity: dict[str, str | int] = {
                "commit_sha": generation.commit_sha,
                "generation": generation.name,
                "rows": generation.rows,
                "indexed_rows": int(usable.size),
                "dim": generation.dim,
                "kind": "fp16" if large else "flat",
                "faiss_version": str(faiss.__version__),
            }
            cache = IndexCache(Path(cache_dir), identity)
        path = None if cache is None else cache.sound_file()
        if path is not None:
            return cls(generation, faiss.read_index(str(path)), usable)
        index = _fill(faiss, generation, usable, large)
        if cache is not None:
            cache.publish(lambda target: faiss.write_index(index, str(target)))
        return cls(generation, index, usable)

    def search(
        self, queries: npt.ArrayLike, k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """The k rows with the highest cosine to each query; ties go to the lower row.

        Args:
            queries: (q, d) or (d,) float, of any scale.
            k: from 1 to the usable rows.

        Returns:
            (q, k) float32 cosines, highest first; (q, k) int64 rows.

        Raises:
            BadInput: k out of range, other d, or a query that is zero or not finite.
        """
        count = check_k(k, self.rows.size, self._generation.rows)
        given = np.atleast_2d(np.asarray(queries, dtype=np.float64))
        if given.ndim != 2 or given.shape[1] != self._generation.dim:
            raise BadInput(
                f"queries have shape {given.shape}; (q, {self._generation.dim}) is needed"
            )
        directions, codes = unit_rows(given)
        if (codes != RowStatus.OK).any():
            bad = int(np.flatnonzero(codes != RowStatus.OK)[0])
            raise BadInput(
                f"query {bad} is {RowStatus(codes[bad]).name.lower()}: it points nowhere"
            )
        scores = np.empty((len(given), count), dtype=np.float32)
        rows = np.empty((len(given), count), dtype=np.int64)
        for low in range(0, len(given), _QUERIES_PER_CALL):
            here = slice(low, low + _QUERIES_PER_CALL)
            scores[here], rows[here] = self._nearest(directions[here], count)
        return scores, rows

    def _nearest(
        self, directions: npt.NDArray[np.float64], k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """`search` for a few unit queries."""
        if self._faiss is None or k > FAISS_MAX_K:
            return self._exact(directions, k)
        # One more than asked: a tie across the cut is FAISS's choice, not the lower row's.
        more = min(k + 1, self.rows.size)
        scores, rows = self._faiss.search(directions.astype(np.float32), more)
        order = np.lexsort((rows, -scores), axis=1)
        scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
        if more > k:
            tied = np.flatnonzero(scores[:, k] == scores[:, k - 1])
            if tied.size:
                scores[tied, :k], rows[tied, :k] = self._exact(directions[tied], k)
        return scores[:, :k], rows[:, :k]

    def _exact(
        self, directions: npt.NDArray[np.float64], k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """`search` by a stream over the stored features; any k."""
        n = self._generation.rows
        cosines = np.empty((n, len(directions)), dtype=np.float32)
        with exact_float32():
            scan = Scan(
                self._generation,
                directions,
                chunk_rows=CHUNK_ROWS,
                device=torch.device("cpu"),
            )
            for start in range(0, n, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, n)
                cosines[start:stop], codes = scan.chunk(start, stop)
                cosines[start:stop][codes != RowStatus.OK] = np.nan
        usable = np.zeros(n, dtype=bool)
        usable[self.rows] = True
        rows = np.stack([select_top(column, k, usable=usable) for column in cosines.T])
        return np.take_along_axis(cosines.T, rows, axis=1), rows


def _import_faiss() -> ModuleType | None:
    """FAISS, or None where it is not installed; imported late because it takes a while."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        _log.info("faiss is not installed; searching with exact torch products")
        return None


def _fill(
    faiss: ModuleType,
    generation: FeatureSource,
    usable: npt.NDArray[np.int64],
    large: bool,
) -> Any:  # noqa: ANN401
    """A FAISS inner-product index of the unit rows, under their dataset row numbers."""
    flat = (
        faiss.IndexScalarQuantizer(
            generation.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        )
        if large
        else faiss.IndexFlatIP(generation.dim)
    )
    index = faiss.IndexIDMap(flat)
    for start in range(0, generation.rows, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, generation.rows)
        rows = usable[np.searchsorted(usable, start) : np.searchsorted(usable, stop)]
        if rows.size == 0:
            continue
        directions, codes = unit_rows(generation.read(start, stop)[rows - start])
        if (codes != RowStatus.OK).any():
            bad = int(rows[np.flatnonzero(codes != RowStatus.OK)[0]])
            raise BadInput(
                f"row {bad} is marked usable but its feature is zero or not finite; export this "
                "generation again"
            )
        index.add_with_ids(directions.astype(np.float32), rows)
    return index
