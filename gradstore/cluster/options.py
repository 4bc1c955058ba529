"""Options of a call on a Ray cluster: where it is, how many processes, and what each takes."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from gradstore.errors import expect, expect_whole

#: Variables that a process of ours needs on every node, by the beginning of their names.
_PASSED_ON = ("AWS_", "DATAFLEX_", "LLAMAFACTORY_", "HF_", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_",
              "PYTORCH_", "CUBLAS_", "NVIDIA_TF32_OVERRIDE", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_",
              "PYTHONPATH", "DISABLE_VERSION_CHECK", "ALLOW_EXTRA_ARGS", "USE_MODELSCOPE_HUB",
              "USE_OPENMIND_HUB")  # fmt: skip

#: Parts of the names of secrets: Ray shows a job's variables to all who see its cluster.
_SECRET = ("TOKEN_", "_TOKEN", "KEY", "SECRET", "PASSWORD")


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """A cluster and what a process of ours may take of it.

    Attributes:
        address: auto, or host:port of the head, of a cluster that this machine is a node of; None
            starts one on this machine, which ends with the call.
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
        expect(_is_address(self.address), "address", self.address, "auto, or HOST:PORT of the head")
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


def _is_address(address: str | None) -> bool:
    if address in (None, "auto"):
        return True
    host, _, port = str(address).rpartition(":")
    return host != "" and "/" not in host and port.isdecimal() and 0 < int(port) < 1 << 16


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
