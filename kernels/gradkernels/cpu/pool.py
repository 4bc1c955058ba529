"""Worker threads for the CPU loops: as many as torch uses, and never a second OpenMP.

The loops release the GIL, so plain Python threads run them side by side. numba's own layers were
no choice: "workqueue" aborts the process when two threads enter it at once, "omp" brings a second
OpenMP runtime beside torch's and aborts after a fork.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache


def run_all(tasks: Sequence[Callable[[], None]]) -> None:
    """Run tasks at the same time, the first one in this thread; return when all are done.

    Raises:
        Exception: the first error of a task, after all have ended.
    """
    # submit before working here; the pool is keyed by process because threads do not survive fork.
    pool = _pool(os.getpid()) if len(tasks) > 1 else None
    waiting = [pool.submit(task) for task in tasks[1:]] if pool else []
    try:
        for task in tasks[:1]:
            task()
    finally:
        errors = [future.exception() for future in waiting]
    for error in errors:
        if error is not None:
            raise error


@cache
def _pool(pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gradkernels")
