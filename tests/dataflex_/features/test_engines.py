"""Actors are started again, shown by what they do, and fail as one; Ray is stood in for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.features import engines
from dataflex.features.actor import Begun, Ended, Loaded, Report, Started, Taken, UnitDone
from dataflex.features.engines import RESTARTS, Bars
from dataflex.run.messages import Failure, RemoteFailure
from gradstore.errors import BadInput, StoreIOError
from gradstore.storage.leases import Worker


class ActorError(Exception):
    actor_init_failed = False


class Unavailable(ActorError):
    pass


class Scripted:
    """A cluster whose actors say what a script has for their number, one after another.

    A report that is an exception is raised, as Ray raises the death of an actor. What may wait for
    the head has to be called by `ask`.
    """

    ended = asked = False
    taken: dict[str, float] = {"CPU": 1.0}  # noqa: RUF012
    exceptions = type(
        "Exceptions", (), {"RayActorError": ActorError, "ActorUnavailableError": Unavailable}
    )

    def __init__(self, *scripts: list[Report | Exception]) -> None:
        self.scripts, self.actors, self.ray = scripts, len(scripts), self
        self.started: list[int] = []
        self.killed: list[int] = []
        self.names: list[str] = []

    def actor_options(self) -> dict[str, Any]:
        return {}

    def check(self) -> None:
        pass

    def ask(self, call: Callable[[], Any]) -> Any:
        self.asked = True
        try:
            return call()
        finally:
            self.asked = False

    def remote(self, _: type) -> Any:
        cluster = self

        class Handle:
            def __init__(self, _: object, worker: Worker, __: Path) -> None:
                assert cluster.asked
                self.number = worker.number
                cluster.started.append(worker.number)

            @property
            def unit(self) -> Any:
                return self

            def options(self, *, name: str) -> Any:
                cluster.names.append(name)
                return type("Method", (), {"remote": lambda _: (self, object())})()

        made = type("Made", (), {"remote": staticmethod(Handle)})
        return type("Class", (), {"options": lambda *_, **__: made})()

    def wait(self, refs: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return [ref for ref in refs if self.scripts[ref[0].number - 1]][:1], []

    def get(self, ref: Any) -> Report:
        assert self.asked
        report = self.scripts[ref[0].number - 1].pop(0)
        if isinstance(report, Exception):
            raise report
        return report

    def kill(self, handle: Any) -> None:
        self.killed.append(handle.number)


def run(cluster: Any) -> tuple[str, ...]:
    with Bars() as bars:
        build = engines._Build(cluster, lambda *_: (), bars)
        try:
            return build.run()
        finally:
            build.end()


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    monkeypatch.setattr(logging.getLogger("dataflex"), "propagate", True)
    caplog.set_level(logging.INFO, "dataflex")
    return lambda: caplog.text


def test_an_actor_that_died_is_started_again_and_told_in_one_line(told: Any) -> None:
    died = ActorError("The actor died because its node has died.")
    second: list[Any] = [Started("far", 7), Loaded(), died, Started("near", 8), Loaded(),
                         Ended(None, ("train/3",))]  # fmt: skip
    cluster = Scripted([Unavailable(), Started("here", 5), ActorError("killed")], second)
    assert run(cluster) == ("train/3",)
    assert sorted(cluster.started) == [1, 1, 2, 2]
    assert "actor 1 (here, pid 5) died, its process ended: its units are taken over" in told()
    assert "actor 2 (far, pid 7) died, its node left the cluster" in told()
    assert told().count(" died") == 2
    assert sorted(cluster.killed) == [1, 2]  # one that had only begun to load, and the one that led


def test_the_task_that_ray_shows_says_what_its_actor_computes() -> None:
    one, other = "gradients of target/sort/3", "gradients of train/3"
    cluster = Scripted(
        [Started("here", 5), Loaded(), Begun(one, 300), Taken(one, 0), UnitDone(one, 0, 256),
         Begun(other, 512), Taken(other, 0), Taken(other, 1), UnitDone(other, 0, 256),
         Ended(None, ("train/3",))],
    )  # fmt: skip
    run(cluster)
    at = ["start", "the model", "the store", one, f"{one}, unit 0", one, other,
          f"{other}, unit 0", f"{other}, unit 1", f"{other}, unit 1"]  # fmt: skip
    assert cluster.names == [f"worker 1/1: {each}" for each in at]


def test_those_at_work_leave_the_store_before_they_are_ended() -> None:
    first: list[Any] = [Loaded(), Begun("x", 512), Ended(None, ("made",))]
    second: list[Any] = [Loaded(), Begun("x", 256), UnitDone("x", 1, 256), Ended(None, ("made",))]
    cluster = Scripted(second[:1] + first, second)
    assert run(cluster) == ("made",)
    assert cluster.scripts == ([], [])


def test_actors_that_die_again_and_again_end_the_build(told: Any) -> None:
    cluster = Scripted([ActorError("killed") for _ in range(RESTARTS + 1)])
    with pytest.raises(StoreIOError, match="every actor died 4 times"):
        run(cluster)
    assert len(cluster.started) == RESTARTS + 1
    assert told().count("it is not started again") == 1


@pytest.mark.parametrize("code", [2, 3, 4, 6, 130])
def test_the_first_failure_that_all_would_have_ends_all_actors(code: int) -> None:
    cluster = Scripted([Started("far", 1), Ended(Failure(code, "seed differs"))], [])
    with pytest.raises(RemoteFailure, match=r"seed differs \(on far\)") as caught:
        run(cluster)
    assert caught.value.exit_code == code
    assert cluster.started == [1, 2]
    assert cluster.killed == [2]


@pytest.mark.parametrize("code", [1, 5])
def test_an_actor_whose_machine_fails_is_started_again_and_the_others_go_on(
    code: int, told: Any
) -> None:
    first: list[Any] = [Started("far", 7), Loaded(), Ended(Failure(code, "no space left.\n"))]
    second: list[Any] = [Started("near", 8), Loaded(), UnitDone("x", 1, 256)]
    cluster = Scripted(first, second)
    second += [Begun("x", 256), Ended(None, ("train/3",))]
    assert run(cluster) == ("train/3",)
    assert sorted(cluster.started) == [1, 1, 2]
    line = "actor 1 (far, pid 7) failed: its units are taken over. It said: no space left."
    assert told().count(line) == 1
    assert cluster.killed.count(1) == 2  # the one that failed, and the one that had begun to load


def test_failures_of_machines_end_the_build_when_all_restarts_are_used(told: Any) -> None:
    first: list[Any] = [Started("far", 7)] + [Ended(Failure(5, "disk full"))] * (RESTARTS + 1)
    second = [ActorError("killed") for _ in range(RESTARTS + 1)]
    cluster = Scripted(first, second)
    with pytest.raises(RemoteFailure, match="disk full") as caught:
        run(cluster)
    assert caught.value.exit_code == 5
    assert sorted(cluster.started) == [1] * (RESTARTS + 1) + [2] * (RESTARTS + 1)
    assert told().count("it is not started again") == 2


def unable_to_start() -> ActorError:
    error = ActorError("traceback\nModuleNotFoundError: No module named 'dataflex'")
    error.actor_init_failed = True
    return error


@pytest.mark.parametrize(
    "last",
    [Ended(Failure(code, "seed differs")) for code in (1, 2, 3, 4, 5, 6)]
    + [ActorError("killed"), unable_to_start()],
    ids=lambda last: str(last.failure.code) if isinstance(last, Ended) else str(last)[-10:],
)
def test_a_failure_after_the_end_changes_nothing(last: Report | Exception, told: Any) -> None:
    first: list[Any] = [Loaded(), Ended(None, ("made",))]
    second: list[Any] = [Loaded(), last]
    cluster = Scripted(first, second)
    assert run(cluster) == ("made",)
    assert cluster.scripts == ([], [])
    assert cluster.started == [1, 2]
    assert "failed" not in told()
    assert "died" not in told()


def test_a_node_without_this_version_is_named_and_not_tried_again() -> None:
    cluster = Scripted([unable_to_start()])
    with pytest.raises(BadInput, match=r"No module named 'dataflex'\. All nodes need"):
        run(cluster)
    assert cluster.started == [1]


def test_a_bar_counts_each_unit_once_and_shows_the_newest_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[tuple[str, int]] = []

    class Bar:
        def __init__(self, name: str, rows: int, *, shown: bool) -> None:
            self.name = name

        def __enter__(self) -> Any:
            return lambda rows: shown.append((self.name, rows))

        def __exit__(self, *_: object) -> None:
            shown.append((self.name, -1))

    monkeypatch.setattr(engines, "progress", Bar)
    with Bars() as bars:
        bars.begin(Begun("a", 300))
        bars.begin(Begun("a", 44))  # another actor, later
        bars.count(UnitDone("a", 0, 256))
        bars.count(UnitDone("a", 0, 256))
        bars.begin(Begun("b", 10))
        bars.count(UnitDone("a", 1, 44))
        bars.begin(Begun("a", 0))
        bars.count(UnitDone("b", 0, 10))
    assert shown == [("a", 256), ("a", -1), ("b", 10), ("b", -1)]
