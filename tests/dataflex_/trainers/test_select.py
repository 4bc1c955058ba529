"""Warm-up rows: a draw of its own for every seed and every stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from dataflex.data.rows import RunData
from dataflex.run.log import SelectionEvent
from dataflex.run.schedule import Schedule
from dataflex.selectors.base import Selection
from dataflex.trainers.metrics import count_by_set, selection_metrics, skipped_rows, won_by
from dataflex.trainers.select import SelectSeam, warmup_rows, warnings_of


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


def test_the_log_counts_the_rows_that_the_event_names(
    domain_data: Callable[..., RunData],
) -> None:
    """Those dropped by LlamaFactory were in the event alone."""
    data = replace(domain_data([30, 10]), dropped={"no_response": 2})
    rows = np.arange(4)
    chosen = Selection(rows, skipped={"masked": 1})
    assert skipped_rows(data, chosen) == {"no_response": 2, "masked": 1}
    assert selection_metrics(data, rows, chosen)["skipped"] == 3.0


def event(**values: Any) -> SelectionEvent:
    return SelectionEvent(step=2, component="less", train_rows=40, **values)


def test_a_choice_of_one_row_or_by_one_target_is_warned_of() -> None:
    assert not warnings_of(event(distinct=4, won={"a": 3, "b": 1}), 4)
    assert not warnings_of(event(distinct=1, won={"a": 1}), 1)
    (copies,) = warnings_of(event(distinct=1, won={"a": 2, "b": 2}), 4)
    assert "all 4 chosen rows are copies of one row" in copies
    (won,) = warnings_of(event(distinct=3, won={"a": 0, "b": 4, "c": 0}), 4)
    assert "target 'b' won all 4 chosen rows, the other 2 had no say" in won


def test_of_many_data_sets_a_line_names_those_that_gave_most() -> None:
    chosen = {f"set_{i}": 100 - i for i in range(50)}
    shown = count_by_set(chosen, 50)
    assert shown.startswith(" (set_0 100, ")
    assert shown.endswith(" and 42 more)")
    assert len(shown) < 120
    assert count_by_set({"one": 4}, 1) == ""
    assert count_by_set({"one": 4}, 2) == " (one 4)"
    assert won_by({"a": 3, "b": 0}) == "; won by a 3, b 0"
    assert won_by({}) == ""


def test_settings_that_have_no_order_are_compared_without_one() -> None:
    """LlamaFactory makes a set of additional_target, which JSON could not keep."""
    from dataflex.trainers.settings import comparable

    found = comparable({"additional_target": {"lm_head", "embed_tokens"}, "lora_rank": 4,
                         "lora_target": ["v_proj", "q_proj"]})  # fmt: skip
    assert found == {"additional_target": ["embed_tokens", "lm_head"], "lora_rank": 4,
                     "lora_target": ["q_proj", "v_proj"]}  # fmt: skip
    assert comparable({"additional_target": None}) == {"additional_target": None}


def told(every_step: bool, update_step: int, logging_steps: int) -> list[int]:
    """The updates of 30 steps, 4 of them warm-up, that are told."""
    seam: Any = object.__new__(SelectSeam)
    seam.run = SimpleNamespace(strategy=SimpleNamespace(every_step=every_step))
    seam.state = SimpleNamespace(logging_steps=logging_steps)
    schedule = Schedule(warmup_step=4, update_step=update_step, update_times=0, budget=30)
    return [i.start for i in schedule.intervals() if i.update and seam._is_told(i)]


def test_a_choice_at_every_step_is_told_as_often_as_the_trainer_logs() -> None:
    assert told(every_step=False, update_step=1, logging_steps=10) == list(range(4, 30))
    assert told(every_step=True, update_step=1, logging_steps=10) == [4, 10, 20]
    assert told(every_step=True, update_step=3, logging_steps=10) == [4, 10, 22]
    assert told(every_step=True, update_step=1, logging_steps=1) == list(range(4, 30))
    assert told(every_step=True, update_step=1, logging_steps=0) == list(range(4, 30))
    assert told(every_step=True, update_step=12, logging_steps=5) == [4, 16, 28]
