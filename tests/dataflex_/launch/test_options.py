"""A build is shared by workers or by an engine, which starts workers of its own."""

from __future__ import annotations

import pytest

from dataflex.launch.options import Builders, rank_as_worker
from gradstore.errors import BadInput
from gradstore.storage.leases import Worker

#: Beside what torchrun sets for a rank: what else a process has.
REST = {"LOCAL_WORLD_SIZE": "2", "PATH": "/bin"}


def of_torchrun(rank: str, world: str) -> dict[str, str]:
    meet = {"LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {"RANK": rank, "WORLD_SIZE": world, **meet, **REST}


def test_a_rank_of_torchrun_is_a_worker_and_waits_for_no_other_rank() -> None:
    env = of_torchrun("2", "4")
    assert rank_as_worker(env) == Worker(3, 4)
    assert env == REST
    for alone in (of_torchrun("0", "1"), dict(REST)):
        assert rank_as_worker(alone) is None
        assert alone == REST


@pytest.mark.parametrize(("rank", "world"), [("4", "4"), ("-1", "2"), ("0", "two"), ("", "2")])
def test_a_rank_that_is_none_is_refused(rank: str, world: str) -> None:
    with pytest.raises(BadInput, match=f"RANK is {rank!r} and WORLD_SIZE {world!r}"):
        rank_as_worker(of_torchrun(rank, world))


def test_who_builds_is_asked_of_the_options_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Builders(worker="2/4").chosen() == (Worker(2, 4), None)
    assert Builders(engine="ray").chosen()[0] is None
    assert Builders().chosen() == (Worker(2, 2), None)


def test_a_lease_is_that_of_a_worker_however_it_was_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert Builders(worker="2/4", lease_seconds=300).chosen() == (Worker(2, 4, 300), None)
    with pytest.raises(BadInput, match=r"--lease-seconds 300 is for workers .* --worker i/N"):
        Builders(lease_seconds=300).chosen()
    with pytest.raises(BadInput, match="--lease-seconds is not for --engine"):
        Builders(engine="ray", lease_seconds=300).chosen()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Builders(lease_seconds=90.5).chosen() == (Worker(2, 2, 90.5), None)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_lease_that_never_ends_or_begins_is_refused(seconds: float) -> None:
    with pytest.raises(BadInput, match=r"lease_seconds is .*a number of seconds above 0"):
        Builders(worker="1/2", lease_seconds=seconds).chosen()


def test_a_build_is_alone_or_a_worker_or_on_an_engine() -> None:
    assert Builders().chosen() == (None, None)
    assert Builders(worker="2/4").chosen() == (Worker(2, 4), None)
    worker, ray = Builders(engine="ray", gpus_per_actor=0.5, memory_per_actor=3.0).chosen()
    assert worker is None
    assert ray is not None
    assert (ray.gpus_per_actor, ray.memory_per_actor) == (0.5, 3.0)


def test_a_worker_on_an_engine_is_refused() -> None:
    with pytest.raises(BadInput, match="--worker and --engine are both given"):
        Builders(worker="1/2", engine="ray").chosen()
    with pytest.raises(BadInput, match="what an actor takes need --engine ray"):
        Builders(gpus_per_actor=1.0).chosen()
