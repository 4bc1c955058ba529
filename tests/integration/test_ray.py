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

import numpy as np
import psutil
import pytest

from gradstore.format.names import GenerationName
from gradstore.format.plans import Plan
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.storage.places import reads_at
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}

#: Of the store's features: a unit is of 128 KiB, more than Ray carries beside its object store.
DIM, UNIT_ROWS = 1024, 64

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
    yield found
    left = [process for node in found.list_all_nodes() for process in below(node)]
    found.shutdown()
    for process in left:
        end(process)
    shutil.rmtree(folder, ignore_errors=True)


def below(node: Any) -> list[psutil.Process]:
    """List what a node has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(raylet(node)).children(recursive=True)
    return []


def end(process: psutil.Process) -> None:
    """End a process, all of it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
        until(lambda: process.status() == psutil.STATUS_ZOMBIE, "end of a process")
        # Its first thread is gone; files, and locks on them, are open until the last one is.
        until(lambda: process.num_threads() <= 1, "end of a process's threads")


def lose(cluster: Any, node: Any) -> None:
    """End a machine at once: its raylet, and what that started, which would live on for a while."""
    there = below(node)
    cluster.remove_node(node, allow_graceful=False)
    for process in there:
        end(process)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a store that one process builds, without Ray, when the first test asks for it."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def build(cli: Any, config: Any, alone: Path) -> Iterator[Callable[..., Any]]:
    """`build(STORE, ...)`: of ten units; one in the background ends with the test."""
    params = {"proj_dim": DIM, "unit_rows": UNIT_ROWS, "gradient_type": "sgd"}
    path = config(max_samples=600, output_dir=str(alone / "run"), component_params=params)
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


def units(store: Path) -> Path:
    """Folder of the records of train units that are done."""
    return store / "generations/train/0/units"


def held(store: Path) -> dict[int, set[int]]:
    """Process id -> train units that it has leased and not finished."""
    found: dict[int, set[int]] = {}
    plan = store / "plans/train/0.json"
    leases = Plan.from_bytes(plan.read_bytes())[1] if plan.exists() else "none yet"
    for lease in (store / "staging/leases" / leases).glob("*.1"):
        owner = re.search(r"worker \d/\d, host [^,]*, pid (\d+)", lease.read_text())
        if owner and not (units(store) / f"{lease.stem}.json").exists():
            found.setdefault(int(owner[1]), set()).add(int(lease.stem))
    return found


def actors(cluster: Any) -> list[int]:
    """Process ids of our actors, at work or not; Ray calls a process by its task."""
    processes = psutil.process_iter(["ppid", "cmdline"])
    nodes = {raylet(node) for node in cluster.list_all_nodes()}
    return [
        process.pid
        for process in processes
        if process.info["ppid"] in nodes
        and re.match("ray::(FeatureActor|worker )", " ".join(process.info["cmdline"] or []))
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


def scored(path: Path) -> Path:
    """Write a store of random features, of which scores take several tasks."""
    rng, rows = np.random.default_rng(0), {"train/0": 18_000, "target/a/0": 7, "target/b/0": 9}
    with StoreWriter(path, provenance={"test": 1}) as writer:
        for name, count in rows.items():
            parsed = GenerationName.parse(name)
            record = GenerationRecord(
                name=name, role=parsed.role, set=parsed.set, step=0, run_id="test",
                adapter_hash="0" * 64, effective_seed=0,
                projection={"method": "sjlt", "d": 8, "seed": 0}, feature="sgd",
                learning_rate=1e-3 if parsed.role == "train" else None,
            )  # fmt: skip
            hashes = np.arange(2 * count, dtype="<u8").view(np.uint8).reshape(count, 16)
            generation = writer.begin(record, RowSet(hashes), dim=8, unit_rows=count)
            values = rng.standard_normal((count, 8), dtype=np.float32)
            norms = np.linalg.norm(values, axis=1)
            status, tokens = np.zeros(count, np.uint8), np.ones(count, np.int32)
            generation.write_unit(0, values, norms, status, tokens)
            generation.commit()
    return path


def scoring(node: Any) -> list[psutil.Process]:
    """List the processes of a node that load what a task needs, or are at it."""
    found = []
    for process in below(node):
        with contextlib.suppress(OSError):
            if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                found.append(process)
    return found


def test_scores_are_those_of_one_process_whatever_process_and_node_die(
    cluster: Any, cli: Any, tmp_path: Path
) -> None:
    store, told = scored(tmp_path / "store"), tmp_path / "told.txt"
    tables = [tmp_path / name for name in ("ray.parquet", "alone.parquet")]
    command = ("gradstore", "score", store, "-o")
    driver = cli(*command, tables[0], "--engine", "ray", "--address", cluster.address,
                 background=told).code  # fmt: skip
    (node,) = cluster.worker_nodes
    until(lambda: scoring(cluster.head_node) and scoring(node), "task on each node", told)
    for process in scoring(cluster.head_node):
        end(process)
    lose(cluster, node)
    assert not tables[0].exists()  # they died before there were scores
    assert cli.ended(driver) == 0, said(told)[-3000:]
    cluster.add_node(**NODE)
    result = cli(*command, tables[1])
    assert result.code == 0, result.err[-3000:]
    assert tables[0].read_bytes() == tables[1].read_bytes()


def workers_at_work(node: Any, store: Path, told: Path) -> tuple[psutil.Process, psutil.Process]:
    """Stop each worker in its first train units; return that of a node, and the other."""
    until(lambda: held(store), "worker", told)
    first = min(held(store))
    os.kill(first, signal.SIGSTOP)
    until(lambda: held(store).keys() - {first}, "second worker", told)
    (second,) = held(store).keys() - {first}
    os.kill(second, signal.SIGSTOP)
    workers = [psutil.Process(first), psutil.Process(second)]
    there, other = sorted(workers, key=lambda worker: worker.ppid() != raylet(node))
    return there, other


def tasks(cluster: Any) -> set[str]:
    """Names of the tasks that Ray shows."""
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import GetTaskEventsRequest
    from ray.core.generated.gcs_service_pb2_grpc import TaskInfoGcsServiceStub

    with contextlib.closing(init_grpc_channel(cluster.address)) as channel:
        reply = TaskInfoGcsServiceStub(channel).GetTaskEvents(GetTaskEventsRequest(limit=10_000))
    return {task.task_info.name for task in reply.events_by_task}


def carried(node: Any) -> int:
    """Bytes that were ever put into the object store of a node."""
    from ray._private.internal_api import node_stats

    stats = node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False)
    return int(stats.store_stats.cumulative_created_bytes)


def test_others_take_over_from_actor_and_node_and_any_process_after_the_head(
    cluster: Any, build: Any, alone: Path, tmp_path: Path
) -> None:
    """One build: an actor is killed, its node is lost, and then the head. Ray has no feature."""
    store, told = tmp_path / "store", tmp_path / "told.txt"
    before = carried(cluster.head_node)
    build(store, "--engine", "ray", "--address", cluster.address, background=told)
    (node,) = cluster.worker_nodes
    there, other = workers_at_work(node, store, told)
    left_behind = held(store)[there.pid]
    there.kill()
    died = f"pid {there.pid}) died, its process ended: its units are taken over"
    until(lambda: died in said(told), "word of the actor", told)
    until(lambda: {each.pid for each in below(node)} & set(actors(cluster)), "a new actor", told)
    lose(cluster, node)
    node_died = "died, its node left the cluster: its units are taken over"
    until(lambda: node_died in said(told), "word of the node", told)
    other.resume()
    taken_over = units(store) / f"{min(left_behind)}.json"
    until(taken_over.exists, "unit of the one that died", told)
    assert carried(cluster.head_node) - before < UNIT_ROWS * DIM * 2  # a stopped one tells nothing
    other.suspend()
    at_it = re.compile(r"worker \d/2: gradients of train/0, unit \d")
    until(lambda: any(at_it.fullmatch(name) for name in tasks(cluster)), "task by its unit", told)
    done = generations(store)

    beside = below(cluster.head_node)
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    until(lambda: "its head no longer answers" in said(told), "word of the head", told)
    assert said(told).count("error: ") == 1
    for process in beside:
        end(process)
    cluster.shutdown()
    again_by_one = build(store)
    assert again_by_one.code == 0, again_by_one.err[-3000:]
    assert generations(store) == generations(alone / "store")
    assert verify_store(store).ok
    kept = {file: done[file] for file in done if "/c/" in file}
    assert kept
    assert kept.items() <= generations(store).items()
