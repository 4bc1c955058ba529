"""Forecast of a long pass from the rate of its first batches, told in one line before the rest."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

#: Seconds of a pass after which its rate is known well enough.
LISTEN_SECONDS = 1.0

#: Seconds that a pass takes in all, from which on it is told.
LONG_SECONDS = 30.0


class Pace:
    """Rate of a pass over rows.

    Args:
        work: rows of the pass; or (n,) the cost of each, in the order they are taken, where they
            differ (the first batches of a pass hold its longest rows).
        tell: called once with the seconds of the whole pass, if it is a long one.
    """

    def __init__(self, work: int | npt.NDArray[np.int64], tell: Callable[[float], None]) -> None:
        self._costs = None if isinstance(work, int) else np.cumsum(work, dtype=np.float64)
        self._rows = work if isinstance(work, int) else len(work)
        self._tell, self._done, self._told = tell, 0, False
        self._began = time.perf_counter()

    def advance(self, rows: int) -> None:
        """Count `rows` as done; tell the forecast as soon as there is one."""
        self._done = min(self._done + rows, self._rows)
        passed = time.perf_counter() - self._began
        if self._told or passed < LISTEN_SECONDS or not self._done:
            return
        self._told = True
        if (seconds := passed / self._share()) >= LONG_SECONDS:
            self._tell(seconds)

    def _share(self) -> float:
        """Return the share of the pass's cost that is done."""
        if self._costs is None or not self._costs[-1]:
            return self._done / self._rows
        return float(self._costs[self._done - 1] / self._costs[-1])


def product_seconds(multiplications: float) -> float:
    """Forecast the seconds of matrix products on this machine's CPU, from a product of 0.1 s.

    Args:
        multiplications: of all products, such as queries x rows x dimensions.
    """
    import torch

    x, done, began = torch.ones(512, 512), 0, time.perf_counter()
    with torch.no_grad():
        while (passed := time.perf_counter() - began) < 0.1:
            x @ x
            done += 1
    return multiplications * passed / (done * 512**3)


def duration(seconds: float) -> str:
    """Show seconds in the unit that suits them.

    >>> duration(12.3), duration(700), duration(40_000), duration(0.02)
    ('12 s', '12 min', '11.1 h', '0.02 s')
    """
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Show bytes in the unit that suits them, with at most three digits.

    >>> size(3 << 29), size(15 << 20), size(2_280_000), size(1023 << 10), size(12)
    ('1.5 GiB', '15 MiB', '2.17 MiB', '0.999 MiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB" if count < 999.5 else f"{count:,.0f} TiB"


def long_pass(what: str, rows: int, seconds: float, stored_bytes: int = 0) -> str:
    """Write the one line that is told of a long pass.

    >>> long_pass("gradients of train/5", 100_000, 11_000, 3 << 29)
    'gradients of train/5: 100,000 rows, about 3.1 h by the first rows, 1.5 GiB in the store'
    >>> long_pass("gradients of train/5", 960, 40, 15 << 20)
    'gradients of train/5: 960 rows, about 40 s by the first rows, 15 MiB in the store'
    """
    stored = f", {size(stored_bytes)} in the store" if stored_bytes else ""
    return f"{what}: {rows:,} rows, about {duration(seconds)} by the first rows{stored}"
