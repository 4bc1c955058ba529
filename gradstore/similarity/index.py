"""Nearest rows of one committed generation, asked again and again: FAISS behind one class.

Letters: n rows of the generation, d projected dimensions, q queries, k nearest.

Selection never uses this (it is an exact stream, any k); it serves interactive questions. An index
belongs to a commit and is derived from it, so it may be thrown away at any time.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect
from gradstore.format.layout import RowStatus
from gradstore.scoring.combine import CHUNK_ROWS
from gradstore.scoring.plain_rows import as_numbers, is_source
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
        """Wrap an open FAISS index, or none; use `build`."""
        self._generation = generation
        self._faiss = faiss_index
        self.rows = rows

    @property
    def backend(self) -> Literal["faiss", "torch"]:
        """Backend of searches up to `FAISS_MAX_K`."""
        return "torch" if self._faiss is None else "faiss"

    @classmethod
    def build(
        cls,
        generation: CommittedSource,
        cache_dir: str | Path | None = None,
        *,
        backend: Backend = "auto",
    ) -> FeatureIndex:
        """Open the index of a generation, from the cache if it holds a valid one.

        A cached index that is damaged, older or of another commit is rebuilt, with a warning; it is
        never searched. Where the cache cannot be written the index lives in memory only.

        Args:
            generation: a committed generation.
            cache_dir: the store's `index` folder; None keeps the index in memory.
            backend: "auto" takes FAISS where it is installed, else exact torch; of 1bit rows torch,
                which scans them packed.

        Raises:
            BadInput: the generation is not committed, has no usable row, or FAISS was asked for and
                is not installed or would keep 1bit rows at 32 times their size.
        """
        _check(generation, backend)
        usable = np.flatnonzero(np.asarray(generation.usable, dtype=bool)).astype(np.int64)
        if usable.size == 0:
            raise BadInput(
                f"{generation.name} has no usable row; there is nothing to index; "
                "`gradstore info` says why its rows are skipped"
            )
        faiss = _chosen(generation, backend)
        if faiss is None:
            return cls(generation, None, usable)
        if generation.commit_sha is None:
            raise BadInput(
                f"{generation.name} is not committed; an index belongs to a commit; commit it first"
            )
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
        if cache is not None and path is not None:
            try:
                return cls(generation, _opened(faiss, path, generation.dim, usable, large), usable)
            except ValueError as error:
                cache.warn(error)
        index = _fill(faiss, generation, usable, large)
        if cache is not None:
            cache.publish(lambda target: faiss.write_index(index, str(target)))
        return cls(generation, index, usable)

    def search(
        self, queries: npt.ArrayLike, k: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Find the k rows with the highest cosine to each query; ties go to the lower row.

        Args:
            queries: (q, d) or (d,) float, of any scale.
            k: from 1 to the usable rows.

        Returns:
            (q, k) float32 cosines, highest first; (q, k) int64 rows.

        Raises:
            BadInput: k out of range, other d, or a query that is zero or not finite.
        """
        count = check_k(k, self.rows.size, self._generation.rows)
        wanted = f"(q, {self._generation.dim}) numbers"
        given = np.atleast_2d(as_numbers(queries, "queries", wanted).astype(np.float64))
        if given.ndim != 2 or given.shape[1] != self._generation.dim:
            raise BadInput(
                f"queries have shape {given.shape}; (q, {self._generation.dim}) is needed"
            )
        directions, codes = unit_rows(given)
        if (codes != RowStatus.OK).any():
            bad = int(np.flatnonzero(codes != RowStatus.OK)[0])
            raise BadInput(
                f"query {bad} is {RowStatus(codes[bad]).name.lower()}, so it has no direction; "
                "remove it"
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
        """Run `search` for a few unit queries."""
        if self._faiss is None or k > FAISS_MAX_K:
            return self._exact(directions, k)
        # One more than requested: FAISS breaks a tie at the cut arbitrarily, we take the lower row.
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
        """Run `search` by streaming the stored features; any k."""
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


def _check(generation: object, backend: object) -> None:
    """Raise BadInput unless it is a generation, and a backend that is offered."""
    expect(is_source(generation), "generation", generation, "one of store.generations()")
    expect(backend in get_args(Backend), "backend", backend, " | ".join(get_args(Backend)))


def _chosen(generation: object, backend: Backend) -> ModuleType | None:
    """Return FAISS, or None where torch searches; raise BadInput where FAISS can't."""
    packed = getattr(generation, "dtype", "") == "1bit"
    if packed and backend == "faiss":
        raise BadInput("faiss would keep 1bit rows at 32 times their size; use backend='torch'")
    faiss = None if packed or backend == "torch" else _import_faiss()
    if faiss is None and backend == "faiss":
        raise BadInput("faiss is not installed; install it, or use backend='torch'")
    return faiss


def _import_faiss() -> ModuleType | None:
    """Import FAISS, or return None if it is not installed; lazy because the import is slow."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        _log.info("faiss is not installed; searching with exact torch products")
        return None


def _empty(faiss: ModuleType, dim: int, large: bool) -> Any:  # noqa: ANN401
    """Make an inner-product index without rows; its codes are float16 if `large`, else float32."""
    flat = (
        faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        if large
        else faiss.IndexFlatIP(dim)
    )
    return faiss.IndexIDMap(flat)


def _opened(
    faiss: ModuleType, path: Path, dim: int, usable: npt.NDArray[np.int64], large: bool
) -> Any:  # noqa: ANN401
    """Read an index that is byte for byte the one `_fill` writes, up to the values of its rows.

    The sha256 in index.json says that the file is as its writer left it, not that the writer was
    `_fill`: a foreign index with a fitting index.json could answer with rows that do not exist.
    FAISS reads the file only after the comparison, because it allocates what a header asks for.

    Raises:
        ValueError: size, header, row numbers or the rows' lengths differ.
    """
    header, code_bytes, numbers = _layout(faiss, dim, usable, large)
    expected, found = len(header) + code_bytes + len(numbers), path.stat().st_size
    if found != expected:
        raise ValueError(f"faiss.bin has {found} bytes, not {expected}")
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise ValueError("faiss.bin has another header (kind, d, metric or row count)")
        file.seek(len(header) + code_bytes)
        if file.read() != numbers:
            raise ValueError("faiss.bin has other row numbers than the generation")
    index = faiss.read_index(str(path))
    if not _all_unit(faiss, faiss.downcast_index(index.index), large):
        raise ValueError("faiss.bin has rows that are not of length 1")
    return index


def _layout(
    faiss: ModuleType, dim: int, usable: npt.NDArray[np.int64], large: bool
) -> tuple[bytes, int, bytes]:
    """Return the parts of the file that `_fill` makes: header, size of the codes, row numbers.

    The header is that of an empty index with the counts put in: rows, and the length of the codes,
    which FAISS counts in bytes or, of float32, in numbers.
    """
    n, empty = len(usable), _empty(faiss, dim, large)
    flat = faiss.downcast_index(empty.index)
    code_bytes = n * int(flat.code_size)
    empty.ntotal = flat.ntotal = n
    counts = (code_bytes if large else n * dim), n
    codes_count, rows_count = (np.array([count], "<u8").tobytes() for count in counts)
    header = faiss.serialize_index(empty).tobytes()[: -2 * len(rows_count)] + codes_count
    return header, code_bytes, rows_count + usable.astype("<i8").tobytes()


def _all_unit(faiss: ModuleType, inner: Any, large: bool) -> bool:  # noqa: ANN401
    """Return whether every stored row has length 1, up to the rounding of its type."""
    stored = faiss.rev_swig_ptr(inner.codes.data(), inner.ntotal * inner.code_size)
    rows = stored.view(np.float16 if large else np.float32).reshape(inner.ntotal, inner.d)
    with np.errstate(invalid="ignore", over="ignore"):  # of a damaged code: it is not near 1
        return all(
            np.allclose(np.linalg.norm(block.astype(np.float64), axis=1), 1.0, rtol=0, atol=1e-2)
            for block in np.split(rows, range(BLOCK_ROWS, inner.ntotal, BLOCK_ROWS))
        )


def _fill(
    faiss: ModuleType,
    generation: FeatureSource,
    usable: npt.NDArray[np.int64],
    large: bool,
) -> Any:  # noqa: ANN401
    """Build a FAISS inner-product index of the unit rows, keyed by their dataset row numbers."""
    index = _empty(faiss, generation.dim, large)
    for rows, units in usable_units(generation, usable):
        index.add_with_ids(units, rows)
    return index


def usable_units(
    generation: FeatureSource, usable: npt.NDArray[np.int64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Yield row numbers (m,) and their unit rows (m, d) float32, block by block.

    Args:
        generation: whose rows.
        usable: (n,) row numbers, ascending.

    Raises:
        BadInput: a row marked usable that has no direction.
    """
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
        yield rows, directions.astype(np.float32)
