"""A Ray cluster for the length of a call: found or started, asked for room, and watched.

Ray places and starts processes, and carries small messages. What is true lies in the store: a
cluster that ends takes nothing with it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import math
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradstore.errors import BadInput, StoreIOError, expect, expect_whole

MISSING = (
    "--engine ray needs Ray, which is not installed. Run: pip install 'dataflex-gradstore[ray]'"
)

#: Object store of a cluster that is started for a call; Ray takes no less than 75 MiB.
OBJECT_STORE_BYTES = 80 << 20

#: Seconds between two looks at the head, how long it may take to answer, and after how many looks
#: in vain it counts as dead. (Ray itself would end this process after a minute of silence.)
LOOK_SECONDS, ANSWER_SECONDS, LOOKS = 1.0, 2.0, 3

#: Seconds in which the processes of a cluster of our own end.
END_SECONDS = 10.0

#: Longest folder that sockets of Ray's fit below: a path of theirs has at most 107 characters.
_LONGEST_FOLDER = 40

#: Variables that a process of ours needs on every node, by the beginning of their names.
_PASSED_ON = ("DATAFLEX_", "LLAMAFACTORY_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_",
              "PYTORCH_", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_",
              "PYTHONPATH", "DISABLE_VERSION_CHECK", "ALLOW_EXTRA_ARGS", "USE_MODELSCOPE_HUB",
              "USE_OPENMIND_HUB")  # fmt: skip

#: Parts of the names of secrets: Ray shows a job's variables to all who see its cluster.
_SECRET = ("TOKEN_", "_TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """A cluster and what a process of ours may take of it.

    Attributes:
        address: auto, host:port of the head, or ray://host:port; None starts a cluster on this
            machine, which ends with the call.
        actors: processes; None takes as many as there is room for.
        cpus_per_actor: CPUs of each, 0.5 for half of one; as many threads, at least 1, where
            OMP_NUM_THREADS does not say another number.
        gpus_per_actor: GPUs of each, 0.5 for half of one; None takes 1 where the cluster has any.
        memory_per_actor: GiB of memory that each reserves; None reserves none.

    Raises:
        BadInput: a number out of range.
    """

    address: str | None = None
    actors: int | None = None
    cpus_per_actor: float = 1.0
    gpus_per_actor: float | None = None
    memory_per_actor: float | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        expect(self.address != "", "address", self.address, "auto, HOST:PORT or ray://HOST:PORT")
        if self.actors is not None:
            expect_whole(self.actors, "actors")
        cpus, gpus, memory = self.cpus_per_actor, self.gpus_per_actor, self.memory_per_actor
        expect(_is_share(cpus) and cpus > 0, "cpus_per_actor", cpus, _SHARE.format("above 0"))
        expect(gpus is None or _is_share(gpus), "gpus_per_actor", gpus, _SHARE.format("from 0 on"))
        fits = memory is None or 0 < memory < math.inf
        expect(fits, "memory_per_actor", memory, "GiB, a number above 0")

    def resources(self, total: Mapping[str, float]) -> dict[str, float]:
        """Return what an actor takes, under Ray's names, of a cluster that has `total`."""
        gpus = self.gpus_per_actor
        if gpus is None:
            gpus = 1.0 if total.get("GPU", 0) else 0.0
        taken = {"CPU": self.cpus_per_actor, "GPU": gpus}
        if self.memory_per_actor is not None:
            taken["memory"] = float(int(self.memory_per_actor * 2**30))
        return {name: amount for name, amount in taken.items() if amount}

    def environment(self) -> dict[str, str]:
        """Return the variables of this process that each actor has too."""
        threads = {"OMP_NUM_THREADS": str(max(1, int(self.cpus_per_actor)))}
        passed = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_PASSED_ON) and not any(part in name for part in _SECRET)
        }
        return threads | passed


_SHARE = "a number {}, and a whole one above 1"


def _is_share(value: float) -> bool:
    return 0 <= value < math.inf and (value <= 1 or value == int(value))


def room(nodes: Mapping[str, Mapping[str, float]], taken: Mapping[str, float]) -> int:
    """Count the actors that nodes have room for.

    Args:
        nodes: node -> resource -> how much it has.
        taken: resource -> how much an actor takes, above 0.

    >>> room({"a": {"CPU": 4, "GPU": 1}, "b": {"CPU": 3}}, {"CPU": 1, "GPU": 0.25})
    4
    """
    each = (
        min(math.floor(has.get(name, 0.0) / amount + 1e-9) for name, amount in taken.items())
        for has in nodes.values()
    )
    return sum(each)


class Cluster:
    """A cluster that this process is connected to.

    Args:
        ray: the module.
        options: of the call.
        head: address that the head listens at, host:port.

    Attributes:
        actors: how many processes of ours there are to be.
        taken: what each takes, by Ray's names of resources.
        told: both in words.
        ended: the head is known to be dead.
    """

    def __init__(self, ray: Any, options: RayOptions, head: str) -> None:  # noqa: ANN401
        self.ray, self.options, self.head = ray, options, head
        nodes = {n["NodeID"]: n["Resources"] for n in ray.nodes() if n["Alive"]}
        total = {name: sum(has.get(name, 0.0) for has in nodes.values()) for name in ("CPU", "GPU")}
        self.taken = options.resources(total)
        fitting = room(nodes, self.taken)
        if not fitting:
            has = "; ".join(sorted({_listed(node) for node in nodes.values()}))
            raise BadInput(
                f"no node of the Ray cluster has room for an actor of {_listed(self.taken)}: they "
                f"have {has}. Give less with --cpus-per-actor, --gpus-per-actor or "
                "--memory-per-actor, or add nodes."
            )
        self.actors = options.actors or fitting
        self.told = f"nodes: {len(nodes)}, actors: {self.actors} of {_listed(self.taken)}"
        self.ended = False
        self._looked, self._in_vain = time.monotonic(), 0

    def actor_options(self) -> dict[str, Any]:
        """Return Ray's options of an actor or task of ours."""
        # A process with no GPU of its own would see, and use, all of its node's.
        hidden = {} if "GPU" in self.taken else {"CUDA_VISIBLE_DEVICES": ""}
        environment = {"env_vars": self.options.environment() | hidden}
        chosen = {
            "num_cpus": self.taken["CPU"],
            "num_gpus": self.taken.get("GPU", 0),
            "runtime_env": environment,
        }
        return chosen | ({"memory": self.taken["memory"]} if "memory" in self.taken else {})

    def check(self) -> None:
        """Look whether the head still answers, at most once a second.

        Raises:
            StoreIOError: it has not for several looks.
        """
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        self._in_vain = 0 if _answers(self.head) else self._in_vain + 1
        if self._in_vain >= LOOKS:
            self.ended = True
            raise StoreIOError(
                f"the Ray cluster at {self.head} has ended: its head no longer answers. What is in "
                "the store stays; run the same command again, with or without --engine ray."
            )


@contextlib.contextmanager
def connected(options: RayOptions) -> Iterator[Cluster]:
    """Connect to a cluster, or start one here; leave it, or end it, at the end.

    Nothing that Ray prints meanwhile comes to the terminal.

    Raises:
        BadInput: Ray is not installed, no cluster is at the address, it runs another version, or it
            has no room for an actor.
        StoreIOError: the cluster ended, or one could not be started.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(MISSING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = None if options.address else _short_folder()
    try:
        # Ray prints what befell a node to stdout, past `log_to_driver`.
        with contextlib.redirect_stdout(io.StringIO()):
            import ray

            logging.getLogger("ray").setLevel(logging.CRITICAL)
            try:
                yield Cluster(ray, options, _connect(ray, options, folder))
            except (ray.exceptions.RaySystemError, ConnectionError) as error:
                where = options.address or "this machine"
                raise StoreIOError(
                    f"the Ray cluster at {where} has ended ({_first_line(error)}). What is in the "
                    "store stays; run the same command again, with or without --engine ray."
                ) from error
            finally:
                ray.shutdown()
    finally:
        if folder is not None:
            _remove(folder)


def _connect(ray: Any, options: RayOptions, folder: Path | None) -> str:  # noqa: ANN401
    """Connect to a cluster, or start one in a folder; return its head's host:port."""
    silent: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if folder is not None:
        cpus = None
        if options.actors is not None:
            cpus = max(math.ceil(options.actors * options.cpus_per_actor), os.cpu_count() or 1)
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False,
                     object_store_memory=OBJECT_STORE_BYTES, _temp_dir=str(folder),
                     **silent)  # fmt: skip
        except (RuntimeError, OSError) as error:
            raise StoreIOError(
                f"Ray could not be started on this machine: {_first_line(error)}"
            ) from error
        return str(ray.get_runtime_context().gcs_address)
    address = str(options.address)
    named = None if address == "auto" else address.removeprefix("ray://")
    if named is not None and not _answers(named):
        raise BadInput(f"no Ray cluster answers at {address}; start one with `ray start --head`.")
    try:
        ray.init(address=address, **({} if address.startswith("ray://") else silent))
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise BadInput(f"no Ray cluster could be joined at {address}: {_first_line(error)}; start "
                       "one of this version with `ray start --head`.") from error  # fmt: skip
    if named is not None and address.startswith("ray://"):
        return named
    return str(ray.get_runtime_context().gcs_address)


def _answers(address: str) -> bool:
    """Look whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise BadInput(f"address is {address!r}; give auto, HOST:PORT or ray://HOST:PORT.")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return True
    except (OSError, OverflowError):
        return False


def _short_folder() -> Path:
    """Make a folder of this call's own, with a name that is short enough for sockets."""
    above = tempfile.gettempdir()
    return Path(
        tempfile.mkdtemp(prefix="ray-", dir=above if len(above) < _LONGEST_FOLDER else "/tmp")
    )


def _remove(folder: Path) -> None:
    """Remove the folder of a cluster; its last processes may still write for a moment."""
    ends = time.monotonic() + END_SECONDS
    while folder.exists() and time.monotonic() < ends:
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)


def _listed(resources: Mapping[str, float]) -> str:
    shown = [f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU")]
    if "memory" in resources:
        shown.append(f"{resources['memory'] / 2**30:.3g} GiB")
    return ", ".join(shown)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
