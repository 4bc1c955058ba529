"""One pass over stored features: inner products of unit rows with a few queries.

Letters: n rows, d projected dimensions, q queries, m rows of one chunk.

The inner loop works on blocks of `BLOCK_ROWS` rows that start at multiples of `BLOCK_ROWS` and live
in one reused, zero-padded buffer. Every matrix product therefore has the same shape and alignment,
so a row's result depends neither on the chunk size nor on its neighbours nor, on a CPU, on its
position: equal rows get equal bits. Memory is one chunk, whatever n is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from gradkernels.cpu.pool import run_all
from gradkernels.rotation import rotate
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.format.quantise import mean_length, unpack
from gradstore.scoring.byte_tables import MOST_QUERIES, packed_products

#: Rows per matrix product: the size of a store's unit, so that a block is one file's view.
BLOCK_ROWS = 256

#: Row length is padded to this many floats: BLAS edge kernels round differently.
_PAD = 16

#: Stored types that torch turns into the row up to its scale.
_PLAIN_DTYPES = ("int8", "float16", "bfloat16", "float32")

#: Chunks of packed rows that are multiplied at once, so that threads seldom wait for each other.
_CHUNKS_AT_ONCE = 8

#: Norms whose squares neither underflow nor overflow float32; rows outside take the slow path.
_SAFE_NORM = (1e-15, 1e15)

#: (unit, start, stop) -> stored rows [start, stop) of a unit, until the next call.
Reader = Callable[[int, int, int], npt.NDArray[Any]]


class FeatureSource(Protocol):
    """Rows of features; a store's `Generation` is one.

    A source that also has `units` (list of (start_row, stop_row), ascending, covering all rows),
    `raw_reader()` (of `Generation`) and `dtype` of `layout.FeatureDtype` is read as it is stored: a
    cosine does not care about the per-row scale.
    """

    @property
    def rows(self) -> int:
        """n, the number of rows, bad ones included."""

    @property
    def dim(self) -> int:
        """d, the length of a row."""

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """(n,) bool: rows that may be compared."""

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Read rows [start, stop) as (stop - start, d) float32, scaled; bad rows may be NaN."""


@contextmanager
def exact_float32() -> Iterator[None]:
    """Keep float32 products in float32 and out of autograd.

    A trainer may have switched on TF32, bfloat16 products or autocast around us; each would cost
    three digits of a cosine.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with (
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def unit_rows(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Normalize rows of any scale to unit rows.

    Args:
        rows: (m, d), any real dtype.

    Returns:
        (m, d) float64 with unit rows, zeros where a row has no direction; (m,) `RowStatus`
        codes as uint8: OK, NON_FINITE or ZERO_NORM.
    """
    wide = np.asarray(rows, dtype=np.float64)
    finite = np.asarray(np.isfinite(wide).all(axis=1))
    wide = np.where(finite[:, None], wide, 0.0)
    # Dividing by the largest entry first: the square of a small gradient would underflow.
    largest = np.abs(wide).max(axis=1, initial=0.0)
    code = np.full(len(wide), RowStatus.OK, dtype=np.uint8)
    code[largest == 0] = RowStatus.ZERO_NORM
    code[~finite] = RowStatus.NON_FINITE
    wide /= np.where(largest > 0, largest, 1.0)[:, None]
    norm = np.linalg.norm(wide, axis=1)
    wide /= np.where(norm > 0, norm, 1.0)[:, None]
    return wide, code


def as_device(device: str | torch.device) -> torch.device:
    """Return the device of a name.

    Raises:
        BadInput: torch knows no such device, or this machine has none.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"device {str(device)!r} cannot be used: {reason}; take 'cpu'.") from error
    return found


def round_chunk(chunk_rows: int) -> int:
    """Round `chunk_rows` up to a whole number of blocks, in rows; at least one block."""
    return max(1, -(-chunk_rows // BLOCK_ROWS)) * BLOCK_ROWS


class Scan:
    """Inner products of one source's unit rows with fixed queries, chunk by chunk.

    Of 1bit they are the estimates of `quantise.mean_length`, which may lie a little beyond 1.

    Args:
        source: n rows of length d.
        queries: (q, d) float; used as they are, not normalised.
        chunk_rows: the most rows asked for at a time; rounded up to whole blocks.
        device: where the products are computed.
    """

    def __init__(
        self,
        source: FeatureSource,
        queries: npt.NDArray[Any],
        *,
        chunk_rows: int,
        device: torch.device,
    ) -> None:
        self._source = source
        self._queries = np.ascontiguousarray(queries, dtype=np.float64)
        self._device = device
        self._chunk_rows = round_chunk(chunk_rows)
        stored_as = str(getattr(source, "dtype", "")) if hasattr(source, "raw_reader") else ""
        self._packed = stored_as == "1bit"
        width = -(-source.dim // _PAD) * _PAD
        count = self._queries.shape[0]
        padded = np.zeros((count, width), dtype=np.float32)
        padded[:, : source.dim] = self._queries
        self._of_packed: Callable[[npt.NDArray[np.uint8]], Tensor] | None = None
        if self._packed:
            # Products of signs, whose length is the root of d, are divided by that length.
            corrected = self._queries * (np.sqrt(source.dim) / mean_length(source.dim))
            padded[:, : source.dim] = rotate(corrected, device=device)
            if count <= MOST_QUERIES:
                units = padded[:, : source.dim] / np.float32(np.sqrt(source.dim))
                self._of_packed = packed_products(units, device)
        self._right = torch.from_numpy(padded).to(device).T  # (width, q)
        self._block = torch.zeros(BLOCK_ROWS, width, device=device)
        self._products = torch.zeros(self._chunk_rows, count, device=device)
        self._run = 0, np.empty((0, count), dtype=np.float32)
        self._norms = torch.ones(self._chunk_rows, device=device)
        self._raw = self._packed or stored_as in _PLAIN_DTYPES
        # Called once: a source may build the list at every access.
        self._units: Sequence[tuple[int, int]] = cast(Any, source).units if self._raw else ()
        threads = torch.get_num_threads() if self._packed and device.type == "cpu" else 1
        self._readers: list[Reader] = (
            [cast(Any, source).raw_reader() for _ in range(threads)] if self._raw else []
        )

    def chunk(self, start: int, stop: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
        """Score rows [start, stop).

        Args:
            start: first row; a multiple of `BLOCK_ROWS`.
            stop: one past the last row, at most `chunk_rows` further.

        Returns:
            (m, q) float32 products of unit rows and queries, zero for rows with no direction;
            (m,) uint8 `RowStatus` codes. Rows the source itself calls unusable may hold anything.
        """
        if self._of_packed is not None:
            return self._packed_chunk(start, stop), np.zeros(stop - start, dtype=np.uint8)
        whole = None if self._raw else self._source.read(start, stop)
        for low in range(start, stop, BLOCK_ROWS):
            high = min(low + BLOCK_ROWS, stop)
            if whole is None:
                for first, piece in self._raw_pieces(self._readers[0], low, high):
                    signs = unpack(piece, self._source.dim) if self._packed else piece
                    self._load(first - low, signs)
            else:
                self._load(0, whole[low - start : high - start])
            here = slice(low - start, low - start + BLOCK_ROWS)
            torch.mm(self._block, self._right, out=self._products[here])
            torch.linalg.vector_norm(self._block, dim=1, out=self._norms[here])
        m = stop - start
        norms = self._norms[:m].cpu().numpy()
        # Written so that NaN counts as unsafe.
        unsafe = ~((norms > _SAFE_NORM[0]) & (norms < _SAFE_NORM[1]))
        cosines = (self._products[:m] / self._norms[:m, None]).cpu().numpy()
        codes = np.zeros(m, dtype=np.uint8)
        unsafe &= np.asarray(self._source.usable[start:stop], dtype=bool)
        if unsafe.any():
            if whole is None:
                whole = self._source.read(start, stop)
            directions, codes[unsafe] = unit_rows(whole[unsafe])
            cosines[unsafe] = directions @ self._queries.T
        return cosines, codes

    def _packed_chunk(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Take products of a chunk's packed rows from those of a run of chunks made at once."""
        first, products = self._run
        if not first <= start <= stop <= first + len(products):
            first, products = start, self._packed_run(start).cpu().numpy()
            self._run = first, products
        return products[start - first : stop - first]

    def _packed_run(self, start: int) -> Tensor:
        """Multiply the packed rows of some chunks; on a CPU in as many threads as torch has."""
        stop = min(start + _CHUNKS_AT_ONCE * self._chunk_rows, self._source.rows)
        share = round_chunk(-(-(stop - start) // len(self._readers)))
        out = torch.empty(stop - start, self._products.shape[1], device=self._device)

        def multiply(reader: Reader, low: int) -> None:
            assert self._of_packed is not None
            for first, piece in self._raw_pieces(reader, low, min(low + share, stop)):
                out[first - start : first - start + len(piece)] = self._of_packed(piece)

        shares = zip(self._readers, range(start, stop, share), strict=False)
        run_all([partial(multiply, reader, low) for reader, low in shares])
        return out

    def _load(self, offset: int, piece: npt.NDArray[Any]) -> None:
        """Load rows into the block buffer, converted to float32.

        Args:
            offset: row of the buffer that gets the first row.
            piece: (rows, d) in a plain dtype, possibly read-only; copied from.
        """
        halves = piece.dtype == np.uint16  # bfloat16, which NumPy lacks, is stored as its bits
        # DLPack shares read-only memory without a copy and without from_numpy's warning.
        shared = from_dlpack(np.ascontiguousarray(piece.view(np.int16) if halves else piece))
        if halves:
            shared = shared.view(torch.bfloat16)
        target = self._block[offset : offset + piece.shape[0], : piece.shape[1]]
        target.copy_(shared.to(self._device))

    def _raw_pieces(
        self, reader: Reader, start: int, stop: int
    ) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Yield the stored rows of [start, stop), as (first row, view) per unit touched."""
        units = self._units
        index = bisect_right(units, start, key=lambda unit: unit[0]) - 1
        while index < len(units) and units[index][0] < stop:
            first, last = units[index]
            low, high = max(first, start), min(last, stop)
            yield low, reader(index, low - first, high - first)
            index += 1
