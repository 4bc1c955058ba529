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


def test_settings_that_have_no_order_are_compared_without_one() -> None:
    """LlamaFactory makes a set of additional_target, which JSON could not keep."""
    from dataflex.trainers.settings import comparable

    found = comparable({"additional_target": {"lm_head", "embed_tokens"}, "lora_rank": 4,
                         "lora_target": ["v_proj", "q_proj"]})  # fmt: skip
    assert found == {"additional_target": ["embed_tokens", "lm_head"], "lora_rank": 4,
                     "lora_target": ["q_proj", "v_proj"]}  # fmt: skip
    assert comparable({"additional_target": None}) == {"additional_target": None}
