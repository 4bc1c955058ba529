"""A build is shared by workers or by an engine, which starts workers of its own."""

from __future__ import annotations

import pytest

from dataflex.launch.options import Builders
from gradstore.errors import BadInput
from gradstore.storage.leases import Worker


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
