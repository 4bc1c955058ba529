"""From proportions to rows: ALGORITHMS 0.8 and 2.1, E3 and E19."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import Component
from dataflex.data.mixture import (
    Cursors,
    as_proportions,
    check_domains,
    domain_of,
    largest_remainder,
    mixers_answer,
    opening_proportions,
)
from dataflex.data.order import BatchShape
from dataflex.data.rows import RunData
from dataflex.mixers.base import Mixer
from dataflex.mixers.faults import domain_faults, rule_faults
from dataflex.run.ranks import Ranks
from gradstore.errors import BadInput

MakeData = Callable[..., RunData]


def config(dataset: str = "a,b", **ours: Any) -> RunConfig:
    theirs = {k: ours.pop(k) for k in ("val_size", "mix_strategy") if k in ours}
    return RunConfig(
        DataFlexConfig(train_type="dynamic_mix", component_name="odm", **ours),
        {"dataset": dataset, **theirs},
        Path("run.yaml"),
    )


# -- counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proportions", "total", "counts"),
    [
        ([0.5, 0.3, 0.2], 7, [4, 2, 1]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [4, 3, 3]),
        ([0.15, 0.35, 0.5], 10, [2, 3, 5]),  # a tie, though 0.35 lies further below its decimal
        ([0.5, 0.0, 0.5], 3, [2, 0, 1]),
        ([3, 1], 8, [6, 2]),
        ([0.5, 0.2, 0.3], 333, [166, 67, 100]),
    ],
)
def test_e3_counts_are_the_largest_remainders_ties_to_the_lower_index(
    proportions: list[float], total: int, counts: list[int]
) -> None:
    assert largest_remainder(np.array(proportions), total).tolist() == counts


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda p: sum(p) > 1e-3),
    st.integers(0, 100_000),
)
def test_counts_add_up_and_each_is_its_quota_rounded_down_or_up(
    proportions: list[float], total: int
) -> None:
    counts = largest_remainder(np.array(proportions), total)
    assert counts.sum() == total
    exact = [Fraction(repr(p)) for p in proportions]
    for count, p in zip(counts.tolist(), exact, strict=True):
        quota = p * total / sum(exact)
        assert int(quota) <= count <= int(quota) + (quota != int(quota))


# -- rows -----------------------------------------------------------------------------------------


def test_e19_two_snapshots_of_40_from_100_rows_are_80_rows(domain_data: MakeData) -> None:
    cursors = Cursors(domain_data([100, 5]), seed=7)
    first, second = (cursors.take(np.array([40, 0])) for _ in range(2))
    assert len({*first.tolist(), *second.tolist()}) == 80
    assert cursors.epochs.tolist() == [0.8, 0.0]


@given(st.lists(st.integers(0, 17), min_size=1, max_size=12), st.integers(0, 3))
def test_a_row_comes_again_only_when_its_domain_is_exhausted(takes: list[int], seed: int) -> None:
    cursors = Cursors(_DATA, seed)
    rows = np.concatenate([cursors.take(np.array([n, 1])) for n in takes])
    of_a = rows[rows < 7]
    for lap in range(0, len(of_a), 7):
        assert len(set(of_a[lap : lap + 7].tolist())) == len(of_a[lap : lap + 7])
    assert cursors.read.tolist() == [sum(takes), len(takes)]
    assert cursors.epochs[0] == sum(takes) / 7


def test_each_lap_has_an_order_of_its_own_and_so_has_each_domain_and_seed(
    domain_data: MakeData,
) -> None:
    data = domain_data([30, 30])
    cursors = Cursors(data, seed=1)
    laps = [cursors.take(np.array([30, 30])).reshape(2, 30) for _ in range(2)]
    other = Cursors(data, seed=2).take(np.array([30, 30])).reshape(2, 30)
    orders = [*laps[0] % 30, *laps[1] % 30, *other % 30]
    assert len({tuple(order.tolist()) for order in orders}) == 6


def test_what_was_read_is_the_whole_state(domain_data: MakeData) -> None:
    data = domain_data([10, 20])
    whole, resumed = Cursors(data, 3), Cursors(data, 3)
    whole.take(np.array([13, 4]))
    resumed.read = whole.read.copy()
    counts = np.array([9, 9])
    np.testing.assert_array_equal(whole.take(counts), resumed.take(counts))


def test_rows_without_a_target_are_never_read_and_a_domain_of_them_is_named(
    domain_data: MakeData,
) -> None:
    rows = Cursors(domain_data([3, 2], masked=[1]), 0).take(np.array([6, 0]))
    assert sorted(rows.tolist()) == [0, 0, 0, 2, 2, 2]
    with pytest.raises(BadInput, match="no row with a target token in 'b'"):
        check_domains(domain_data([3, 2], masked=[3, 4]))


# -- proportions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([0.5], "expected 2 numbers, one for each data set in the order of `dataset` .a, b."),
        ([[0.5, 0.5]], "shape .1, 2."),
        ([1.5, -0.5], "finite numbers >= 0"),
        ([0.5, float("nan")], "finite numbers >= 0"),
        ([0.0, 0.0], "positive sum"),
        (["half", "half"], "expected a list of numbers"),
        (None, "expected 2 numbers"),
    ],
)
def test_no_proportions_are_refused(given: object, says: str) -> None:
    for check in (as_proportions, mixers_answer):
        with pytest.raises(BadInput, match=says):
            check(given, ("a", "b"), "mine")


def test_huge_numbers_are_proportions_too() -> None:
    assert as_proportions([1e308, 1e308, 0], ("a", "b", "c"), "mine").tolist() == [0.5, 0.5, 0.0]


def test_a_mixers_answer_must_sum_to_1_and_a_users_numbers_need_not() -> None:
    assert as_proportions([3, 1], ("a", "b"), "mine").tolist() == [0.75, 0.25]
    with pytest.raises(BadInput, match=r"component 'mine' answered proportions that sum to 1\.3"):
        mixers_answer([0.9, 0.4], ("a", "b"), "mine")
    almost = np.array([0.3, 0.7], dtype=np.float32)
    assert mixers_answer(almost, ("a", "b"), "mine").sum() == pytest.approx(1.0, abs=1e-12)


def test_the_opening_follows_the_rule(domain_data: MakeData) -> None:
    data = domain_data([30, 10])

    def opening(**ours: Any) -> list[float]:
        return opening_proportions(config(**ours), data).tolist()

    assert opening() == [0.5, 0.5]
    assert opening(init_mixture_proportions=(1.0, 3.0)) == [0.25, 0.75]
    assert opening(mixture_sample_rule="mixture", init_mixture_proportions=(1, 3)) == [0.25, 0.75]
    assert opening(mixture_sample_rule="stratified") == [0.75, 0.25]
    assert opening(mixture_sample_rule="uniform", init_mixture_proportions=(1, 3)) == [0.5, 0.5]


# -- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": ""}, "dataset is missing"),
        ({"dataset": "a,b,a"}, "names a data set twice"),
        ({"mix_strategy": "interleave_over"}, "mix_strategy is 'interleave_over'"),
        ({"mixture_sample_rule": "mixed"}, "'mixed'; use one of mixture, stratified, uniform"),
        ({"init_mixture_proportions": (1.0,)}, "init_mixture_proportions: .* expected 2 numbers"),
        ({"init_mixture_proportions": (1.0, -1.0)}, "init_mixture_proportions: .*numbers >= 0"),
        ({"mixer_eval_dataset": ("c_eval",)}, "'c_eval' belongs to no data set"),
        ({"mixer_eval_dataset": ("a", "a_eval")}, "two sets for one domain"),
        ({"mixer_eval_dataset": ("a_eval",), "val_size": 0.1}, "remove one"),
    ],
)
def test_what_the_configuration_alone_tells(changes: dict[str, Any], says: str) -> None:
    import re

    (fault,) = domain_faults(config(**changes))
    assert re.search(says, fault)


def test_a_fixed_rule_and_a_mixer_that_changes_its_answer_do_not_go_together() -> None:
    class Changing(Mixer):
        dynamic = True

    class Fixed(Mixer):
        dynamic = False

    for rule in ("stratified", "uniform"):
        (fault,) = rule_faults(config(mixture_sample_rule=rule), Changing())
        assert f"mixture_sample_rule is '{rule}'" in fault
        assert rule_faults(config(mixture_sample_rule=rule), Fixed()) == []
    assert rule_faults(config(mixture_sample_rule="mixture"), Changing()) == []
    assert domain_faults(config(init_mixture_proportions=(1.0, 2.0))) == []


def test_a_held_out_set_finds_its_domain_by_name() -> None:
    domains = ("a", "b_eval")
    assert domain_of("a_eval", domains) == "a"
    assert domain_of("a", domains) == "a"
    assert domain_of("b_eval", domains) == "b_eval"
    assert domain_of("c_eval", domains) is None


def _two_domains() -> RunData:
    from datasets import Dataset

    from dataflex.data.rows import Domains, Rows

    dataset = Dataset.from_dict({"input_ids": [[1, i] for i in range(16)]})
    nothing: Any = None
    of_row = np.repeat(np.arange(2, dtype=np.int64), [7, 9])
    return RunData(Rows("train", dataset), (), nothing, "default", nothing, "sft",
                   Domains(("a", "b"), of_row))  # fmt: skip


_DATA = _two_domains()


# -- schedule -------------------------------------------------------------------------------------


def plan(data: RunData, *, max_steps: int = -1, epochs: float = 2.0, **ours: Any) -> Any:
    from types import SimpleNamespace

    from dataflex.trainers.job import Job
    from dataflex.trainers.mix import MixSeam

    arguments = SimpleNamespace(max_steps=max_steps, num_train_epochs=epochs)
    component = Component("mixer", "mixer", Mixer, {})
    return MixSeam.plan(
        Job(config(**ours), component, Mixer(), data, arguments, BatchShape(4, 1, 1), Ranks())
    )


def test_updates_go_on_every_u_steps_and_no_stage_starts_again(domain_data: MakeData) -> None:
    steps = {"warmup_step": 2, "update_step": 3, "update_times": 1}
    schedule = plan(domain_data([30, 10]), train_step=12, **steps)
    assert [(i.kind.value, i.start) for i in schedule.intervals()] == [
        ("warmup", 0), ("update", 2), ("update", 5), ("update", 8), ("update", 11)
    ]  # fmt: skip
    assert plan(domain_data([30, 10]), **steps).budget == 5
    assert plan(domain_data([30, 10]), max_steps=7, **steps).budget == 7
    assert plan(domain_data([30, 10]), max_steps=7, train_step=9, **steps).budget == 9


def test_without_a_warmup_the_mixer_is_asked_at_the_first_step(domain_data: MakeData) -> None:
    schedule = plan(domain_data([30, 10]), update_step=3, update_times=2)
    assert [(i.kind.value, i.start) for i in schedule.intervals()] == [("update", 0), ("update", 3)]


def test_static_mix_is_one_opening_over_the_whole_budget(domain_data: MakeData) -> None:
    schedule = plan(domain_data([30, 10]), static_mix=True, warmup_step=3)
    assert [(i.kind.value, i.start, i.stop) for i in schedule.intervals()] == [("warmup", 0, 20)]


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        ({"num_train_epochs": 3}, {}, "num_train_epochs is ignored: .* 14 steps"),
        ({"num_train_epochs": 3}, {"update_times": -1}, None),
        ({"num_train_epochs": 3}, {"static_mix": True}, None),
        ({"num_train_epochs": 3}, {"train_step": 5}, None),
        ({}, {}, None),
        ({}, {"mixture_sample_rule": "uniform", "init_mixture_proportions": (1.0, 2.0)},
         "init_mixture_proportions is ignored"),
    ],
)  # fmt: skip
def test_keys_without_a_say_are_named(
    theirs: dict[str, Any], ours: dict[str, Any], says: str | None
) -> None:
    import re

    from dataflex.trainers.mix import _ignored

    usual = {"warmup_step": 2, "update_step": 4, "update_times": 3}
    flex = DataFlexConfig(train_type="dynamic_mix", **{**usual, **ours})
    warnings = _ignored(RunConfig(flex, theirs, Path("run.yaml")))
    if says is None:
        assert warnings == []
    else:
        assert len(warnings) == 1
        assert re.search(says, warnings[0])
