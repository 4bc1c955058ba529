"""The connection to a Ray cluster, without one: room, options of an actor, a wait, its end."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gradstore.cluster import connection
from gradstore.cluster.connection import Cluster, connected
from gradstore.cluster.options import RayOptions
from gradstore.errors import BadInput, StoreIOError


def ray_of(*nodes: dict[str, float]) -> Any:
    """Stand in for the module: it lists nodes."""
    listed = [{"NodeID": str(i), "Alive": True, "Resources": has} for i, has in enumerate(nodes)]
    dead = {"NodeID": "dead", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    return SimpleNamespace(nodes=lambda: [*listed, dead])


def test_fractions_of_a_gpu_reach_the_options_of_an_actor() -> None:
    options = RayOptions(cpus_per_actor=2, gpus_per_actor=0.25, memory_per_actor=3)
    cluster = Cluster(ray_of({"CPU": 16.0, "GPU": 2.0, "memory": 2.0**36}), options, "h:1")
    asked = cluster.actor_options()
    assert (asked["num_cpus"], asked["num_gpus"], asked["memory"]) == (2, 0.25, 3 * 2**30)
    assert "CUDA_VISIBLE_DEVICES" not in asked["runtime_env"]["env_vars"]
    assert cluster.actors == 8


def test_each_actor_takes_a_gpu_where_there_are_any_and_sees_none_elsewhere() -> None:
    with_gpus = Cluster(ray_of({"CPU": 64.0, "GPU": 3.0}, {"CPU": 64.0}), RayOptions(), "h:1")
    assert (with_gpus.actor_options()["num_gpus"], with_gpus.actors) == (1, 3)
    without = Cluster(ray_of({"CPU": 3.5}, {"CPU": 2.0}), RayOptions(), "h:1")
    asked = without.actor_options()
    assert (asked["num_gpus"], without.actors) == (0, 5)
    assert asked["runtime_env"]["env_vars"]["CUDA_VISIBLE_DEVICES"] == ""


def test_a_cluster_without_room_is_refused_and_says_what_there_is() -> None:
    with pytest.raises(BadInput, match=r"1 CPU, 1 GPU: they have 8 CPU, 0 GPU\..*gpus-per"):
        Cluster(ray_of({"CPU": 8.0}), RayOptions(gpus_per_actor=1), "h:1")


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a)
    )
    with pytest.raises(BadInput, match=r"pip install 'dataflex-gradstore\[ray\]'"):
        connected(RayOptions(), print).__enter__()


def test_an_address_that_nobody_listens_at_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(BadInput, match=f"no Ray cluster answers at 127.0.0.1:{port}"):
        connected(RayOptions(address=f"127.0.0.1:{port}"), print).__enter__()


def test_a_cluster_of_the_calls_own_leaves_no_token_and_no_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray takes the token from the environment, and so writes none to the user's home."""
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    asked: dict[str, Any] = {}

    def init(**given: Any) -> None:
        os.environ["RAY_AUTH_MODE"] = "token"  # as Ray does
        asked.update(given, token=os.environ["RAY_AUTH_TOKEN"])

    context = SimpleNamespace(gcs_address="h:1")
    ray = SimpleNamespace(init=init, shutdown=lambda: asked.update(ended=True))
    ray.get_runtime_context = lambda: context
    with connection._started(ray, RayOptions(actors=64, cpus_per_actor=0.5)) as head:
        assert head == "h:1"
        assert Path(asked["_temp_dir"]).is_dir()
    assert (len(asked["token"]), asked["num_cpus"], asked["ended"]) == (64, 32, True)
    assert not Path(asked["_temp_dir"]).exists()
    assert not {"RAY_AUTH_TOKEN", "RAY_AUTH_MODE"} & os.environ.keys()


@pytest.mark.parametrize("kind", [Exception, RuntimeError, OSError])
def test_a_cluster_that_does_not_start_is_told_in_a_line(kind: type[Exception]) -> None:
    """Ray raises a bare Exception where a machine is too slow for it."""

    def init(**_: Any) -> None:
        raise kind("The current node timed out during startup.\nSee the logs")

    ray = SimpleNamespace(init=init, shutdown=lambda: None)
    told = "Ray could not be started on this machine: The current node timed out during startup.$"
    with (
        pytest.raises(StoreIOError, match=told.replace(".", "[.]")),
        connection._started(ray, RayOptions()),
    ):
        pass


def test_a_cluster_that_others_use_is_waited_for_and_told_of_and_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "TOLD_SECONDS", 0.0)
    ray = ray_of({"CPU": 4.0})
    ray.remote = lambda _: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=object))
    ray.available_resources = lambda: {"CPU": 0.5}
    waits = [([], []), ([], []), ([object()], [])]
    ray.wait = lambda *_, **__: waits.pop(0)
    cluster = Cluster(ray, RayOptions(), "h:1")
    said: list[str] = []
    cluster.wait_for_room(said.append)
    assert not waits
    assert len(said) == 1
    assert "no process of 1 CPU, 0 GPU could start in 0 seconds; 0.5 CPU, 0 GPU are free" in said[0]
    monkeypatch.setattr(connection, "ROOM_SECONDS", 0.0)
    waits = [([], [])]
    with pytest.raises(BadInput, match=r"0\.5 CPU, 0 GPU are free on the Ray cluster"):
        cluster.wait_for_room(said.append)


def test_a_head_counts_as_dead_after_several_looks_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"127.0.0.1:{server.getsockname()[1]}"
        cluster = Cluster(ray_of({"CPU": 1.0}), RayOptions(), head)
        for _ in range(2 * connection.LOOKS):
            cluster.check()
    for _ in range(connection.LOOKS - 1):
        cluster.check()
    assert not cluster.ended
    with pytest.raises(StoreIOError, match="its head no longer answers"):
        cluster.check()
    assert cluster.ended


def test_a_call_that_waits_for_a_head_that_died_ends_with_the_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray itself would end the process after a minute, with no word of the store."""
    monkeypatch.setattr(connection, "LOOK_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"127.0.0.1:{server.getsockname()[1]}"
    ray, never = ray_of({"CPU": 1.0}), threading.Event()
    stuck = partial(never.wait, 5.0)
    made = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=stuck))
    ray.remote = lambda _: made
    for call in (Cluster.ask, Cluster.wait_for_room):
        cluster = Cluster(ray, RayOptions(), head)
        with pytest.raises(StoreIOError, match="its head no longer answers"):
            call(cluster, stuck)
    ray.nodes = stuck
    with pytest.raises(StoreIOError, match="its head no longer answers"):
        Cluster(ray, RayOptions(), head)
    never.set()


def test_what_a_call_returns_or_raises_is_the_callers() -> None:
    cluster = Cluster(ray_of({"CPU": 1.0}), RayOptions(), "h:1")
    assert cluster.ask(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        cluster.ask(lambda: 1 // 0)


def test_ray_s_own_ways_are_as_before_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    from ray._private import ray_constants

    seen: list[bool] = []

    @contextlib.contextmanager
    def joined(*_: Any) -> Any:
        seen.append(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV)
        raise BadInput("nobody answers")
        yield

    assert ray.__version__
    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    monkeypatch.setattr(connection, "_joined", joined)
    with pytest.raises(BadInput, match="nobody"), connected(RayOptions(address="h:1"), print):
        pass
    assert seen == [False]
    assert ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV is True
