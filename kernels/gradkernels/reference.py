"""The oracle: the projection in float64 NumPy, written to be read, not to be fast."""

from __future__ import annotations

import numpy as np
import torch
from gradkernels.methods import entry_of, rows_of
from gradkernels.randomness import signs, sjlt_entries
from gradkernels.spec import ProjectionSpec, check_spec
from numpy.typing import NDArray
from torch import Tensor

_BLOCK_ENTRIES = 2**22  # matrix entries held at once: 32 MiB of float64
_CANARY_OUTPUTS = 16
_CANARY_PARAMS = 4096  # enough that an SJLT, too, reaches the first outputs


def matrix_rows(
    spec: ProjectionSpec, params: NDArray[np.integer], outputs: int | None = None
) -> NDArray[np.float64]:
    """Return the transposed matrix at parameters (m,), before `scale`: (m, outputs or d) float64.

    Entries are -1, 0, 1 (Rademacher, SJLT, TRAK) or standard normals.
    """
    width = spec.d if outputs is None else outputs
    rows: NDArray[np.float64] = rows_of(spec.method)(spec, params, width)
    return rows


def sign_rows(
    spec: ProjectionSpec, params: NDArray[np.integer], outputs: int
) -> NDArray[np.float64]:
    """Return Rademacher's signs at parameters (m,): (m, outputs) float64."""
    return signs(spec, params, outputs).astype(np.float64)


def sjlt_rows(
    spec: ProjectionSpec, params: NDArray[np.integer], outputs: int
) -> NDArray[np.float64]:
    """Return the SJLT's signs and zeros at parameters (m,): (m, outputs) float64."""
    where, sign = sjlt_entries(spec, params)
    rows = np.zeros((len(params), outputs))
    m, r = np.nonzero(where < outputs)
    rows[m, where[m, r]] = sign[m, r]
    return rows


def scale(spec: ProjectionSpec) -> float:
    """Return the factor that keeps squared lengths on average; 1 for "trak", which has none."""
    return entry_of(spec.method).scale(spec.d, spec.s)


def project_reference(x: NDArray[np.generic] | Tensor, spec: ProjectionSpec) -> NDArray[np.float64]:
    """Project x (b, p), any float type, to (b, d) float64.

    Raises:
        TypeError: x holds no real numbers, or spec is no ProjectionSpec.
        ValueError: x is not (b, spec.p).
    """
    check_spec(spec)
    if isinstance(x, Tensor):
        x = x.detach().to("cpu", torch.float64).numpy()
    try:
        given = np.asarray(x)
    except ValueError as error:
        raise ValueError(f"x has rows of different lengths, not (b, p={spec.p})") from error
    if given.dtype.kind not in "fiu":
        raise TypeError(f"x holds {given.dtype}; give real numbers (b, p={spec.p})")
    dense = np.asarray(given, dtype=np.float64)
    if dense.ndim != 2 or dense.shape[1] != spec.p:
        raise ValueError(f"x has shape {dense.shape}, not (b, p={spec.p})")
    out = np.zeros((dense.shape[0], spec.d))
    step = max(1, _BLOCK_ENTRIES // spec.d)
    for start in range(0, spec.p, step):
        stop = min(start + step, spec.p)
        out += dense[:, start:stop] @ matrix_rows(spec, np.arange(start, stop))
    return out * scale(spec)


def canary(spec: ProjectionSpec) -> NDArray[np.float64]:
    """Return a fingerprint of the matrix: the oracle's first outputs on a fixed sparse vector.

    The vector has 1 + (k % 64) / 64 at parameter k * p // 4096 for k < 4096 (summed where these
    meet). Signs times such numbers add up exactly, so that every machine returns the same bits
    (Gaussian: to the last bits of the platform's log and cos).

    Returns:
        (16,) float64; zeros beyond d when d < 16.

    Raises:
        TypeError: spec is no ProjectionSpec.
    """
    check_spec(spec)
    k = np.arange(_CANARY_PARAMS, dtype=np.int64)
    width = min(spec.d, _CANARY_OUTPUTS)
    rows = matrix_rows(spec, k * spec.p // _CANARY_PARAMS, width)
    out = np.zeros(_CANARY_OUTPUTS)
    out[:width] = (1 + k % 64 / 64) @ rows * scale(spec)
    return out
