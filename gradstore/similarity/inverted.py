"""Lists of near rows (FAISS IVF), and how many of the true nearest rows they give.

Letters: n usable rows, d projected dimensions, h held-out rows, k nearest.

Rows lie in lists, each around a centroid; a search looks through the `nprobe` lists whose centroids
are nearest. What that misses is measured against the exact answer, on stored rows that the
centroids were not trained on: training rows when the index is built, and a target set's rows when
they are first asked for, since these may lie elsewhere. Recalls of every nprobe tried are kept
beside the index.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.format.layout import INDEX_KINDS
from gradstore.scoring.scan import FeatureSource, unit_rows
from gradstore.similarity.index import FLAT_LIMIT_BYTES, CommittedSource
from gradstore.similarity.index_cache import IndexCache
from gradstore.similarity.list_training import (
    SEED,
    Truth,
    neighbours,
    on_gpu,
    trained,
    units_at,
)
from gradstore.similarity.recalls import NEAREST, WIDER, Curve, Measured, probes, share, smaller

#: Rows for each list that centroids are trained on, and the fewest that a list holds on average;
#: below 39 FAISS warns that centroids are poorly founded.
ROWS_A_LIST = 40
#: Fewer lists than these cut no work worth an index.
LEAST_LISTS = 16
#: Most rows of a kind whose nearest are found both ways, to measure.
HELD_OUT = 200
#: Largest number of lists that a search looks through: that of GPU indexes.
MOST_PROBES = 2048
#: No further nprobe is tried from this recall on.
_ENOUGH = 0.999


def lists_for(n: int) -> int:
    """Compute the number of lists of n rows: 4 sqrt(n), and `ROWS_A_LIST` rows a list at least.

    Held-out rows are not counted among these.

    Returns:
        0 where that leaves fewer than `LEAST_LISTS`.

    Examples:
        >>> lists_for(1_000_000), lists_for(10_000), lists_for(710)
        (4000, 245, 0)
    """
    lists = min(round(4 * math.sqrt(n)), (n - _held(n)) // ROWS_A_LIST)
    return lists if lists >= LEAST_LISTS else 0


class InvertedLists:
    """Lists of the usable rows of one generation; made by `build`.

    Attributes:
        lists: number of lists.
        curves: what was measured: on held-out training rows under "", and on a target set's rows
            under its commit.
        on_gpu: whether a GPU searches.
    """

    def __init__(
        self,
        faiss: Any,  # noqa: ANN401
        index: Any,  # noqa: ANN401
        generation: CommittedSource,
        curves: dict[str, Curve],
        cache: IndexCache | None = None,
    ) -> None:
        """Wrap an open FAISS index; use `build`."""
        self._faiss, self._index, self._generation, self._cache = faiss, index, generation, cache
        self.lists, self.curves = int(index.nlist), curves
        self.on_gpu = type(index).__name__.startswith("Gpu")

    @classmethod
    def build(
        cls, generation: CommittedSource, cache_dir: str | Path | None = None
    ) -> InvertedLists | None:
        """Open the lists of a generation, from the cache if it holds valid ones.

        Cached lists that are damaged, of another commit or of another release of FAISS are built
        again, with a warning; they are never searched. Building trains centroids on a sample of
        40 rows a list, by a fixed seed, reads the rows once, and measures. In memory it takes the
        rows in float32, above 1 GiB of them in float16, and the sample.

        Args:
            generation: a committed generation.
            cache_dir: the store's `index` folder; None keeps the lists in memory.

        Returns:
            None where the usable rows are too few for lists.

        Raises:
            BadInput: FAISS cannot be imported, the generation is not committed, or of 1bit rows.
        """
        if getattr(generation, "dtype", "") == "1bit":
            raise BadInput(
                f"{generation.name} holds 1bit rows, which lists would keep at 32 times their size,"
                " and whose estimated cosines lists don't keep; ask for the exact answer, whose "
                "scan reads them packed, or ask a store of int8 or float16 rows"
            )
        if generation.commit_sha is None:
            raise BadInput(
                f"{generation.name} is not committed; an index belongs to a commit; commit it first"
            )
        try:
            faiss: Any = importlib.import_module("faiss")
        except ImportError as error:
            raise BadInput(
                f"an approximate answer needs faiss, which cannot be imported ({error}). It comes "
                "with DataFlex: install dataflex-gradstore again (faiss-gpu and faiss-cpu share a "
                "folder, so keep one of them), or ask for the exact answer"
            ) from None
        rows = _usable(generation)
        if not (lists := lists_for(rows.size)):
            return None
        large = rows.size * generation.dim * 4 > FLAT_LIMIT_BYTES
        cache = None
        if cache_dir is not None:
            identity = _identity(generation, faiss, rows.size, lists, large)
            cache = IndexCache(Path(cache_dir), identity, INDEX_KINDS[1])
            opened = _cached(faiss, cache, rows, identity)
            if opened is not None:
                index, curves = opened
                return cls(faiss, on_gpu(faiss, index), generation, curves, cache)
        draw, held = np.random.default_rng(SEED).permutation(rows), _held(rows.size)
        held_out, sample = np.sort(draw[:held]), np.sort(draw[held : held + ROWS_A_LIST * lists])
        index = trained(faiss, generation, sample, lists, large)
        queries = units_at(generation, held_out)
        truth = neighbours(generation, rows, queries, held_out, index.add_with_ids)
        made = cls(faiss, on_gpu(faiss, index), generation, {}, cache)
        made.curves[""] = made._measure(queries, held_out, truth)
        if cache is not None:
            cache.publish(lambda target: faiss.write_index(index, str(target)), made._kept())
        return made

    def curve(self, targets: FeatureSource) -> Curve:
        """Return what was measured on training rows and on a target set's, the smaller recalls.

        A target set that is new here is measured first, in one pass over the training rows.

        Args:
            targets: a committed generation; up to 200 of its rows are measured on.
        """
        key = str(getattr(targets, "commit_sha", ""))
        if key not in self.curves:
            usable = _usable(targets)
            chosen = np.sort(np.random.default_rng(SEED).permutation(usable)[:HELD_OUT])
            queries, nobody = units_at(targets, chosen), np.full(len(chosen), -1)
            rows = _usable(self._generation)
            truth = neighbours(self._generation, rows, queries, nobody)
            self.curves[key] = self._measure(queries, nobody, truth)
            if self._cache is not None:
                self._cache.record(self._kept())
        return smaller(self.curves[""], self.curves[key])

    def _kept(self) -> dict[str, Any]:
        return {key: asdict(curve) for key, curve in self.curves.items()}

    def search(
        self, queries: npt.NDArray[np.floating[Any]], k: int, nprobe: int
    ) -> npt.NDArray[np.int64]:
        """Look through the nearest lists; a wider look where they hold fewer than k rows.

        Args:
            queries: (q, d), of any scale.
            k: how many rows.
            nprobe: lists to look through.

        Returns:
            (q, k) int64 rows, nearest first as the lists keep them; -1 where no row is left.
        """
        unit, most = unit_rows(queries)[0].astype(np.float32), min(self.lists, MOST_PROBES)
        rows = np.full((len(unit), k), -1, dtype=np.int64)
        short = np.arange(len(unit))
        while short.size:
            parameters = self._faiss.SearchParametersIVF(nprobe=nprobe)
            rows[short] = self._index.search(unit[short], k, params=parameters)[1]
            if nprobe >= most:
                break
            short = short[(rows[short] < 0).any(axis=1)]
            nprobe = min(2 * nprobe, most)
        return rows

    def _measure(
        self, queries: npt.NDArray[np.float32], own: npt.NDArray[np.int64], truth: Truth
    ) -> Curve:
        """Compare the lists' answers to each row, and to its opposite, with the truth."""
        found, most = [], min(self.lists, MOST_PROBES)
        for nprobe in probes(most):
            sides = []
            for sign, nearest in zip((1, -1), truth, strict=True):
                # Each as a query is asked; the row itself comes on top.
                sides.append(
                    [
                        share(
                            self.search(sign * queries, WIDER * k + 1, nprobe), own, nearest[:, :k]
                        )
                        for k in NEAREST
                    ]
                )
            found.append(Measured(nprobe, tuple(map(min, zip(*sides, strict=True)))))
            if min(found[-1].recall) >= _ENOUGH:
                break
        return Curve(len(own), found)


def _usable(source: FeatureSource) -> npt.NDArray[np.int64]:
    return np.flatnonzero(np.asarray(source.usable, dtype=bool)).astype(np.int64)


def _held(n: int) -> int:
    """Return h: at most a tenth of the rows."""
    return min(HELD_OUT, n // 10)


def _identity(
    generation: CommittedSource, faiss: Any, n: int, lists: int, large: bool  # noqa: ANN401
) -> dict[str, str | int]:  # fmt: skip
    return {
        "commit_sha": str(generation.commit_sha),
        "generation": generation.name,
        "rows": generation.rows,
        "indexed_rows": n,
        "dim": generation.dim,
        "kind": "ivf-fp16" if large else "ivf-flat",
        "lists": lists,
        "seed": SEED,
        "rows_a_list": ROWS_A_LIST,
        "faiss_version": str(faiss.__version__),
    }


def _cached(
    faiss: Any,  # noqa: ANN401
    cache: IndexCache,
    rows: npt.NDArray[np.int64],
    identity: dict[str, str | int],
) -> tuple[Any, dict[str, Curve]] | None:
    """Read lists that hold exactly these rows, and what was measured; None where there are none."""
    path = cache.sound_file()
    if path is None:
        return None
    try:
        if "" not in (cache.measured or {}):
            raise ValueError("index.json says no recall")
        curves = {key: Curve.of(kept) for key, kept in cache.measured.items()}
        index = faiss.read_index(str(path))
        if (index.d, index.nlist) != (identity["dim"], identity["lists"]):
            raise ValueError(f"faiss.bin has {index.nlist} lists of {index.d} dimensions")
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise ValueError("faiss.bin has another metric")
        if not np.array_equal(np.sort(_numbers(faiss, index)), rows):
            raise ValueError("faiss.bin has other row numbers than the generation")
        return index, curves
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        cache.warn(error)
        return None


def _numbers(faiss: Any, index: Any) -> npt.NDArray[np.int64]:  # noqa: ANN401
    """Return the row numbers of all lists, in their order."""
    lists = index.invlists
    parts = [
        faiss.rev_swig_ptr(lists.get_ids(one), size).copy()
        for one in range(index.nlist)
        if (size := lists.list_size(one))
    ]
    return np.concatenate(parts)
