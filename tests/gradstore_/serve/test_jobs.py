"""Long work has progress and an end, is done once, and never more at a time than is good."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from gradstore.errors import BadInput
from gradstore.serve.jobs import WAITER, Desk, Job, Kept, StillRunning
from gradstore.serve.problems import Cancelled, Missing, TooMany


@dataclass(frozen=True)
class Value:
    """A result of some bytes."""

    number: int
    nbytes: int = 8


class Gate:
    """A computation that goes on row by row as the test lets it."""

    def __init__(self, rows: int = 4) -> None:
        self.rows, self.calls = rows, 0
        self.more = threading.Semaphore(0)
        self.begun = threading.Event()

    def __call__(self, on_rows: Callable[[int], None]) -> Value:
        self.calls += 1
        self.begun.set()
        for _ in range(self.rows):
            self.more.acquire()
            on_rows(1)
        return Value(self.calls)


@pytest.fixture
def desk() -> Iterator[Desk]:
    opened = Desk(workers=1, queued=2)
    yield opened
    opened.close()


def start(desk: Desk, key: str, gate: Gate) -> Job:
    with pytest.raises(StillRunning) as running:
        desk.ask(key, "score", gate.rows, gate, 0)
    return running.value.job


def test_a_question_joins_its_job_and_is_then_kept(desk: Desk) -> None:
    gate = Gate()
    job = start(desk, "a", gate)
    assert start(desk, "a", gate) is job
    gate.begun.wait(5)
    gate.more.release(2)
    while job.done < 2:
        pass
    assert (job.describe()["state"], job.describe()["progress"]) == ("running", 0.5)
    gate.more.release(2)
    assert desk.ask("a", "score", 4, gate, 5) == Value(1)
    assert desk.ask("a", "score", 4, gate, 0) == Value(1)
    assert (gate.calls, job.describe()["progress"]) == (1, 1.0)


def test_a_job_that_waits_or_runs_can_be_cancelled(desk: Desk) -> None:
    first, second = Gate(), Gate()
    running, waiting = start(desk, "a", first), start(desk, "b", second)
    first.begun.wait(5)
    assert desk.cancel(waiting.id).state == "cancelled"
    desk.cancel(running.id)
    first.more.release()
    again = Gate(rows=0)
    assert desk.ask("a", "score", 0, again, 5) == Value(1)
    assert (running.state, first.calls, second.calls) == ("cancelled", 1, 0)
    with pytest.raises(Missing):
        desk.cancel("nothing")


def test_a_job_is_cancelled_once_the_last_who_asked_for_it_gives_it_up(desk: Desk) -> None:
    gate = Gate()
    for name in ("ann", "bob", "ann"):
        WAITER.set(name)
        job = start(desk, "a", gate)
    assert job.describe()["waiters"] == 2
    for name in ("ann", "ann", "a stranger"):
        WAITER.set(name)
        assert desk.cancel(job.id).stop.is_set() is False
    WAITER.set("bob")
    assert desk.cancel(job.id).stop.is_set()
    gate.more.release(4)
    with pytest.raises(Missing):
        desk.cancel("nothing")
    WAITER.set("")


def test_one_who_asked_and_is_gone_keeps_no_job(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    for name in ("a closed page", "ann"):
        WAITER.set(name)
        job = start(desk, "a", gate)
    assert not desk.cancel(job.id).stop.is_set()
    monkeypatch.setattr("gradstore.serve.jobs.PATIENCE", 0.0)
    assert desk.cancel(job.id).stop.is_set()
    gate.more.release(4)
    WAITER.set("")


def test_those_who_wait_are_told_of_a_failure_and_may_ask_again(desk: Desk) -> None:
    def fails(on_rows: Callable[[int], None]) -> Value:
        raise BadInput("no row is usable")

    for _ in range(2):
        with pytest.raises(BadInput, match="no row is usable"):
            desk.ask("a", "score", 1, fails, 5)
    assert [job.state for job in desk.jobs()] == ["failed", "failed"]


def test_a_question_too_many_is_refused(desk: Desk) -> None:
    gates = [Gate() for _ in range(4)]
    start(desk, "0", gates[0])
    gates[0].begun.wait(5)
    for number in (1, 2):
        start(desk, str(number), gates[number])
    with pytest.raises(TooMany, match="2 scans wait"):
        desk.ask("3", "score", 1, gates[3], 0)


def test_closing_stops_what_runs_and_what_waits() -> None:
    desk = Desk(workers=1)
    gate = Gate()
    job = start(desk, "a", gate)
    gate.begun.wait(5)
    waiting = start(desk, "b", gate)
    threading.Timer(0.1, gate.more.release).start()
    desk.close()
    assert (job.state, waiting.state) == ("cancelled", "cancelled")
    with pytest.raises(Cancelled):
        job.advance(1)


def test_closing_answers_those_who_wait_while_the_work_goes_on() -> None:
    desk = Desk(workers=2)
    gate = Gate()
    job = start(desk, "a", gate)
    gate.begun.wait(5)
    began = time.monotonic()
    threading.Timer(0.2, desk.close, [0.2]).start()
    with pytest.raises(Cancelled, match="the server is ending"):
        desk.ask("a", "score", gate.rows, gate, 20)
    assert time.monotonic() - began < 5
    with pytest.raises(Cancelled, match="the server is ending"):
        desk.ask("b", "score", gate.rows, gate, 20)
    gate.more.release(4)
    for thread in desk._threads:
        thread.join(5)
        assert not thread.is_alive()
    assert job.state == "cancelled"


def test_kept_results_stay_within_their_bytes() -> None:
    kept = Kept(limit=100)
    for number in range(50):
        kept.put(number, Value(number, nbytes=30))
    assert [kept.get(number) is not None for number in (46, 47, 48, 49)] == [
        False,
        True,
        True,
        True,
    ]
    kept.put("large", Value(0, nbytes=1000))
    assert kept.get("large") is not None
    kept.put("small", Value(1, nbytes=1))
    assert (kept.get("large"), kept.get(49)) == (None, None)


def test_a_scan_that_is_not_done_in_time_is_answered_with_its_job(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradstore.serve import asking

    gate, whole = threading.Event(), asking.influence_scores

    def slow(*args: Any, **named: Any) -> Any:
        gate.wait(10)
        return whole(*args, **named)

    monkeypatch.setattr(asking, "influence_scores", slow)
    answer = client.post("/v1/score?wait=0", json={})
    job = answer.json()
    assert (answer.status_code, answer.headers["location"]) == (202, f"/v1/jobs/{job['id']}")
    assert client.get(answer.headers["location"]).json()["state"] in ("queued", "running")
    assert client.get("/v1/jobs").json()["jobs"][0]["id"] == job["id"]
    gate.set()
    assert client.post("/v1/score?wait=10", json={}).status_code == 200
    assert client.get(f"/v1/jobs/{job['id']}").json()["progress"] == 1.0
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 202


def test_a_client_that_gives_up_leaves_the_answer_to_the_others_of_the_same_question(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradstore.serve import asking

    whole = asking.query_influence
    gates = {name: threading.Event() for name in ("one leaves", "both leave")}
    gate = gates["one leaves"]

    def slow(*args: Any, on_rows: Any, **named: Any) -> Any:
        gate.wait(10)
        return whole(*args, on_rows=on_rows, **named)

    monkeypatch.setattr(asking, "query_influence", slow)
    form = {"target": "one", "target_row": 6}
    ann, bob = ({"Gradstore-Waiter": name} for name in ("ann", "bob"))
    first = client.post("/v1/query?wait=0", json=form, headers=ann).json()
    second = client.post("/v1/query?wait=0", json=form, headers=bob).json()
    assert (second["id"], second["waiters"]) == (first["id"], 2)
    left = client.delete(f"/v1/jobs/{first['id']}", headers=ann)
    assert (left.status_code, left.json()["waiters"]) == (202, 1)
    gate.set()
    answer = client.post("/v1/query?wait=10", json=form, headers=bob)
    assert (answer.status_code, answer.json()["target_row"]["row"]) == (200, 6)

    gate, form["target_row"] = gates["both leave"], 7
    job = client.post("/v1/query?wait=0", json=form, headers=ann).json()
    client.post("/v1/query?wait=0", json=form, headers=bob)
    for name in (ann, bob):
        client.delete(f"/v1/jobs/{job['id']}", headers=name)
    gate.set()
    until = time.monotonic() + 10
    while (state := client.get(f"/v1/jobs/{job['id']}").json()["state"]) == "running":
        assert time.monotonic() < until
    assert state == "cancelled"


def test_the_name_of_who_asks_is_documented_and_bounded(client: Any) -> None:
    paths = client.get("/v1/openapi.json").json()["paths"]
    for path, method in (("/v1/jobs/{job}", "delete"), ("/v1/query", "post"), ("/v1/map", "get")):
        (told,) = [p for p in paths[path][method]["parameters"] if p["in"] == "header"]
        assert told["name"] == "gradstore-waiter"
        assert "Equal questions share one job" in told["description"]
    assert client.get("/v1/jobs", headers={"Gradstore-Waiter": "x" * 65}).status_code == 422


def test_more_scans_than_may_wait_are_answered_429(
    ask: Callable[..., Any], store_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gradstore.serve import asking

    gate = threading.Event()

    def never(*_: Any, **named: Any) -> Any:
        gate.wait(10)
        raise BadInput("stopped")

    monkeypatch.setattr(asking, "query_influence", never)
    client = ask(store_path)
    client.app.state.served.desk._limit = 3
    answers = [client.post("/v1/query?wait=0", json={"target_row": i % 8, "target": set_})
               for set_ in ("one", "two") for i in range(8)]  # fmt: skip
    gate.set()
    assert {answer.status_code for answer in answers} == {202, 429}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["content-type"] == "application/problem+json"


def test_a_prompt_counts_the_training_rows_that_its_scan_has_done(
    ask: Callable[..., Any], explorer: Any, store_path: Any
) -> None:
    model, gate, begun = explorer.model(), threading.Event(), threading.Event()
    whole = model.explain

    def slow(*args: Any, on_rows: Any, **named: Any) -> Any:
        named["on_stage"]("asking the model")
        on_rows(explorer.train_rows // 4)
        begun.set()
        gate.wait(10)
        return whole(*args, on_rows=lambda _: None, **named)

    model.explain = slow
    client = ask(store_path, model)
    job = client.post("/v1/explain?wait=0", json={"prompt": "a"}).json()
    assert begun.wait(5)
    shown = client.get(f"/v1/jobs/{job['id']}").json()
    gate.set()
    assert (shown["rows"], shown["stage"]) == (explorer.train_rows, "")
    assert shown["progress"] == pytest.approx(0.25, abs=0.01)
