"""Work that takes long: done by a few threads, once per question, with progress and an end.

A request waits for its job some seconds and gets the result, or else the job's address. The same
question asked meanwhile joins the same job; asked later it is answered from a bounded cache. A job
knows who asked for it, and is cancelled once nobody of them wants it any more.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, cast

from gradstore.serve.problems import Cancelled, Missing, TooMany

State = Literal["queued", "running", "done", "failed", "cancelled"]

#: Scans at the same time: one scan's products already use all cores.
WORKERS = 2

#: Jobs that may wait.
QUEUED = 64

#: Finished jobs that can still be looked at.
KEPT = 200

#: Bytes of all results kept.
CACHE_BYTES = 64 << 20

#: Seconds since its last request after which a name counts for nothing: the asker is gone. A
#: request waits for 60 at most.
PATIENCE = 90.0

#: The name of who asks, for the length of a request; those who give none share "".
WAITER: ContextVar[str] = ContextVar("waiter", default="")


class Sized(Protocol):
    """A result that knows the memory it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes."""


Result = TypeVar("Result", bound=Sized)


class Advance(Protocol):
    """Report of a computation: rows just done, and what it is at where that is not rows."""

    def __call__(self, rows: int, stage: str | None = None) -> None:
        """Count rows as done; a stage takes the place of the one before."""


#: Computes a result; reports by its argument.
Compute = Callable[[Advance], Result]


@dataclass
class Job:
    """One computation.

    Attributes:
        id: what it is asked by.
        kind: `score` or `map`.
        rows: all rows of the pass.
        done: rows done.
        state: where it is.
        stage: what it is at, where that is not counted in rows; else "".
        created: seconds since 1970.
        error: the message of a failure.
        stop: set when it is to end early.
        waiters: names of those who asked for it, with the time of their last request; empty once
            it has ended.
    """

    id: str
    kind: str
    rows: int
    done: int = 0
    state: State = "queued"
    stage: str = ""
    created: float = field(default_factory=time.time)
    error: str | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    waiters: dict[str, float] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Return what `GET /v1/jobs/{id}` shows."""
        share = 1.0 if self.state == "done" else min(self.done / max(self.rows, 1), 1.0)
        return {"id": self.id, "kind": self.kind, "state": self.state, "rows": self.rows,
                "rows_done": self.done, "progress": round(share, 4), "created": self.created,
                "stage": self.stage, "error": self.error, "waiters": len(self.waiters)}  # fmt: skip

    def advance(self, rows: int, stage: str | None = None) -> None:
        """Count rows as done, and name a stage; raise Cancelled once the job is to stop."""
        self.done += rows
        self.stage = self.stage if stage is None else stage
        if self.stop.is_set():
            raise Cancelled(f"job {self.id} was cancelled; ask the question again to start anew.")


@dataclass(frozen=True)
class _Task:
    """A job that is not finished, with the result to come; nobody holds it longer than he waits."""

    job: Job
    key: Hashable
    compute: Compute[Any]
    future: Future[Any] = field(default_factory=Future)


class StillRunning(Exception):
    """A job that takes longer than its request waits."""

    def __init__(self, job: Job) -> None:
        super().__init__(job.id)
        self.job = job


class Kept:
    """Least recently used results, up to a number of bytes; safe between threads.

    >>> import numpy as np
    >>> kept = Kept(limit=16)
    >>> for name in "abc":
    ...     kept.put(name, np.zeros(1))
    >>> kept.get("a"), kept.get("c")
    (None, array([0.]))
    """

    def __init__(self, limit: int = CACHE_BYTES) -> None:
        self._limit, self._held = limit, 0
        self._items: OrderedDict[Hashable, Sized] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> Any:  # noqa: ANN401 - what was put
        """Return what was put under a key, None if it is no longer there."""
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: Hashable, value: Sized) -> None:
        """Keep a value, and let go of the oldest ones beyond the limit."""
        with self._lock:
            old = self._items.pop(key, None)
            self._held += value.nbytes - (0 if old is None else old.nbytes)
            self._items[key] = value
            while self._held > self._limit and len(self._items) > 1:
                self._held -= self._items.popitem(last=False)[1].nbytes

    def get_or_make(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """Return what is kept, or else make and keep it; two threads may both make it."""
        found = self.get(key)
        if found is None:
            found = make()
            self.put(key, found)
        return cast(Result, found)


class Desk:
    """The jobs of one server and their results.

    Args:
        workers: threads.
        queued: jobs that may wait; a further one is refused.
    """

    def __init__(self, workers: int = WORKERS, queued: int = QUEUED) -> None:
        self.kept = Kept()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._open: dict[Hashable, _Task] = {}
        self._queue: deque[_Task] = deque()
        self._limit = queued
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def ask(
        self, key: Hashable, kind: str, rows: int, compute: Compute[Result], wait: float
    ) -> Result:
        """Return a result: the kept one, or that of a job.

        Args:
            key: names the question and the commits it is asked of.
            kind: of the job.
            rows: of the pass.
            compute: makes the result.
            wait: seconds to wait for it.

        Raises:
            StillRunning: it takes longer.
            TooMany: too many jobs wait.
            Cancelled: the job was stopped, or the desk is closed.
        """
        found = self.kept.get(key)
        if found is not None:
            return cast(Result, found)
        task = self._task(key, kind, rows, compute)
        try:
            return cast(Result, task.future.result(wait))
        except TimeoutError:
            if task.future.done():
                raise
            raise StillRunning(task.job) from None

    def jobs(self) -> list[Job]:
        """List the jobs, newest first."""
        with self._changed:
            return list(reversed(self._jobs.values()))

    def job(self, name: str) -> Job:
        """Return one job; raise Missing if there is none of that id."""
        with self._changed:
            if name not in self._jobs:
                raise Missing(f"no job {name!r}; /v1/jobs lists the last {KEPT}.")
            return self._jobs[name]

    def cancel(self, name: str) -> Job:
        """Let the caller (`WAITER`) go, and stop a job that nobody else asks for any more.

        It ends at once if it waits in the queue, else after the rows it is at.
        """
        job = self.job(name)
        with self._changed:
            job.waiters.pop(WAITER.get(), None)
            now = time.monotonic()
            if any(now - asked < PATIENCE for asked in job.waiters.values()):
                return job
            job.stop.set()
            for task in [each for each in self._queue if each.job is job]:
                self._queue.remove(task)
                self._end(task, error=Cancelled(f"job {job.id} was cancelled; ask again."))
        return job

    def close(self, seconds: float = 2.0) -> None:
        """Stop all jobs and wait for the threads, but not longer than `seconds` in all.

        Those who wait for a job get Cancelled at once, also where its work goes on meanwhile.
        """
        until = time.monotonic() + seconds
        with self._changed:
            self._closed = True
            for task in list(self._open.values()):
                task.job.stop.set()
                self._end(task, error=_ending())
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))

    def _task(self, key: Hashable, kind: str, rows: int, compute: Compute[Any]) -> _Task:
        """Join the open task of a question, or queue one."""
        with self._changed:
            if self._closed:
                raise _ending()
            task = self._open.get(key)
            if task is None or task.job.stop.is_set():
                if len(self._queue) >= self._limit:
                    raise TooMany(f"{len(self._queue)} scans wait already, no more are taken; try "
                                  "again in a second.")  # fmt: skip
                task = _Task(Job(secrets.token_hex(8), kind, rows), key, compute)
                self._jobs[task.job.id] = task.job
                self._open[key] = task
                self._queue.append(task)
                self._changed.notify()
            task.job.waiters[WAITER.get()] = time.monotonic()
            return task

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                task = self._queue.popleft()
                task.job.state = "running"
            self._do(task)

    def _do(self, task: _Task) -> None:
        """Compute one task; whatever goes wrong is told to those who wait for it."""
        try:
            result = task.compute(task.job.advance)
        except BaseException as caught:
            with self._changed:
                self._end(task, error=caught)
            return
        self.kept.put(task.key, result)
        with self._changed:
            self._end(task, result)

    def _end(self, task: _Task, result: Any = None, error: BaseException | None = None) -> None:  # noqa: ANN401
        """Close a task once, under the lock; forget the oldest finished jobs."""
        if task.future.done():
            return
        if self._open.get(task.key) is task:
            del self._open[task.key]
        job = task.job
        job.waiters.clear()
        if error is None:
            job.state = "done"
            task.future.set_result(result)
        else:
            job.state = "cancelled" if isinstance(error, Cancelled) else "failed"
            job.error = str(error)
            task.future.set_exception(error)
        over = [
            name for name, each in self._jobs.items() if each.state not in ("queued", "running")
        ]
        for name in over[: max(len(over) - KEPT, 0)]:
            del self._jobs[name]


def _ending() -> Cancelled:
    return Cancelled("the server is ending; ask again once it is started anew.")
