"""Gradient generations on a Ray cluster: actors that each are a worker of the store.

An actor holds a model and fills units that it leases through the store (`gradstore.storage.leases`)
until none is left; features go from there to the store's file system. Ray starts and places actors,
and carries one small report for each unit. So whatever ends, an actor, a node, the head or this
process, what is done stays done, and any other worker takes over the rest.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataflex.features.actor import (
    Begun,
    Ended,
    FeatureActor,
    Loaded,
    Report,
    Started,
    Taken,
    UnitDone,
    Work,
)
from dataflex.run.log import OnRows, progress
from dataflex.run.messages import Failure, RemoteFailure
from gradstore.cluster.connection import Cluster, connected, could_not_start
from gradstore.cluster.options import RayOptions
from gradstore.errors import StoreIOError
from gradstore.storage.leases import Worker

#: Times that each actor is started again after it died, or what it works with failed.
RESTARTS = 3

#: Exit codes of failures that may be those of one machine: a bug, which no message tells from a
#: broken installation, and what the disk, memory or GPU refuses. Any other every actor would meet.
OF_ONE_MACHINE = (1, StoreIOError.exit_code)

#: Seconds between two looks at the cluster while no report comes.
WAIT_SECONDS = 1.0

#: Seconds in which the other actors leave the store when all is done.
END_SECONDS = 30.0

#: Words of Ray's about an actor whose whole node has died.
NODE_DIED = "node has died"

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Actor:
    """An actor as the driver knows it; `at` is what it does, in words."""

    worker: Worker
    handle: Any
    host: str = ""
    pid: int = 0
    works: bool = False
    at: str = "start"

    def __str__(self) -> str:
        place = f" ({self.host}, pid {self.pid})" if self.host else ""
        return f"actor {self.worker.number}{place}"


def run_on_ray(work: Work, options: RayOptions) -> tuple[str, ...]:
    """Run a build as actors on a Ray cluster, until one of them finds it done.

    Args:
        work: the build, a function that other processes can import.
        options: of the cluster and its actors.

    Returns:
        What the work returned.

    Raises:
        BadInput: see `connected`.
        StoreIOError: the cluster ended, or every actor died again and again.
        RemoteFailure: what failed in an actor, with its exit code: at once where all would fail so,
            else when all actors have used up their restarts.
    """
    with connected(options, _log.info) as cluster, Bars() as bars:
        build = _Build(cluster, work, bars)
        try:
            return build.run()
        finally:
            build.end()


class Bars:
    """One bar at a time: of the pass that the actors are at, in rows of units that are done."""

    def __init__(self) -> None:
        self._shown = contextlib.ExitStack()
        self._advance: OnRows | None = None
        self._name, self._units = "", set[int]()
        self._past: set[str] = set()

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.close()

    def begin(self, begun: Begun) -> None:
        """Show a pass that an actor begins, if none has before."""
        if begun.name == self._name or begun.name in self._past:
            return
        self._shown.close()
        self._past.add(self._name)
        self._name, self._units = begun.name, set()
        bar = progress(begun.name, begun.rows, shown=begun.rows > 0)
        self._advance = self._shown.enter_context(bar)

    def count(self, done: UnitDone) -> None:
        """Count a unit of the pass that is shown, once."""
        if done.name == self._name and done.unit not in self._units and self._advance is not None:
            self._units.add(done.unit)
            self._advance(done.rows)


@dataclass(eq=False)
class _Build:
    """The driver's side of a build.

    Attributes:
        cluster: where the actors live.
        work: what they do.
        bars: what is shown of it.
        running: reference of the awaited report -> its actor.
        deaths: how often each number's actor died or failed.
        failure: of an actor, that may have been its machine's; None where a death came later.
        made: what the work of the first actor that found the build done returned.
    """

    cluster: Cluster
    work: Work
    bars: Bars
    running: dict[Any, _Actor] = field(default_factory=dict)
    deaths: dict[int, int] = field(default_factory=dict)
    failure: Failure | None = None
    made: tuple[str, ...] | None = None

    def run(self) -> tuple[str, ...]:
        """Start the actors and listen to them until one has found the build done."""
        for number in range(1, self.cluster.actors + 1):
            self._start(Worker(number, self.cluster.actors))
        while self.running and self.made is None:
            self._listen()
        if self.made is None and self.failure is not None:
            raise RemoteFailure(self.failure)
        if self.made is None:
            raise StoreIOError(
                f"every actor died {RESTARTS + 1} times. Each holds a model: give it more with "
                "--memory-per-actor, or take fewer with --actors. Ray's logs have their last words."
            )
        # Those at work find that all is done, and leave the store; those that load a model may end.
        ends = time.monotonic() + END_SECONDS
        while any(actor.works for actor in self.running.values()) and time.monotonic() < ends:
            self._listen()
        return self.made

    def end(self) -> None:
        """End the actors that are left, whatever they do: one may be in the middle of an import."""
        if not self.cluster.ended:
            for actor in self.running.values():
                self.cluster.ray.kill(actor.handle)

    def _start(self, worker: Worker) -> None:
        options = self.cluster.actor_options() | {"max_restarts": 0}
        remote = self.cluster.ray.remote(FeatureActor).options(**options)
        begin = functools.partial(remote.remote, self.work, worker, Path.cwd())
        self._await(_Actor(worker, self.cluster.ask(begin)))

    def _await(self, actor: _Actor) -> None:
        worker = actor.worker
        name = f"worker {worker.number}/{worker.count}: {actor.at}"
        self.running[actor.handle.unit.options(name=name).remote()] = actor

    def _listen(self) -> None:
        """Hear what has come, waiting a moment for it; look at the cluster."""
        ready, _ = self.cluster.ray.wait(list(self.running), timeout=WAIT_SECONDS)
        self.cluster.check()
        for ref in ready:
            actor = self.running.pop(ref)
            try:
                report: Report = self.cluster.ask(functools.partial(self.cluster.ray.get, ref))
            except self.cluster.ray.exceptions.ActorUnavailableError:
                self._await(actor)  # for a moment: it has not died
            except self.cluster.ray.exceptions.RayActorError as error:
                if getattr(error, "actor_init_failed", False) and self.made is None:
                    raise could_not_start(str(actor), error) from error
                self.failure = None  # what comes last is told
                place = "its node left the cluster" if NODE_DIED in str(error) else ""
                self._bury(actor, f"died, {place or 'its process ended'}")
            else:
                self._hear(actor, report)

    def _hear(self, actor: _Actor, report: Report) -> None:
        if isinstance(report, Ended):
            self._hear_the_end(actor, report)
            return
        if isinstance(report, Started):
            actor.host, actor.pid, actor.at = report.host, report.pid, "the model"
        elif isinstance(report, Loaded):
            actor.works, actor.at = True, "the store"
        elif isinstance(report, Begun):
            actor.at = report.name
            self.bars.begin(report)
        elif isinstance(report, Taken):
            actor.at = f"{report.name}, unit {report.unit}"
        else:
            if actor.at == f"{report.name}, unit {report.unit}":  # the next one may be begun by now
                actor.at = report.name
            self.bars.count(report)
        self._await(actor)

    def _hear_the_end(self, actor: _Actor, report: Ended) -> None:
        """Take the result of an actor, or its failure: as a death where it may be its machine's.

        A failure once another has found all done and committed changes nothing, whatever its code.
        """
        if report.failure is None:
            self.made = report.made
        elif report.failure.code not in OF_ONE_MACHINE and self.made is None:
            raise RemoteFailure(_placed(report.failure, actor.host))
        self.cluster.ray.kill(actor.handle)
        if report.failure is not None:
            self.failure = _placed(report.failure, actor.host)
            self._bury(actor, "failed", f". It said: {report.failure.message.strip()}")

    def _bury(self, actor: _Actor, what: str, said: str = "") -> None:
        """Tell of an actor that died or failed, and start it again, where there is room."""
        if self.made is not None:
            return
        number = actor.worker.number
        self.deaths[number] = self.deaths.get(number, 0) + 1
        again = self.deaths[number] <= RESTARTS
        rest = ("" if again else "; it is not started again") + said
        _log.warning("%s %s: its units are taken over%s", actor, what, rest)
        if again:
            self._start(actor.worker)


def _placed(failure: Failure, host: str) -> Failure:
    """Name the host of a failure on another machine, where the message does not."""
    if host in ("", socket.gethostname()) or host in failure.message:
        return failure
    return Failure(failure.code, f"{failure.message} (on {host})")
