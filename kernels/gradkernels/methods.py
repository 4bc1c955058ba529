"""The table of projections: everything that there is of a method, named in one place.

Functions and classes are named as "module:name" and imported when first asked for, since Triton and
numba take their time. A method that lacks something is refused by name: nothing here, nor whoever
asks here, falls back on another method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A method's line of the table; no field has a default, so that none is forgotten.

    Attributes:
        stream: number that its random words are keyed with. It decides every bit of the matrix:
            append only, never change one, never give one to another method, not even a removed
            method's.
        rows: of the oracle, (spec, parameters (m,), outputs) -> entries (m, outputs) float64,
            before `scale`.
        scale: (d, s) -> factor that keeps squared lengths on average.
        sparse: whether a parameter reaches s outputs alone, s <= d; so that making its part of the
            matrix costs less than adding it, and gradients are projected as they come, however few.
        whole: whether it wants a row's whole gradient at once, never a part.
        sums: backend -> what makes unscaled sums of (spec, rows) or, under "torch" and "triton", of
            (spec, rows, device); `dispatch` says what it asks of them.
    """

    stream: int
    rows: str
    scale: Callable[[int, int], float]
    sparse: bool
    whole: bool
    sums: Mapping[str, str]


def _by_outputs(d: int, s: int) -> float:
    return 1 / math.sqrt(d)


def _by_nonzeros(d: int, s: int) -> float:
    return 1 / math.sqrt(s)


def _unscaled(d: int, s: int) -> float:
    return 1.0


#: `spec.Method` has the same names, for whoever checks a user's values.
TABLE: dict[str, Entry] = {
    "rademacher": Entry(
        stream=0,
        rows="gradkernels.reference:sign_rows",
        scale=_by_outputs,
        sparse=False,
        whole=False,
        sums={
            "torch": "gradkernels.portable:rademacher_sums",
            "numba": "gradkernels.cpu.sums:RademacherSums",
            "triton": "gradkernels.gpu.sums:RademacherSums",
            "int8": "gradkernels.cpu.int8:RademacherSums",
        },
    ),
    "gaussian": Entry(
        stream=1,
        rows="gradkernels.randomness:gaussians",
        scale=_by_outputs,
        sparse=False,
        whole=False,
        sums={
            "torch": "gradkernels.portable:gaussian_sums",
            "numba": "gradkernels.cpu.sums:GaussianSums",
        },
    ),
    "sjlt": Entry(
        stream=2,
        rows="gradkernels.reference:sjlt_rows",
        scale=_by_nonzeros,
        sparse=True,
        whole=False,
        sums={
            "torch": "gradkernels.portable:SjltSums",
            "numba": "gradkernels.cpu.sums:SjltSums",
            "triton": "gradkernels.gpu.sums:SjltSums",
        },
    ),
    "trak": Entry(
        stream=3,  # of no use: TRAK draws from a generator of torch
        rows="gradkernels.published:matrix_rows",
        scale=_unscaled,
        sparse=False,
        whole=True,
        sums={"trak": "gradkernels.published:PublishedSums"},
    ),
}


def entry_of(method: str) -> Entry:
    """Return a method's line of the table.

    Raises:
        ValueError: there is none; the message lists the methods.
    """
    if method not in TABLE:
        raise ValueError(f"method={method!r} is not one of {', '.join(TABLE)}")
    return TABLE[method]


def doing(backend: str) -> list[str]:
    """List the methods that a backend does."""
    return [method for method, entry in TABLE.items() if backend in entry.sums]


def rows_of(method: str) -> Any:  # noqa: ANN401 - named by text
    """Return the oracle's function of a method, see `Entry.rows`."""
    return _named(entry_of(method).rows)


def sums_of(method: str, backend: str) -> Any:  # noqa: ANN401 - named by text
    """Return what makes a method's sums on a backend, see `Entry.sums`.

    Raises:
        ValueError: the backend does not do the method.
    """
    check_backend(method, backend)
    return _named(entry_of(method).sums[backend])


def check_backend(method: str, backend: str) -> None:
    """Raise ValueError, naming both, where a backend does not do a method."""
    if backend not in entry_of(method).sums:
        raise ValueError(
            f"backend={backend!r} does {', '.join(doing(backend)) or 'nothing'}, "
            f"not method={method!r}; "
            f"that has {', '.join(entry_of(method).sums) or 'no backend at all'}"
        )


def _named(place: str) -> Any:  # noqa: ANN401
    """Import what "module:name" names."""
    module, name = place.split(":")
    return getattr(import_module(module), name)
