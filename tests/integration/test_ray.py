"""`--engine ray` on two nodes: what one process builds and scores, whatever dies meanwhile."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gradstore.store.verify import verify_store

OBJECT_STORE = 80 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each; a test that ends a node adds another."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need short names
    node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE}
    # A node that is silent for a second or two is dead.
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300}
    head = {**node, "include_dashboard": False, "temp_dir": folder, "_system_config": health}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.add_node(**node)
    yield found
    found.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def until(there: Callable[[], Any], what: str) -> Any:
    ends = time.monotonic() + 60
    while time.monotonic() < ends:
        if found := there():
            return found
        time.sleep(0.05)
    raise AssertionError(f"no {what}")


def generations(store: Path) -> dict[str, bytes]:
    files = (p for part in ("generations", "plans") for p in (store / part).rglob("*"))
    return {str(p.relative_to(store)): p.read_bytes() for p in files if p.is_file()}


def working(store: Path) -> dict[str, int]:
    """Number and process id of the workers that hold a lease of a unit."""
    found = {}
    for lease in store.glob("staging/leases/*/*.1"):
        if owner := re.search(r"worker (\d)/\d, host [^,]*, pid (\d+)", lease.read_text()):
            found[owner[1]] = int(owner[2])
    return found


class Build:
    """`ray_build.py` in a process of its own."""

    def __init__(self, store: Path, address: str | None, told: Path) -> None:
        script = [sys.executable, str(Path(__file__).parent / "ray_build.py"), str(store)]
        self._told = told
        with told.open("wb") as file:
            self._process = subprocess.Popen(
                script + ([address] if address else []), stdout=file, stderr=file
            )

    def ends(self, seconds: float = 60) -> int:
        return self._process.wait(timeout=seconds)

    @property
    def told(self) -> str:
        return self._told.read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of the store that one process builds, without Ray."""
    folder = tmp_path_factory.mktemp("alone")
    build = Build(folder / "store", None, folder / "told.txt")
    assert build.ends() == 0, build.told
    return generations(folder / "store")


def test_units_of_a_killed_actor_are_taken_over(
    cluster: Any, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build = Build(store, cluster.address, tmp_path / "told.txt")
    workers = until(lambda: len(found := working(store)) == 2 and found, "two workers")
    os.kill(workers["2"], signal.SIGKILL)
    assert build.ends() == 0, build.told
    assert "actor 2" in build.told
    assert f"pid {workers['2']}) died, its process ended: its units are taken over" in build.told
    assert generations(store) == alone
    assert verify_store(store).ok


def test_units_of_a_killed_node_are_taken_over(
    cluster: Any, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build = Build(store, cluster.address, tmp_path / "told.txt")
    until(lambda: len(working(store)) == 2, "two workers")
    cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
    assert build.ends() == 0, build.told
    assert "died, its node left the cluster: its units are taken over" in build.told
    assert generations(store) == alone


def test_after_the_head_died_any_process_goes_on(
    cluster: Any, alone: dict[str, bytes], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    build = Build(store, cluster.address, tmp_path / "told.txt")
    until(lambda: list(store.glob("**/units/*.json")), "unit")
    cluster.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
    assert build.ends() == 5, build.told
    assert build.told.count("error: ") == 1
    assert "its head no longer answers" in build.told
    done = generations(store)
    cluster.shutdown()
    again = Build(store, None, tmp_path / "again.txt")
    assert again.ends() == 0, again.told
    assert generations(store) == alone
    assert {file: done[file] for file in done if "/c/" in file}.items() <= alone.items()
