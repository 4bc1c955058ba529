"""The published projection: features with the bits of TRAK's `BasicProjector` on a CPU.

LESS projects gradients through TRAK (arXiv 2303.14186; the package `traker`), whose matrices come
from torch's generator, 128 outputs at a time, each with a seed of its own. Here TRAK makes them
itself, in float32, with the seed given and model 0, so that features can be held against another
program's byte by byte. That takes whole gradients, 512 bytes of matrix a parameter, and many times
the time of any other method; entries are +-1, not divided by sqrt(d). The bits are those of this
machine's torch and BLAS; from a GPU gradients come to the CPU, whose matrix is another one.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from gradkernels.portable import full_float32
from gradkernels.spec import ProjectionSpec
from numpy.typing import NDArray
from torch import Tensor

#: Outputs whose matrix is made at once, as LESS's script sets it.
BLOCK_OUTPUTS = 128
#: Rows that LESS's script projects at once. BLAS rounds otherwise for one row than for several:
#: fewer are filled up with zeros, so that a row's bits do not depend on how many came with it.
BATCH_ROWS = 16


def missing() -> str | None:
    """Return why TRAK can't be used here; None where it can."""
    if importlib.util.find_spec("trak") is None:
        return "the package traker (TRAK) is not installed; pip install traker"
    return None


def published_bytes(spec: ProjectionSpec, rows: int) -> int:
    """Return the bytes of RAM that projecting rows takes: the matrix of a block, and gradients.

    Args:
        spec: a "trak" projection.
        rows: b, rows held at once.
    """
    return 4 * spec.p * (min(spec.d, BLOCK_OUTPUTS) + rows + BATCH_ROWS)


class PublishedSums:
    """Whole gradients of a batch, (b, p) float32 in RAM, until they are projected.

    Blocks are kept; one of all p parameters is projected at once, and not kept.
    """

    def __init__(self, spec: ProjectionSpec, rows: int) -> None:
        self._spec = spec
        self._rows = rows
        self._kept: Tensor | None = None
        self._sums: Tensor | None = None

    def add(self, block: Tensor, start: int) -> None:
        """Add block (b, m) float32 of parameters [start, start + m)."""
        block = block.to("cpu")
        if block.shape[1] == self._spec.p:
            projected = _project(block, self._spec)
            self._sums = projected if self._sums is None else self._sums + projected
            return
        if self._kept is None:
            self._kept = torch.zeros(self._rows, self._spec.p)
        self._kept[:, start : start + block.shape[1]] += block

    def total(self) -> Tensor:
        """Return the projection of what was added so far: (b, d) float32 on the CPU."""
        parts = [] if self._sums is None else [self._sums]
        if self._kept is not None:
            parts.append(_project(self._kept, self._spec))
        return sum(parts[1:], parts[0]) if parts else torch.zeros(self._rows, self._spec.d)


def matrix_rows(
    spec: ProjectionSpec, params: NDArray[np.integer], outputs: int
) -> NDArray[np.float64]:
    """Return the transposed matrix at parameters (m,): (m, outputs) float64 of -1 and 1.

    Raises:
        ValueError: TRAK is not installed.
    """
    rows = np.empty((len(params), outputs))
    for low, matrix in _blocks(spec, outputs):
        high = min(low + matrix.shape[1], outputs)
        rows[:, low:high] = matrix.numpy()[params, : high - low]
    return rows


def _project(x: Tensor, spec: ProjectionSpec) -> Tensor:
    """Project x (b, p) float32 on the CPU: (b, d) float32."""
    out = torch.empty(len(x), spec.d)
    batches = list(torch.split(x, BATCH_ROWS))
    left = BATCH_ROWS - len(batches[-1])
    if left:
        batches[-1] = torch.cat([batches[-1], x.new_zeros(left, spec.p)])
    for low, matrix in _blocks(spec, spec.d):
        for first, batch in zip(range(0, len(x), BATCH_ROWS), batches, strict=True):
            part = out[first : first + BATCH_ROWS, low : low + matrix.shape[1]]
            with full_float32():
                part.copy_((batch @ matrix)[: len(part)])
    return out


def _blocks(spec: ProjectionSpec, outputs: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first output, and the (p, w) float32 matrix, of each block; the next overwrites it.

    Args:
        spec: a "trak" projection.
        outputs: columns up to this one are wanted.
    """
    why = missing()
    if why is not None:
        raise ValueError(f"method='trak' cannot be computed: {why}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its source holds an escape that Python warns of
        from trak.projectors import BasicProjector, ProjectionType
    projector = BasicProjector(
        spec.p, spec.d, spec.seed, ProjectionType.rademacher, torch.device("cpu"),
        block_size=BLOCK_OUTPUTS, dtype=torch.float32, model_id=0,
    )  # fmt: skip
    for number, state in enumerate(projector.generator_states):
        low = number * projector.block_size
        if low >= outputs:
            return
        if number:  # it made the first by itself
            projector.generate_sketch_matrix(state)
        yield low, projector.proj_matrix[:, : min(projector.block_size, spec.d - low)]
