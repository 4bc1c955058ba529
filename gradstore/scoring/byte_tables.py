"""Products of packed signs with a few queries, which never unpack a row.

Letters: m rows, d dimensions, q queries. On a CPU `gradkernels` moves each sign into a float of the
query. Elsewhere bytes are looked up: one holds the signs of 8 dimensions, so its part of a product
is one of 256 sums per query, made beforehand, and a row costs d / 8 additions per query.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.dlpack import from_dlpack

from gradstore.format.quantise import unpack

#: More queries than this are multiplied faster than looked up, and their tables would grow large.
MOST_QUERIES = 32


def packed_products(
    queries: npt.NDArray[np.float32], device: torch.device
) -> Callable[[npt.NDArray[np.uint8]], Tensor]:
    """Return what multiplies rows of packed signs with fixed queries.

    Args:
        queries: (q, d) float32, rotated as the rows are.
        device: where the products are computed.

    Returns:
        (m, ceil(d / 8)) uint8, contiguous -> (m, q) float32 on the device. Equal rows get equal
        bits. Several threads may call it.
    """
    if device.type != "cpu":
        return ByteTables(queries, device).products
    from gradkernels.cpu.signs import SignProducts  # imports numba, which takes its time

    signs = SignProducts(queries)
    return lambda bits: torch.from_numpy(signs.products(bits))


class ByteTables:
    """The sums of each byte's signs with each query: 128 d q bytes."""

    def __init__(self, queries: npt.NDArray[np.float32], device: torch.device) -> None:
        """Make the tables.

        Args:
            queries: (q, d) float32, rotated as the rows are.
            device: where they live and the rows are taken.
        """
        count, dim = queries.shape
        width = -(-dim // 8)
        padded = np.zeros((count, 8 * width), dtype=np.float32)
        padded[:, :dim] = queries
        signs = unpack(np.arange(256, dtype=np.uint8)[:, None], 8).astype(np.float32)
        tables = np.matmul(signs, padded.reshape(count, width, 8).transpose(1, 2, 0))
        self._tables = torch.from_numpy(tables.reshape(256 * width, count)).to(device)
        self._first = torch.arange(0, 256 * width, 256, dtype=torch.int32, device=device)

    def products(self, bits: npt.NDArray[np.uint8]) -> Tensor:
        """Return (m, q) float32 products of (m, ceil(d / 8)) packed rows.

        Each row's sum goes from its first byte to its last, so equal rows get equal bits.
        """
        # DLPack shares read-only memory without a copy and without from_numpy's warning.
        shared = from_dlpack(np.ascontiguousarray(bits)).to(self._first.device)
        return embedding_bag(shared.to(torch.int32) + self._first, self._tables, mode="sum")
