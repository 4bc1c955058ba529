"""An actor reports its passes and units, and nothing else."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from dataflex.features import actor
from dataflex.features.actor import (
    Begun,
    Ended,
    FeatureActor,
    Loaded,
    Report,
    Started,
    Taken,
    UnitDone,
)
from dataflex.run.log import Watch
from dataflex.run.messages import Failure
from gradstore.errors import ProvenanceMismatch
from gradstore.storage.leases import Worker


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor sets up the log of its process; here it is that of all tests."""
    monkeypatch.setattr(actor, "set_up_logging", lambda: None)


def reports(work: Any, folder: Path) -> list[Report]:
    made = FeatureActor(work, Worker(2, 3), folder)
    heard = [made.unit()]
    while not isinstance(heard[-1], Ended):
        heard.append(made.unit())
    return heard


def test_an_actor_reports_its_units_and_what_the_work_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def work(worker: Worker, watch: Watch) -> tuple[str, ...]:
        watch.loaded()
        watch.begins("gradients of train/3", 512)
        for unit in range(2):
            watch.takes("gradients of train/3", unit)
            watch.finished("gradients of train/3", unit, 256)
        return (f"train/3 by {worker}",)

    started, *rest = reports(work, tmp_path)
    assert isinstance(started, Started)
    name = "gradients of train/3"
    assert rest == [Loaded(), Begun(name, 512), Taken(name, 0), UnitDone(name, 0, 256),
                    Taken(name, 1), UnitDone(name, 1, 256),
                    Ended(None, ("train/3 by 2/3",))]  # fmt: skip
    assert max(len(pickle.dumps(report)) for report in (started, *rest)) < 500  # no feature


def test_a_failure_keeps_its_message_and_code_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def refuse(*_: object) -> tuple[str, ...]:
        raise ProvenanceMismatch("seed differs", ["seed"])

    assert reports(refuse, tmp_path)[-1] == Ended(Failure(3, "seed differs"))
    bug = reports(int, tmp_path)[-1]  # int(worker, watch)
    assert isinstance(bug, Ended)
    assert bug.failure is not None
    assert bug.failure.code == 1
    assert "TypeError" in bug.failure.message
    missing = reports(int, tmp_path / "none")[-1]
    assert isinstance(missing, Ended)
    assert missing.failure is not None
    assert missing.failure.code == 2
    assert "a file system that all its nodes see" in missing.failure.message
