"""Schedule of ALGORITHMS.md 0.2-0.5: E1 and what was wrong upstream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.run.schedule import EventKind, Schedule, mix_budget, select_budget
from gradstore.errors import BadInput


def make(w: int, u: int, t: int, *, epochs: float = 1, rows: int = 1000, train_step: int = 0,
         batch: int = 8) -> Schedule:  # fmt: skip
    budget = select_budget(
        train_step=train_step, epochs=epochs, warmup_step=w, update_step=u, update_times=t,
        rows=rows, global_batch=batch,
    )  # fmt: skip
    return Schedule(w, u, t, budget)


def events(schedule: Schedule) -> list[tuple[int, str]]:
    return [(i.start, i.kind[0]) for i in schedule.intervals()]


def test_e1_three_stages_of_warmup_and_two_updates() -> None:
    schedule = make(10, 10, 2, epochs=3)
    assert schedule.budget == 90
    assert [s for s, k in events(schedule) if k == "w"] == [0, 30, 60]
    assert [s for s, k in events(schedule) if k == "u"] == [10, 20, 40, 50, 70, 80]
    assert {i.steps * 8 for i in schedule.intervals()} == {80}


def test_e1_a_fraction_of_an_epoch_cuts_the_second_stage() -> None:
    schedule = make(10, 10, 2, epochs=1.5)
    assert schedule.budget == 45
    assert events(schedule) == [(0, "w"), (10, "u"), (20, "u"), (30, "w"), (40, "u")]


def test_e1_without_update_times_the_data_set_sets_the_budget() -> None:
    schedule = make(10, 10, 0)
    assert schedule.budget == 125
    assert [s for s, k in events(schedule) if k == "u"] == list(range(10, 121, 10))
    assert schedule.updates_per_stage == 12


def test_e2_step_13_belongs_to_the_selection_made_at_step_10() -> None:
    interval = make(10, 10, 2, epochs=3).interval(13)
    assert (interval.kind, interval.start, interval.update) == (EventKind.UPDATE, 10, 1)


def test_train_step_overrides_epochs_and_stages() -> None:
    assert make(10, 10, 2, epochs=3, train_step=17).budget == 17


def test_without_warmup_every_stage_opens_with_a_selection() -> None:
    assert events(make(0, 5, 2, epochs=2)) == [(0, "u"), (5, "u"), (10, "u"), (15, "u")]


@pytest.mark.parametrize(
    ("w", "u", "t", "says"), [(0, 0, 1, "update_step is 0"), (-1, 5, 1, "warmup_step is -1")]
)
def test_impossible_schedules_are_refused(w: int, u: int, t: int, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        Schedule(w, u, t, 10)


@given(st.integers(0, 9), st.integers(1, 9), st.integers(-1, 4), st.integers(1, 200))
def test_every_step_lies_in_exactly_one_interval(w: int, u: int, t: int, budget: int) -> None:
    schedule = Schedule(w, u, t, budget)
    covered = [g for i in schedule.intervals() for g in range(i.start, i.stop)]
    assert covered[:budget] == list(range(budget))
    for g in range(budget):
        assert schedule.interval(g).start <= g < schedule.interval(g).stop


@pytest.mark.parametrize(
    ("changes", "budget"),
    [
        ({}, 30),  # W + U * T, epochs or not
        ({"update_times": 0}, 10),
        ({"update_times": -1}, 187),  # int(1.5 * floor(1000 / 8))
        ({"static_mix": True}, 187),
        ({"static_mix": True, "rows": 5}, 1),
        ({"static_mix": True, "train_step": 7}, 7),
        ({"train_step": 99}, 99),
    ],
)
def test_a_mix_run_is_as_long_as_its_updates_or_its_epochs(
    changes: dict[str, int], budget: int
) -> None:
    usual = {"train_step": 0, "epochs": 1.5, "warmup_step": 10, "update_step": 10,
             "update_times": 2, "static_mix": False, "rows": 1000, "global_batch": 8}  # fmt: skip
    assert mix_budget(**{**usual, **changes}) == budget  # type: ignore[arg-type]
