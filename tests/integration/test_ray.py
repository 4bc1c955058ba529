"""`--engine ray` on two nodes: what one process builds and scores, whatever dies meanwhile."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gradstore.storage.places import reads_at
from gradstore.store.verify import verify_store

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}

#: A node that is silent for a second or two is dead.
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300}


def raylet(node: Any) -> int:
    """Process id of a node, whose workers are its children."""
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; the tests, in their order, end one and then the other."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need short names
    Path("/tmp/ray").mkdir(exist_ok=True)  # the head notes its address there, and makes no folder
    head = {**NODE, "include_dashboard": False, "temp_dir": folder, "_system_config": HEALTH}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(**NODE)
    agents = [p for node in found.list_all_nodes() for p in psutil.Process(raylet(node)).children()]
    yield found
    found.shutdown()
    for process in agents:  # those of a node that was killed live on
        if process.is_running():
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a store that one process builds, without Ray, when the first test asks for it."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def build(cli: Any, config: Any, alone: Path) -> Iterator[Callable[..., Any]]:
    """`build(STORE, ...)`: of three units; one in the background ends with the test."""
    path = config(max_samples=600, output_dir=str(alone / "run"),
                  component_params={"proj_dim": 64, "gradient_type": "sgd"})  # fmt: skip
    command = ("gradstore", "build", path)
    if not (alone / "store").exists():
        result = cli(*command, f"gradstore={alone / 'store'}")
        assert result.code == 0, result.err[-3000:]
    behind: list[psutil.Process] = []

    def run(store: str | Path, *options: str, **given: Any) -> Any:
        result = cli(*command, f"gradstore={store}", *options, **given)
        if "background" in given:
            behind.append(psutil.Process(result.code))
        return result

    yield run
    for driver in behind:  # one that a failed test left would keep the actors' CPUs
        with contextlib.suppress(psutil.NoSuchProcess):  # also where another has its number by now
            driver.kill()


def said(told: Path) -> str:
    """Read what a process in the background has said by now."""
    return told.read_bytes().decode() if told.exists() else ""


def until(there: Callable[[], Any], what: str, told: Path | None = None) -> None:
    ends = time.monotonic() + 300
    while not there():
        assert time.monotonic() < ends, f"no {what}: {said(told)[-3000:] if told else ''}"
        time.sleep(0.05)


def generations(store: Path) -> dict[str, bytes]:
    files = (p for part in ("generations", "plans") for p in (store / part).rglob("*"))
    return {str(p.relative_to(store)): p.read_bytes() for p in files if p.is_file()}


def leases(store: Path) -> dict[int, set[str]]:
    """Process id -> leases of units that it holds."""
    found: dict[int, set[str]] = {}
    for lease in store.glob("staging/leases/*/*.1"):
        if owner := re.search(r"worker \d/\d, host [^,]*, pid (\d+)", lease.read_text()):
            found.setdefault(int(owner[1]), set()).add(lease.name)
    return found


def actors(cluster: Any) -> list[int]:
    """Process ids of our actors, at work or not."""
    processes = psutil.process_iter(["ppid", "cmdline"])
    nodes = {raylet(node) for node in cluster.list_all_nodes()}
    return [
        process.pid
        for process in processes
        if process.info["ppid"] in nodes
        and "FeatureActor" in " ".join(process.info["cmdline"] or [])
    ]


def test_a_store_in_a_bucket_holds_what_one_in_a_folder_does(
    build: Any, alone: Path, object_server: str, use_server: Callable[[str], str]
) -> None:
    """On a cluster that is started for the call, before there is another one."""
    place = use_server(object_server)
    env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    result = build(place, "--engine", "ray", "--actors", "2", env=env)
    assert result.code == 0, result.err[-3000:]
    files = reads_at(place)
    found = {name: files.read(name) for top in ("generations", "plans") for name in files.walk(top)}
    assert found == generations(alone / "store")
    assert verify_store(place).ok


def test_ctrl_c_leaves_no_actor(cluster: Any, build: Any, tmp_path: Path) -> None:
    told = tmp_path / "told.txt"
    options = ("--engine", "ray", "--address", cluster.address)
    driver = build(tmp_path / "store", *options, background=told).code
    until(lambda: "nodes: 2, actors: 2 of 1 CPU" in said(told) and actors(cluster), "actor", told)
    os.kill(driver, signal.SIGINT)
    until(lambda: "error: interrupted" in said(told), "message", told)
    until(lambda: not actors(cluster), "end of the actors")
    assert said(told).count("error: ") == 1, said(told)


def workers_at_work(node: Any, store: Path, told: Path) -> tuple[int, int]:
    """Wait until both workers fill units of the train rows; return that of a node, and the other.

    The other is stopped: it may be done with all before a death is known.
    """
    until(lambda: len(leases(store)) == 2, "two workers", told)
    first, second = leases(store)
    there = first if psutil.Process(first).ppid() == raylet(node) else second
    other = second if there == first else first
    os.kill(other, signal.SIGSTOP)
    return there, other


def end(worker: int) -> None:
    """End a worker whose machine has died: here it would notice after a while."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(worker)
        process.kill()
        until(lambda: process.status() == psutil.STATUS_ZOMBIE, "end of a worker")
        # Its first thread is gone; files, and locks on them, are open until the last one is.
        until(lambda: process.num_threads() <= 1, "end of a worker's threads")


def test_units_of_a_killed_actor_are_taken_over_and_scores_are_those_of_one_process(
    cluster: Any, build: Any, cli: Any, alone: Path, tmp_path: Path
) -> None:
    store, told = tmp_path / "store", tmp_path / "told.txt"
    engine = ("--engine", "ray", "--address", cluster.address)
    build(store, *engine, background=told)
    there, other = workers_at_work(*cluster.worker_nodes, store, told)
    os.kill(there, signal.SIGKILL)
    died = f"pid {there}) died, its process ended: its units are taken over"
    until(lambda: died in said(told), "word of the actor", told)
    os.kill(other, signal.SIGCONT)
    until(lambda: f"store: {store}" in said(told), "end", told)
    assert generations(store) == generations(alone / "store")
    assert verify_store(store).ok

    scored = [tmp_path / name for name in ("ray.parquet", "alone.parquet")]
    for output, options in zip(scored, (engine, ()), strict=True):
        result = cli("gradstore", "score", store, "-o", output, *options)
        assert result.code == 0, result.err[-3000:]
    assert scored[0].read_bytes() == scored[1].read_bytes()


def test_one_node_goes_on_without_the_other_and_any_process_after_the_head(
    cluster: Any, build: Any, alone: Path, tmp_path: Path
) -> None:
    store, told = tmp_path / "store", tmp_path / "told.txt"
    build(store, "--engine", "ray", "--address", cluster.address, background=told)
    (node,) = cluster.worker_nodes
    there, other = workers_at_work(node, store, told)
    cluster.remove_node(node, allow_graceful=False)
    end(there)
    node_died = "died, its node left the cluster: its units are taken over"
    until(lambda: node_died in said(told), "word of the node", told)
    os.kill(other, signal.SIGCONT)
    until(lambda: list(store.glob("generations/train/0/units/*.json")), "unit", told)
    os.kill(other, signal.SIGSTOP)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    until(lambda: "its head no longer answers" in said(told), "word of the head", told)
    assert said(told).count("error: ") == 1
    end(other)
    done = generations(store)
    cluster.shutdown()
    again = build(store)
    assert again.code == 0, again.err[-3000:]
    assert generations(store) == generations(alone / "store")
    assert {file: done[file] for file in done if "/c/" in file}.items() <= generations(
        store
    ).items()
