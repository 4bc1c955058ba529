"""What a call asks of a Ray cluster, without one: room, options, environment, and its end."""

from __future__ import annotations

import importlib.util
import math
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from gradstore import cluster as module
from gradstore.cluster import Cluster, RayOptions, connected, room
from gradstore.errors import BadInput, StoreIOError


def ray_of(*nodes: dict[str, float]) -> Any:
    """Stand in for the module: it lists nodes."""
    listed = [{"NodeID": str(i), "Alive": True, "Resources": has} for i, has in enumerate(nodes)]
    dead = {"NodeID": "dead", "Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    return SimpleNamespace(nodes=lambda: [*listed, dead])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"actors": 0}, "actors is 0"),
        ({"cpus_per_actor": 0.0}, "cpus_per_actor is 0.0"),
        ({"cpus_per_actor": math.nan}, "cpus_per_actor is nan"),
        ({"gpus_per_actor": 1.5}, "gpus_per_actor is 1.5"),
        ({"gpus_per_actor": -1.0}, "gpus_per_actor is -1.0"),
        ({"memory_per_actor": 0.0}, "memory_per_actor is 0.0"),
        ({"address": ""}, "address is ''"),
    ],
)
def test_numbers_out_of_range_are_named(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        RayOptions(**wrong)


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


def test_room_is_counted_by_node() -> None:
    """Half a GPU on each of two nodes is no room for a whole one."""
    assert room({"a": {"CPU": 1, "GPU": 0.5}, "b": {"CPU": 1, "GPU": 0.5}}, {"GPU": 1}) == 0
    assert room({"a": {"CPU": 0.3}}, {"CPU": 0.1}) == 3  # 0.3 / 0.1 is a little less than 3


def test_a_cluster_without_room_is_refused_and_says_what_there_is() -> None:
    with pytest.raises(BadInput, match=r"1 CPU, 1 GPU: they have 8 CPU, 0 GPU\..*gpus-per"):
        Cluster(ray_of({"CPU": 8.0}), RayOptions(gpus_per_actor=1), "h:1")


def test_the_environment_goes_along_but_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "WANDB_API_KEY", "TOKENIZERS_PARALLELISM", "HOME"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    passed = RayOptions(cpus_per_actor=8).environment()
    assert {"HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"} <= passed.keys()
    assert not {"HF_TOKEN", "WANDB_API_KEY", "HOME"} & passed.keys()
    assert passed["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert RayOptions(cpus_per_actor=8).environment()["OMP_NUM_THREADS"] == "8"
    assert RayOptions(cpus_per_actor=0.5).environment()["OMP_NUM_THREADS"] == "1"


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a)
    )
    with pytest.raises(BadInput, match=r"pip install 'dataflex-gradstore\[ray\]'"):
        connected(RayOptions()).__enter__()


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_an_address_that_nobody_listens_at_is_named(prefix: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    where = f"{prefix}127.0.0.1:{port}"
    with pytest.raises(BadInput, match=f"no Ray cluster answers at {where}"):
        connected(RayOptions(address=where)).__enter__()
    with pytest.raises(BadInput, match="give auto, HOST:PORT"):
        connected(RayOptions(address=f"{prefix}somewhere")).__enter__()


def test_a_head_counts_as_dead_after_several_looks_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        head = f"127.0.0.1:{server.getsockname()[1]}"
        cluster = Cluster(ray_of({"CPU": 1.0}), RayOptions(), head)
        for _ in range(2 * module.LOOKS):
            cluster.check()
    for _ in range(module.LOOKS - 1):
        cluster.check()
    assert not cluster.ended
    with pytest.raises(StoreIOError, match="its head no longer answers"):
        cluster.check()
    assert cluster.ended
