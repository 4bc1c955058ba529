"""One opened generation is read by several threads, as the service does."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_threads")
def test_threads_that_read_far_apart_rows_all_get_them(kit: Any, tmp_path: Path) -> None:
    generation = kit.build(tmp_path / "s", n=40 * kit.unit_rows).generation("train/1")
    wanted = [np.array(generation.raw(unit)) for unit in range(40)]
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        try:
            for unit in np.random.default_rng(seed).integers(0, 20, 4000).tolist():
                assert generation.raw(unit)[0, 0] == wanted[unit][0, 0]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
