"""The pass over stored features on a Ray cluster: ranges of rows are tasks that return scores.

Each process reads the store itself. Ray carries the queries, which are means over target rows and
are computed once, the numbers of rows, and (rows, q) sums; features of rows never.
"""

from __future__ import annotations

import functools
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstore.cluster.connection import Cluster, connected, could_not_start
from gradstore.cluster.options import RayOptions
from gradstore.errors import BadInput, StoreError, StoreIOError
from gradstore.scoring.combine import (
    RowSums,
    check_any_usable,
    check_pass,
    start_codes,
    weighted_queries,
)
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.scan import exact_float32, round_chunk
from gradstore.scoring.subtasks import Subtask
from gradstore.storage.location import Location
from gradstore.store.generation import Generation
from gradstore.store.reader import open_store

#: Rows of a task at most; its sums wait in memory until those before are kept.
TASK_ROWS = 1 << 16

#: Tasks that each process gets at least, where there are rows enough: so that none waits long.
TASKS_EACH = 4

#: Tasks in flight or waiting to be kept, for each process.
AHEAD = 3

#: Seconds between two looks at the cluster while no task ends.
WAIT_SECONDS = 1.0

Keep = Callable[[int, int, npt.NDArray[np.float32]], None]
Sums = tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class ScanTask:
    """The scan that ranges are taken of, as every process is told of it.

    Attributes:
        store: folder, the same on all nodes, or place in a bucket.
        trains: full name and seal of the commit of each checkpoint's train rows.
        queries: (q, d) float64 of each, weighted.
        product: of a train row and a target row.
        chunk_rows: rows read at a time.
    """

    store: Location
    trains: tuple[tuple[str, str], ...]
    queries: tuple[npt.NDArray[np.float64], ...]
    product: InnerProduct
    chunk_rows: int


@dataclass(frozen=True)
class Failed:
    """A failure on a node, in place of sums: errors do not keep their fields on the way."""

    code: int
    message: str


class FailedElsewhere(StoreError):
    """A failure of a task, with its message and exit code."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.exit_code = failed.code  # type: ignore[misc]


@dataclass(frozen=True)
class RayScan:
    """A pass like `combine`'s on a Ray cluster, with the same bits on a CPU.

    Attributes:
        store: the store that all features are of.
        options: of the cluster; each of its processes is an actor of theirs.
        told: called with a line about the cluster.
    """

    store: Location
    options: RayOptions
    told: Callable[[str], None] = lambda _: None

    def combine(
        self,
        checkpoints: Sequence[CheckpointFeatures],
        subtasks: Sequence[Subtask],
        keep: Keep,
        device: torch.device,
        chunk_rows: int,
        product: InnerProduct,
    ) -> npt.NDArray[np.uint8]:
        """Do what `combine` does; a killed process's ranges are computed again by others.

        Raises:
            BadInput: as `combine` raises it; another device than a CPU, rows of no store, Ray is
                not installed, no cluster with room, or a node without this DataFlex.
            StoreIOError: the cluster ended.
            StoreError: whatever failed in a task, with its exit code; 1 and its traceback of a bug.
        """
        check_pass(checkpoints, chunk_rows, product)
        if device.type != "cpu":
            raise BadInput(f"device is {device.type}; with an engine take 'cpu'.")
        trains = _generations(checkpoints)
        codes = start_codes(trains)
        with exact_float32():
            queries = tuple(weighted_queries(checkpoints, subtasks, product, device))
        names = tuple((train.name, train.commit_sha) for train in trains)
        store = self.store.resolve() if isinstance(self.store, Path) else self.store
        task = ScanTask(store, names, queries, product, round_chunk(chunk_rows))
        with connected(replace(self.options, gpus_per_actor=0.0), self.told) as cluster:
            ranges = ranges_of(codes.size, cluster.actors, task.chunk_rows)
            for (start, stop), (sums, found) in zip(
                ranges, _in_order(cluster, task, ranges), strict=True
            ):
                codes[start:stop] = found
                for low in range(start, stop, task.chunk_rows):
                    high = min(low + task.chunk_rows, stop)
                    keep(low, high, sums[low - start : high - start])
        check_any_usable(codes)
        return codes


def ranges_of(rows: int, actors: int, chunk_rows: int) -> list[tuple[int, int]]:
    """Cut rows into the ranges of the tasks, in whole chunks.

    >>> ranges_of(10_000, 2, 4096)
    [(0, 4096), (4096, 8192), (8192, 10000)]
    """
    fair = rows // (TASKS_EACH * actors)
    step = max(1, min(fair, TASK_ROWS) // chunk_rows) * chunk_rows
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _generations(checkpoints: Sequence[CheckpointFeatures]) -> list[Generation]:
    trains = [checkpoint.train for checkpoint in checkpoints]
    generations = [train for train in trains if isinstance(train, Generation)]
    if len(generations) != len(trains):
        raise BadInput("an engine scores generations of a store; arrays are scored without one.")
    return generations


def _in_order(
    cluster: Cluster, task: ScanTask, ranges: Sequence[tuple[int, int]]
) -> Iterator[Sums]:
    """Yield the sums of each range, in order; a few more than there are processes are on the way.

    Ray runs a task again, elsewhere, whose process or node has died.
    """
    ray = cluster.ray
    remote, options = ray.remote(sums_of_range), cluster.actor_options()
    shared = ray.put(task)
    running: dict[Any, int] = {}
    done: dict[int, Sums] = {}
    kept = begun = 0
    while kept < len(ranges):
        ahead = min(len(ranges), kept + AHEAD * cluster.actors)
        while begun < ahead and len(running) < cluster.actors:
            start, stop = ranges[begun]
            named = remote.options(**options, name=f"scores of rows {start} to {stop}")
            running[cluster.ask(functools.partial(named.remote, shared, start, stop))] = begun
            begun += 1
        ready, _ = ray.wait(list(running), timeout=WAIT_SECONDS)
        cluster.check()
        for ref in ready:
            done[running.pop(ref)] = _result(cluster, ref)
        while kept in done:
            yield done.pop(kept)
            kept += 1


def _result(cluster: Cluster, ref: Any) -> Sums:  # noqa: ANN401 - a reference of Ray's
    ray = cluster.ray
    try:
        answer = cluster.ask(functools.partial(ray.get, ref))
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError,
            ray.exceptions.OutOfMemoryError, ray.exceptions.ObjectLostError) as error:  # fmt: skip
        raise StoreIOError(
            "the processes that scored some rows died again and again, of too little memory perhaps"
            ". Take fewer with --actors, or give each more of a node with --cpus-per-actor."
        ) from error
    except ray.exceptions.RayTaskError as error:  # what a task itself meets it returns
        raise could_not_start("a process that scores rows", error) from error
    if isinstance(answer, Failed):
        raise FailedElsewhere(answer)
    sums: Sums = answer
    return sums


def sums_of_range(task: ScanTask, start: int, stop: int) -> Sums | Failed:
    """Sum a range of rows, in a process of the cluster.

    Returns:
        (stop - start, q) float32, nan where a row is not usable, and (stop - start,) uint8 codes;
        or the failure.
    """
    try:
        trains = _opened(task.store, task.trains)
        codes = start_codes(trains)[start:stop].copy()
        sums = np.empty((stop - start, len(task.queries[0])), dtype=np.float32)
        with exact_float32():
            summed = RowSums(trains, task.queries, task.product, torch.device("cpu"),
                             task.chunk_rows)  # fmt: skip
            for low in range(0, stop - start, task.chunk_rows):
                here = codes[low : low + task.chunk_rows]
                sums[low : low + here.size] = summed.chunk(start + low, here)
    except Exception as error:
        return _failed(error)
    return sums, codes


def _failed(error: Exception) -> Failed:
    """Put a task's failure into words: a bug's are its traceback."""
    code, said = StoreError.exit_code, traceback.format_exc().strip()
    if isinstance(error, StoreError):
        code, said = error.exit_code, str(error)
    elif isinstance(error, MemoryError | OSError):
        code, said = StoreIOError.exit_code, f"{type(error).__name__}: {error}"
    return Failed(code, f"{said} (on {socket.gethostname()})")


@functools.lru_cache(maxsize=1)
def _opened(path: Location, names: tuple[tuple[str, str], ...]) -> list[Generation]:
    """Open the train rows of a store, once per process."""
    if isinstance(path, Path) and not path.exists():
        raise BadInput(
            f'no store "{path}" here; a Ray cluster needs a file system that all its nodes see.'
        )
    store = open_store(path)
    generations = [store.generation(name) for name, _ in names]
    for generation, (name, seal) in zip(generations, names, strict=True):
        if generation.commit_sha != seal:
            raise BadInput(f'"{path}" has another {name} here; all nodes must see the same store.')
    return generations
