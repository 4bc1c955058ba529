"""Warm-up rows: a draw of its own for every seed and every stage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from dataflex.trainers.select import warmup_rows


def drawn(seed: int, stage: int, count: int = 20) -> list[int]:
    tokens = np.ones(100, dtype=np.int64)
    tokens[::7] = 0
    data: Any = SimpleNamespace(train=SimpleNamespace(target_tokens=tokens))
    return warmup_rows(data, count, seed, stage).tolist()


def test_a_warm_up_depends_on_seed_and_stage_and_draws_rows_with_a_target_once() -> None:
    rows = drawn(seed=1, stage=0)
    assert rows == drawn(seed=1, stage=0)
    assert rows != drawn(seed=2, stage=0)
    assert rows != drawn(seed=1, stage=1)
    assert len(set(rows)) == 20
    assert all(row % 7 for row in rows)
