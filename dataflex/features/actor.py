"""A worker of the store in a process of a Ray cluster, and what it reports to the driver."""

from __future__ import annotations

import os
import queue
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dataflex.run.log import Watch
from dataflex.run.messages import Failure, explain, set_up_logging
from gradstore.errors import BadInput
from gradstore.storage.leases import Worker


@dataclass(frozen=True)
class Started:
    """First report of an actor: its process."""

    host: str
    pid: int


@dataclass(frozen=True)
class Loaded:
    """The actor has its model; next it opens the store."""


@dataclass(frozen=True)
class Begun:
    """A pass has begun, with `rows` left to compute by all actors."""

    name: str
    rows: int


@dataclass(frozen=True)
class Taken:
    """An actor has leased a unit of a pass, and computes it."""

    name: str
    unit: int


@dataclass(frozen=True)
class UnitDone:
    """An actor has computed and published a unit of a pass."""

    name: str
    unit: int
    rows: int


@dataclass(frozen=True)
class Ended:
    """Last report of an actor: all is done and committed, or the failure.

    Attributes:
        failure: None where there was none.
        made: what the work returned: the names of the train generations.
    """

    failure: Failure | None
    made: tuple[str, ...] = ()


Report = Started | Loaded | Begun | Taken | UnitDone | Ended

#: The build as one worker that tells of its passes, and returns the names of the train generations;
#: called in the process of an actor.
Work = Callable[[Worker, Watch], tuple[str, ...]]


class FeatureActor:
    """A worker in a process of the cluster; each call of `unit` waits for its next report.

    Ray's views show such a call as a task, under the name that the driver gives it: what the actor
    is at. The work has a thread of its own and never waits for anybody who listens.

    Args:
        work: the build.
        worker: which one it is.
        folder: where the command was given; relative paths are below it.
    """

    def __init__(self, work: Work, worker: Worker, folder: Path) -> None:
        self._reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        self._reports.put(Started(socket.gethostname(), os.getpid()))
        arguments = (work, worker, folder)
        threading.Thread(target=self._run, args=arguments, name="build", daemon=True).start()

    def unit(self) -> Report:
        """Return the next report: in most cases of a unit."""
        return self._reports.get()

    def loaded(self) -> None:
        """Report that the model is there."""
        self._reports.put(Loaded())

    def begins(self, name: str, rows: int) -> None:
        """Report the beginning of a pass."""
        self._reports.put(Begun(name, rows))

    def takes(self, name: str, unit: int) -> None:
        """Report a unit that is computed next."""
        self._reports.put(Taken(name, unit))

    def finished(self, name: str, unit: int, rows: int) -> None:
        """Report a unit."""
        self._reports.put(UnitDone(name, unit, rows))

    def _run(self, work: Work, worker: Worker, folder: Path) -> None:
        ended = Ended(None)
        set_up_logging()
        try:
            if not folder.is_dir():
                raise BadInput(
                    f'no folder "{folder}" here; a Ray cluster needs a file system that all its '
                    "nodes see, for the folder of the command, the model, the data and the store."
                )
            os.chdir(folder)
            ended = Ended(None, work(worker, self))
        except BaseException as error:
            ended = Ended(explain(error) or Failure(1, traceback.format_exc()))
        self._reports.put(ended)
