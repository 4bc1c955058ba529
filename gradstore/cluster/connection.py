"""The connection to a Ray cluster: found or started, asked for room, and watched.

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
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, TypeVar

from gradstore.cluster.options import RayOptions, room
from gradstore.errors import BadInput, StoreIOError

MISSING = (
    "--engine ray needs Ray, which is not installed. Run: pip install 'dataflex-gradstore[ray]'"
)

#: Object store of a cluster that is started for a call; Ray takes no less than 75 MiB.
OBJECT_STORE_BYTES = 80 << 20

#: Seconds between two looks at the head, how long it may take to answer, and after how many looks
#: in vain it counts as dead. (Ray itself would end this process after a minute of silence.)
LOOK_SECONDS, ANSWER_SECONDS, LOOKS = 1.0, 2.0, 3

#: Seconds after which a wait for room is told of, and after which it ends.
TOLD_SECONDS, ROOM_SECONDS = 15.0, 600.0

#: Seconds in which the processes of a cluster of our own end.
END_SECONDS = 10.0

#: Longest folder that sockets of Ray's fit below: a path of theirs has at most 107 characters.
_LONGEST_FOLDER = 40

T = TypeVar("T")


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

    def __init__(
        self,
        ray: Any,  # noqa: ANN401 - the module
        options: RayOptions,
        head: str,
    ) -> None:
        self.ray, self.options, self.head = ray, options, head
        self.ended = False
        self._looked, self._in_vain = time.monotonic(), 0
        nodes = {n["NodeID"]: n["Resources"] for n in self.ask(ray.nodes) if n["Alive"]}
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

    def wait_for_room(self, told: Callable[[str], None]) -> None:
        """Wait until a process of our size has run: others may use the cluster too.

        Args:
            told: called once, with a line, where it takes long.

        Raises:
            BadInput: none has run in `ROOM_SECONDS`.
            StoreIOError: as `check` raises it.
        """
        # A lambda goes there by value: nothing of ours is imported for it.
        task = self.ray.remote(lambda: None).options(**self.actor_options())
        probe = self.ask(task.remote)
        began, silent = time.monotonic(), True
        while not self.ray.wait([probe], timeout=LOOK_SECONDS)[0]:
            self.check()
            waited = time.monotonic() - began
            if waited < TOLD_SECONDS:
                continue
            free = _listed(self.ask(self.ray.available_resources))
            here = (
                f"no process of {_listed(self.taken)} could start in {waited:.0f} seconds; {free}"
            )
            if waited > ROOM_SECONDS:
                raise BadInput(
                    f"{here} are free on the Ray cluster. Others use it: try again when they are "
                    "done, or ask for less with --cpus-per-actor or --gpus-per-actor."
                )
            if silent:
                told(f"Ray: {here} are free; waiting for those who use the cluster.")
                silent = False

    def ask(self, call: Callable[[], T]) -> T:
        """Return what a call to Ray returns that may need the head, and look at the head meanwhile.

        A thread makes the call: it would wait for a head that has died, deaf to signals, until Ray
        ends this process after a minute.

        Raises:
            StoreIOError: as `check` raises it; what the call raises is raised here.
        """
        answer: futures.Future[T] = futures.Future()

        def make_it() -> None:
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=make_it, name="ray", daemon=True).start()
        while not futures.wait([answer], timeout=LOOK_SECONDS).done:
            self.check()
        return answer.result()

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


def could_not_start(who: str, error: BaseException) -> BadInput:
    """Tell of a process on a node that could not load our code, or what was sent to it.

    Args:
        who: the process, in words.
        error: Ray's, which quotes a traceback of that process.
    """
    said = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
    return BadInput(
        f"{who} could not start: {said}. All nodes need the version of Python and of DataFlex that "
        "this process has."
    )


@contextlib.contextmanager
def connected(options: RayOptions, told: Callable[[str], None]) -> Iterator[Cluster]:
    """Connect to a cluster, or start one here; leave it, or end it, at the end.

    Nothing that Ray prints meanwhile comes to the terminal.

    Args:
        options: of the call.
        told: called with a line about the cluster, and where there is a wait for room.

    Raises:
        BadInput: Ray is not installed, no cluster is at the address, it runs another version, or it
            has no room for an actor.
        StoreIOError: the cluster ended, or one could not be started.
    """
    if importlib.util.find_spec("ray") is None:
        raise BadInput(MISSING)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints what befell a node to stdout, past `log_to_driver`.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.ExitStack() as opened:
        import ray

        opened.enter_context(_nodes_own_environment())
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        opens = _joined(ray, options.address) if options.address else _started(ray, options)
        try:
            cluster = Cluster(ray, options, opened.enter_context(opens))
            told(f"Ray: {cluster.told}")
            cluster.wait_for_room(told)
            yield cluster
        except (ray.exceptions.RaySystemError, ConnectionError) as error:
            where = options.address or "this machine"
            raise StoreIOError(
                f"the Ray cluster at {where} has ended ({_first_line(error)}). What is in the "
                "store stays; run the same command again, with or without --engine ray."
            ) from error


@contextlib.contextmanager
def _nodes_own_environment() -> Iterator[None]:
    """Have Ray start processes in the nodes' own environment, under `uv run` too.

    There it would upload the working folder, and start each process by `uv run` in a copy of it.
    Nodes have DataFlex, and see the command's folder. A variable comes too late: LlamaFactory
    imports Ray where there is one.
    """
    from ray._private import ray_constants

    before = ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
    try:
        yield
    finally:
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = before


@contextlib.contextmanager
def _started(ray: Any, options: RayOptions) -> Iterator[str]:  # noqa: ANN401
    """Start a cluster in a folder of its own, and connect to it; yield its head's host:port."""
    cpus = None
    if options.actors is not None:
        cpus = max(math.ceil(options.actors * options.cpus_per_actor), os.cpu_count() or 1)
    above = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="ray-", dir=above if len(above) < _LONGEST_FOLDER else "/tmp")
    before = {name: os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    # Ray would write a token to the user's home, and each later `ray start` would ask for that.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False,
                     object_store_memory=OBJECT_STORE_BYTES, _temp_dir=folder,
                     configure_logging=False)  # fmt: skip
        except Exception as error:  # of a machine that is slow: Ray raises it bare
            if type(error) is not Exception and not isinstance(error, RuntimeError | OSError):
                raise  # ours, or a Ray that takes other arguments
            raise StoreIOError(
                f"Ray could not be started on this machine: {_first_line(error)}"
            ) from error
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _remove(Path(folder))


@contextlib.contextmanager
def _joined(ray: Any, address: str) -> Iterator[str]:  # noqa: ANN401
    """Connect to the cluster at an address; yield its head's host:port."""
    if address != "auto" and not _answers(address):
        raise BadInput(f"no Ray cluster answers at {address}; start one with `ray start --head`.")
    try:
        with _silent_stderr():
            ray.init(address=address, log_to_driver=False, configure_logging=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if "AuthenticationError" in "".join(traceback.format_exception(error)):
            hint = "it asks for a token: set RAY_AUTH_MODE=token, and see `ray get-auth-token`."
        else:
            hint = (f"{_first_line(error)}. This machine must be a node of it, of this version of "
                    "Ray: start one with `ray start --head`.")  # fmt: skip
        raise BadInput(f"no Ray cluster could be joined at {address}: {hint}") from error
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what compiled code writes to stderr meanwhile: a line for each of Ray's attempts."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _answers(address: str) -> bool:
    """Look whether something listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS):
            return True
    except OSError:
        return False


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
