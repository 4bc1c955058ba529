"""Pipelines: which stages fire, what they hand on, which rows an interval gets (ALGORITHMS 5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import Component, presets_of, resolve
from dataflex.config.registry import _classes
from dataflex.data.order import BatchShape
from dataflex.data.rows import RunData
from dataflex.mixers.base import Mixer
from dataflex.pipelines.pipeline import Pipeline, Plan, build_strategy
from dataflex.pipelines.planning import (
    Pace,
    Timetable,
    draw_mixture,
    fit,
    kept_by_filter,
    target_of_mixture,
)
from dataflex.pipelines.stages import UNIFORM, parse_stage
from dataflex.reorders.base import Ordering, Reorder
from dataflex.run.board import Scoreboard
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.forecast import Forecast
from dataflex.run.ranks import Ranks
from dataflex.run.schedule import Schedule
from dataflex.selectors.base import Selection, Selector
from dataflex.trainers.job import Job
from dataflex.trainers.lego import LegoSeam, describe, warnings_of
from dataflex.weighters.base import LossContributor
from gradstore.errors import BadInput

# -- stand-ins: strategies whose answers one can foretell -----------------------------------------


class Head(Selector):
    """The first rows of the pool, or rows that the test dictates; remembers what it was told."""

    distinct = True

    def __init__(self, rows: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.seen: list[UpdateContext] = []

    def select(self, count: int, context: UpdateContext) -> Selection:
        self.seen.append(context)
        rows = context.candidates[:count] if self.rows is None else self.rows
        return Selection(np.asarray(rows, dtype=np.int64))

    def state(self) -> dict[str, Any]:
        return {"asked": len(self.seen)}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.restored = state["asked"]


class Shares(Mixer):
    """Proportions that the test dictates."""

    def __init__(self, proportions: Sequence[float] = (0.5, 0.5)) -> None:
        self.proportions = proportions

    def mix(self, context: UpdateContext) -> Any:
        return np.asarray(self.proportions)


class Alpha(Mixer, LossContributor):
    """A mixer that weights the loss, as DoReMi does."""

    def mix(self, context: UpdateContext) -> Any:
        raise AssertionError("a mixer that weights the loss is not asked for proportions")


class Onward(Reorder):
    """Rising rows, read on from where it stopped; another pool begins anew."""

    def __init__(self, stray: int | None = None) -> None:
        self.stray = stray
        self.at, self.pool = 0, np.empty(0)

    def order(self, count: int, context: UpdateContext) -> Ordering:
        if not np.array_equal(self.pool, context.candidates):
            self.at, self.pool = 0, context.candidates
        rows = np.take(self.pool, np.arange(self.at, self.at + count), mode="wrap")
        self.at += count
        return Ordering(rows if self.stray is None else np.array([self.stray]))


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, name, cls in (
        ("selector", "head", Head),
        ("mixer", "shares", Shares),
        ("mixer", "alpha", Alpha),
        ("reorder", "onward", Onward),
    ):
        monkeypatch.setitem(_classes, (kind, name), cls)


FILTER = {"family": "selector", "component": "head"}
DRAW = {**FILTER, "mode": "draw"}
MIX = {"family": "mixer", "component": "shares"}
ORDER = {"family": "reorder", "component": "onward"}
WEIGHT = {"family": "weighter", "component": "loss"}

Plans = Callable[..., list[Plan]]


@pytest.fixture
def run_of(domain_data: Callable[..., RunData]) -> Callable[..., RunContext]:
    def make(sizes: Sequence[int], masked: Sequence[int] = (), **ours: Any) -> RunContext:
        data = domain_data(sizes, masked)
        config = RunConfig(DataFlexConfig(train_type="dynamic_lego", **ours), {}, Path("x.yaml"))
        nothing: Any = None
        return RunContext(config, data, nothing, nothing, Path(), "run", 7,
                          board=Scoreboard(data.train, nothing))  # fmt: skip

    return make


def context_at(step: int, run: RunContext, rate: float = 1.0) -> UpdateContext:
    return UpdateContext(run, step, 1, 1, rate, None)


def plans(
    pipeline: Pipeline, run: RunContext, steps: Sequence[int], count: int, schedule: Schedule
) -> list[Plan]:
    table = pipeline.timetable(schedule)
    return [pipeline.plan(count, context_at(step, run, rate=step), table) for step in steps]


def fired(plan: Plan) -> list[str]:
    return [part.stage.spec.family for part in plan.parts if part.fired]


# -- E32, E33 -------------------------------------------------------------------------------------


def test_e32_a_mixer_before_a_reorder_keeps_the_largest_mixture(
    run_of: Callable[..., RunContext],
) -> None:
    sizes, proportions = np.array([600, 300, 100]), np.array([0.5, 0.2, 0.3])
    assert target_of_mixture(sizes, proportions, 80) == 333
    pipeline = Pipeline([{**MIX, "params": {"proportions": [0.5, 0.2, 0.3]}}, ORDER])
    run = run_of([600, 300, 100])
    (plan,) = plans(pipeline, run, [10], 80, Schedule(10, 10, 1, 20))
    mixed = plan.parts[0].rows
    assert np.bincount(run.data.domains.of_row[mixed]).tolist() == [166, 67, 100]  # type: ignore[union-attr]
    assert len(np.unique(mixed)) == 333
    assert plan.rows.tolist() == mixed[:80].tolist()


def test_e33_who_fires_when(run_of: Callable[..., RunContext]) -> None:
    pipeline = Pipeline([{**FILTER, "warmup_step": 10, "every": 20}, {**ORDER, "every": 10}])
    found = plans(pipeline, run_of([40]), [10, 20, 30, 40], 8, Schedule(10, 10, 0, 50))
    both, one = ["selector", "reorder"], ["reorder"]
    assert [fired(plan) for plan in found] == [both, one, both, one]
    # A boundary of the reorder alone goes on in the pool that the selector left.
    assert found[0].rows.tolist() == list(range(8))
    assert found[1].rows.tolist() == list(range(8, 16))


# -- firing ---------------------------------------------------------------------------------------


def table(paces: Sequence[Pace], schedule: Schedule) -> dict[int, list[int]]:
    found = Timetable.of(schedule, paces)
    return dict(zip(found.steps.tolist(), found.turns.tolist(), strict=True))


def test_a_firing_stage_makes_later_ones_fire_but_not_those_in_warm_up() -> None:
    paces = [Pace(every=20), Pace(every=1000), Pace(warmup_step=30)]
    found = table(paces, Schedule(10, 10, 0, 50))
    assert found == {10: [1, 1, 0], 20: [0, 0, 0], 30: [2, 2, 1], 40: [0, 0, 2]}


def test_turns_begin_again_with_each_stage_of_the_schedule_and_say_how_many_there_are() -> None:
    found = Timetable.of(Schedule(10, 10, 3, 75), [Pace(every=20), Pace()])
    assert found.steps.tolist() == [10, 20, 30, 50, 60, 70]  # the second stage counts as a whole
    assert found.turns.tolist() == [[1, 1], [0, 2], [2, 3], [1, 1], [0, 2], [2, 3]]
    assert found.totals[:, 0].tolist() == [2] * 6
    assert found.at(70) == [(2, 2), (3, 3)]


def test_a_resume_with_a_longer_budget_finds_the_same_firings() -> None:
    paces = [Pace(5, 30), Pace(0, 10)]
    short, long = (table(paces, Schedule(5, 10, 0, budget)) for budget in (60, 600))
    assert {step: long[step] for step in short} == short


@given(
    st.lists(st.builds(Pace, st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=4),
    st.integers(0, 9), st.integers(1, 9), st.integers(0, 3),
)  # fmt: skip
def test_firing_keeps_its_rules(paces: list[Pace], w: int, u: int, t: int) -> None:
    last = [-1] * len(paces)
    for step, turns in table(paces, Schedule(w, u, t, 60)).items():
        forced = False
        for i, (pace, turn) in enumerate(zip(paces, turns, strict=True)):
            due = last[i] < 0 or step - last[i] >= pace.every
            assert bool(turn) == (step >= pace.warmup_step and (due or forced))
            forced |= bool(turn)
            last[i] = step if turn else last[i]


def test_a_stage_in_warm_up_passes_its_pool_through(run_of: Callable[..., RunContext]) -> None:
    pipeline = Pipeline([{**FILTER, "warmup_step": 20}, {**ORDER, "warmup_step": 20}])
    before, after = plans(pipeline, run_of([40]), [10, 20], 8, Schedule(10, 10, 0, 30))
    assert fired(before) == []
    assert len(before.parts[0].rows) == 40
    assert len(np.unique(before.rows)) == 8
    assert before.rows.tolist() != sorted(before.rows.tolist()), "no head of the rows as they lie"
    assert fired(after) == ["selector", "reorder"]
    assert len(after.parts[0].rows) == 20


def test_a_boundary_without_a_firing_stage_serves_the_same_rows(
    run_of: Callable[..., RunContext],
) -> None:
    pipeline = Pipeline([{**MIX, "every": 20}])
    first, again, other = plans(
        pipeline, run_of([40, 40]), [10, 20, 30], 8, Schedule(10, 10, 0, 40)
    )
    assert first.rows.tolist() == again.rows.tolist() != other.rows.tolist()


def test_a_stage_gets_its_own_count_of_updates_and_its_own_mean_learning_rate(
    run_of: Callable[..., RunContext],
) -> None:
    pipeline = Pipeline([{**FILTER, "every": 20, "score_max_age": 5}, ORDER])
    run, clock = run_of([40]), pipeline.timetable(Schedule(10, 10, 4, 50))
    for step, rate in ((10, 4.0), (20, 1.0), (30, 3.0), (40, 8.0)):
        pipeline.plan(8, context_at(step, run, rate), clock)
    seen = pipeline.rows[0].strategy.seen
    assert [(c.step, c.update, c.updates, c.learning_rate) for c in seen] == [
        (10, 1, 2, 4.0), (30, 2, 2, 2.0)]  # fmt: skip


# -- pools ----------------------------------------------------------------------------------------


def test_a_filter_keeps_its_share_of_the_usable_rows_without_repeats(
    run_of: Callable[..., RunContext],
) -> None:
    assert [kept_by_filter(10, r) for r in (0.3, 0.25, 0.01, 1.0)] == [3, 2, 1, 10]
    assert kept_by_filter(100, 0.29) == 29  # 0.29 * 100 is 28.999999999999996
    (plan,) = plans(Pipeline([FILTER]), run_of([10], [0, 1]), [10], 3, Schedule(10, 10, 1, 20))
    assert plan.parts[0].rows.tolist() == [2, 3, 4, 5]
    twice = Pipeline([{**FILTER, "params": {"rows": [5, 5, 3]}}, ORDER])
    (plan,) = plans(twice, run_of([10]), [10], 2, Schedule(10, 10, 1, 20))
    assert plan.rows.tolist() == [3, 5]


def test_the_largest_mixture_lies_between_an_interval_and_the_pool() -> None:
    sizes = np.array([60, 30, 10])
    assert target_of_mixture(sizes, np.array([0.0, 0.1, 0.9]), 40) == 40  # 11 would be too few
    assert target_of_mixture(sizes, np.array([0.6, 0.3, 0.1]), 40) == 100
    assert target_of_mixture(sizes, np.array([0.1, 0.1, 0.8]), 400) == 100
    assert target_of_mixture(np.array([30, 1000]), np.array([0.3, 0.7]), 8) == 100


DOMAINS = np.repeat([0, 1, 2], [60, 30, 10])


def drawn(proportions: Sequence[float], target: int, seed: int = 0, **more: Any) -> Any:
    pool = np.arange(100)
    generator = np.random.default_rng(seed)
    return draw_mixture(pool, DOMAINS, np.array(proportions), target, generator, **more)


def test_a_mixture_is_drawn_by_largest_remainder_without_repeats() -> None:
    rows = drawn([0.5, 0.3, 0.2], 7)
    assert np.bincount(DOMAINS[rows]).tolist() == [4, 2, 1]  # E3
    assert len(set(rows.tolist())) == 7
    assert drawn([0.5, 0.3, 0.2], 7, seed=1).tolist() != rows.tolist()


def test_what_a_domain_lacks_comes_from_the_rest_of_the_pool() -> None:
    rows = drawn([0.0, 0.0, 1.0], 40)
    assert len(set(rows.tolist())) == 40
    assert np.bincount(DOMAINS[rows])[2] == 10


def test_with_replacement_a_small_domain_repeats_its_rows_equally_often() -> None:
    rows = drawn([0.0, 0.0, 1.0], 40, replacement=True)
    assert sorted(rows.tolist()) == sorted(list(range(90, 100)) * 4)
    empty = draw_mixture(np.arange(60), DOMAINS, np.array([0.5, 0.5, 0.0]), 20,
                         np.random.default_rng(0), replacement=True)  # fmt: skip
    assert len(set(empty.tolist())) == 20, "a domain that a filter emptied cannot repeat anything"


@given(st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_plan_is_as_long_as_the_interval(m: int, count: int, arranged: bool) -> None:
    rows = np.arange(m) * 3
    found = fit(rows, count, arranged=arranged, generator=np.random.default_rng(m))
    assert len(found) == count
    times = np.unique(found, return_counts=True)[1]
    assert times.max() - (times.min() if len(times) == m else 0) <= 1, "none again before all"
    if arranged:
        assert found[: min(m, count)].tolist() == rows[:count].tolist()


# -- who takes the budget -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "filled_by"),
    [
        ([FILTER], UNIFORM),
        ([WEIGHT], UNIFORM),
        ([{"family": "mixer", "component": "alpha"}], UNIFORM),
        ([DRAW], "selector head"),
        ([FILTER, MIX], "mixer shares"),
        ([FILTER, MIX, ORDER], "reorder onward"),
        ([{"family": "mixer", "component": "alpha"}, DRAW], "selector head"),
    ],
)
def test_one_stage_takes_the_budget(
    stages: list[dict[str, Any]], filled_by: str, run_of: Callable[..., RunContext]
) -> None:
    pipeline = Pipeline(stages)
    assert pipeline.filled_by == filled_by
    (plan,) = plans(pipeline, run_of([30, 30]), [10], 12, Schedule(10, 10, 1, 20))
    assert len(plan.rows) == len(set(plan.rows.tolist())) == 12


def test_a_uniform_draw_is_made_anew_at_every_boundary(run_of: Callable[..., RunContext]) -> None:
    found = plans(Pipeline([{**FILTER, "every": 100}]), run_of([60]), [10, 20], 8,
                  Schedule(10, 10, 0, 30))  # fmt: skip
    assert all(row < 30 for plan in found for row in plan.rows)
    assert found[0].rows.tolist() != found[1].rows.tolist()


def test_a_pool_smaller_than_the_interval_is_served_again_and_again(
    run_of: Callable[..., RunContext],
) -> None:
    (plan,) = plans(Pipeline([{**FILTER, "keep_ratio": 0.1}]), run_of([50]), [10], 12,
                    Schedule(10, 10, 1, 20))  # fmt: skip
    assert sorted(np.bincount(plan.rows).tolist()) == [2, 2, 2, 3, 3]


# -- arranging stages -----------------------------------------------------------------------------


def test_rows_are_selected_then_mixed_then_ordered_whatever_the_yaml_says() -> None:
    pipeline = Pipeline([ORDER, WEIGHT, MIX, FILTER])
    assert [s.spec.family for s in pipeline.rows] == ["selector", "mixer", "reorder"]
    (warning,) = pipeline.warnings
    assert "reorder -> mixer -> selector" in warning
    assert "selector -> mixer -> reorder" in warning
    assert Pipeline([FILTER, WEIGHT, MIX, ORDER]).warnings == ()


def test_a_mixer_that_weights_the_loss_leaves_the_rows_alone() -> None:
    pipeline = Pipeline([{"family": "mixer", "component": "alpha", "warmup_step": 4}, MIX, WEIGHT])
    assert [s.spec.component for s in pipeline.rows] == ["shares"]
    assert len(pipeline.contributors(3)) == 1
    assert [type(s).__name__ for s in pipeline.contributors(4)] == ["Alpha", "LossWeighter"]


REFUSED: dict[str, tuple[list[Any], list[str]]] = {
    "two selectors": ([FILTER, DRAW], ["two stages are of family selector", "at most one"]),
    "two mixers": ([MIX, MIX], ["two stages are of family mixer"]),
    "two reorders": ([ORDER, ORDER], ["two stages are of family reorder"]),
    "draw then mix": ([DRAW, MIX], ["selector head has mode: draw", "mixer shares", "filter"]),
    "draw then order": ([ORDER, DRAW], ["mode: draw", "reorder onward"]),
    "misspelt key": ([{**FILTER, "keep_ration": 0.9}],
                     ["stage 1", "'keep_ration' (did you mean 'keep_ratio'?)", "score_max_age"]),
    "another family's key": ([{**MIX, "keep_ratio": 0.9}],
                             ["unknown key of a mixer stage: 'keep_ratio'", "allow_replacement"]),
    "misspelt family": ([{**MIX, "family": "mixr"}], ["did you mean 'mixer'"]),
    "misspelt component": ([FILTER, {**MIX, "component": "statik"}],
                           ["stage 2 (mixer statik)", "did you mean 'static'"]),
    "misspelt parameter": ([{**FILTER, "params": {"rwos": [1]}}],
                           ["stage 1 (selector head)", "'rwos' (did you mean 'rows'?)"]),
    "parameter out of range": (
        [{**WEIGHT, "params": {"delta": -1}}], ["stage 1 (weighter loss)", "delta is -1"]),
    "no component": ([{"family": "mixer"}], ["component missing"]),
    "no family": ([{"component": "loss"}], ["family missing"]),
    "keep_ratio 0": ([{**FILTER, "keep_ratio": 0}], ["keep_ratio is 0", "above 0 and at most 1"]),
    "keep_ratio above 1": ([{**FILTER, "keep_ratio": 1.5}], ["keep_ratio is 1.5"]),
    "keep_ratio NaN": ([{**FILTER, "keep_ratio": float("nan")}], ["keep_ratio is nan"]),
    "mode": ([{**FILTER, "mode": "drop"}], ["mode is 'drop'", "filter or draw"]),
    "every 0": ([{**MIX, "every": 0}], ["every is 0", "at least 1"]),
    "warm-up negative": ([{**MIX, "warmup_step": -1}], ["warmup_step is -1", "0 or more"]),
    "enabled a word": ([{**MIX, "enabled": "yes"}], ["enabled is 'yes'", "true or false"]),
    "params twice": ([{**MIX, "params": {}, "component_params": {}}], ["set only one of them"]),
    "params no mapping": ([{**MIX, "params": [1]}], ["params is [1]", "a mapping"]),
    "no mapping": (["loss"], ["'loss' is no mapping"]),
    "no stage": ([], ["stages is []"]),
    "all off": ([{**MIX, "enabled": False}], ["every stage has enabled: false"]),
    "two faults": ([{**FILTER, "mod": 1}, {**MIX, "evry": 1}], ["'mod'", "stage 2", "'evry'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_faulty_stage_is_refused(name: str) -> None:
    stages, fragments = REFUSED[name]
    with pytest.raises(BadInput) as caught:
        Pipeline(stages)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_stages_mean_what_they_meant_in_1_1_0() -> None:
    spec = parse_stage({"family": "selectors", "component": "loss", "warmup_step": None})
    assert (spec.family, spec.mode, spec.keep_ratio) == ("selector", "filter", 0.5)
    assert (spec.warmup_step, spec.every, spec.score_max_age, spec.enabled) == (0, 1, 0, True)
    off = Pipeline([{**FILTER, "enabled": False}, {**MIX, "component_params": {}}])
    assert [stage.spec.name for stage in off.everyone] == ["mixer shares"]


def test_keys_of_a_stage_that_have_no_effect_are_told() -> None:
    weight = {**WEIGHT, "every": 5, "score_max_age": 3}
    told = "; ".join(Pipeline([{**MIX, "allow_replacement": True}, ORDER, weight]).warnings)
    assert "score_max_age is ignored" in told
    assert "weighter loss weights every step: every: 5 is ignored" in told
    assert "mixer shares: allow_replacement is ignored" in told


# -- presets --------------------------------------------------------------------------------------


def presets(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "components.yaml"
    path.write_text(text)
    return path


OWN = """
selectors:
  mild: {name: head, params: {rows: [4, 5]}}
pipelines:
  by_name: {name: pipeline, params: {stages: [{family: selector, component: mild}], seed: 3}}
  its_own: {name: its_own, params: {cache_dir: x, stages: [{family: selector, component: mild}]}}
  direct: {save_plans: true, stages: [{family: selector, component: mild}]}
"""


@pytest.mark.parametrize("name", ["by_name", "its_own", "direct"])
def test_presets_of_every_form_find_their_stages_in_the_same_file(
    name: str, tmp_path: Path
) -> None:
    built = resolve("dynamic_lego", name, {}, presets(tmp_path, OWN)).build()
    assert built.rows[0].strategy.rows == [4, 5]
    assert (built.seed, built.save_plans) == (3 if name == "by_name" else 42, name == "direct")


def test_a_misspelt_pipeline_and_parameter_name_the_nearest(tmp_path: Path) -> None:
    path = presets(tmp_path, OWN)
    with pytest.raises(BadInput, match="did you mean 'by_name'"):
        resolve("dynamic_lego", "by_nam", {}, path)
    with pytest.raises(BadInput, match="did you mean 'save_plans'"):
        resolve("dynamic_lego", "by_name", {"save_plan": True}, path)
    with pytest.raises(BadInput, match="needs component_params: stages"):
        resolve("dynamic_lego", "pipeline", {}, path)


def test_a_resume_agrees_on_the_stages_and_not_on_what_changes_no_answer(tmp_path: Path) -> None:
    stage = {"family": "selector", "component": "loss"}
    one = Pipeline([{**stage, "params": {"focus": "high", "score_batch_size": 4}}]).resolved()
    same = Pipeline([{**stage, "params": {"focus": "high", "score_batch_size": 9}}]).resolved()
    other = Pipeline([{**stage, "params": {"focus": "low", "score_batch_size": 4}}]).resolved()
    assert one == same != other


@pytest.mark.parametrize("name", sorted(presets_of("reorders").keys() - {"custom"}))
def test_every_preset_of_a_reorder_is_a_stage_that_orders_training_rows(name: str) -> None:
    params = {"score_params": {"cache_path": "x.json"}} if name == "reuse_selector_scores" else {}
    pipeline = Pipeline([FILTER, {"family": "reorder", "component": name, "params": params}])
    assert pipeline.filled_by == f"reorder {name}"
    assert not pipeline.rows[1].strategy.orders_raw_rows


@pytest.mark.parametrize("name", sorted(presets_of("pipelines")))
def test_every_preset_of_a_pipeline_can_be_built(name: str) -> None:
    built = resolve("dynamic_lego", name, {}).build()
    assert built.warnings == ()
    assert built.describe()


def test_a_class_of_ones_own_is_a_stage_too() -> None:
    target = "examples.train_lora.selectors.longest_answer:LongestAnswer"
    own = {"family": "selector", "component": "custom", "params": {"target": target, "share": 0.25}}
    assert Pipeline([own]).rows[0].strategy.share == 0.25
    with pytest.raises(BadInput, match="did you mean 'share'"):
        Pipeline([{**own, "params": {"target": target, "shar": 0.25}}])


@pytest.mark.parametrize(
    ("rows", "said"), [([1, 2], "are repeated"), ([1] * 9, "not used for training")]
)
def test_an_answer_of_another_length_is_told(
    rows: list[int], said: str, run_of: Callable[..., RunContext], caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline([{**DRAW, "params": {"rows": rows}}])
    (plan,) = plans(pipeline, run_of([6]), [10], 4, Schedule(10, 10, 1, 20))
    assert len(plan.rows) == 4
    assert f"returned {len(rows)} rows, 4 were requested" in caplog.text
    assert said in caplog.text


def test_a_run_of_a_pipeline_asks_whether_its_selector_can_answer(
    run_of: Callable[..., RunContext],
) -> None:
    run = run_of([6, 4], [9], warmup_step=1, update_step=10)
    args = SimpleNamespace(num_train_epochs=1.0, max_steps=20)

    def job(stage: dict[str, Any]) -> Job:
        component = Component("pipeline", "pipeline", Pipeline, {"stages": [stage]})
        return Job(run.config, component, build_strategy(component), run.data, args,
                   BatchShape(1, 1, 1), Ranks())  # fmt: skip

    LegoSeam.plan(job(FILTER))
    with pytest.raises(BadInput, match="asked 10, 9 usable, 1 skipped"):
        LegoSeam.plan(job(DRAW))


def test_more_rows_than_a_stage_can_answer_are_refused_before_training(
    run_of: Callable[..., RunContext], tmp_path: Path
) -> None:
    data = run_of([6, 4], [9]).data
    Pipeline([DRAW]).check_count(9, data)
    Pipeline([FILTER]).check_count(100, data)
    with pytest.raises(BadInput, match="asked 10, 9 usable, 1 skipped"):
        Pipeline([DRAW]).check_count(10, data)
    np.save(tmp_path / "few.npy", np.array([[0, 1, 2]]))
    near = {"family": "selector", "component": "near", "keep_ratio": 0.5,
            "params": {"indices_path": str(tmp_path / "few.npy")}}  # fmt: skip
    with pytest.raises(BadInput, match="names 3 of the 10 training rows, an update takes 4"):
        Pipeline([near]).check_count(6, data)


# -- the union of what stages need ----------------------------------------------------------------


def test_a_pipeline_needs_what_its_stages_need() -> None:
    plain = Pipeline([MIX, {"family": "selector", "component": "random"}, WEIGHT])
    flags = ("needs_lora", "needs_targets", "needs_moments", "needs_single_rows", "observes")
    assert [flag for flag in flags if getattr(plain, flag)] == []
    assert not plain.keeps_scores
    less = Pipeline([{"family": "selector", "component": "less"}])
    assert less.needs_lora
    assert less.needs_targets
    assert less.needs_moments
    assert less.needs_single_rows
    assert less.gradient_features.proj_dim == 4096
    assert Pipeline([{"family": "mixer", "component": "odm"}]).observes
    assert Pipeline([{**FILTER, "score_max_age": 5}]).keeps_scores


def config(llamafactory: Mapping[str, Any], **ours: Any) -> RunConfig:
    return RunConfig(DataFlexConfig(**ours), {"dataset": "a,b", **llamafactory}, Path("x.yaml"))


def test_keys_that_a_pipeline_has_no_use_for_are_refused() -> None:
    static = {"family": "mixer", "component": "static", "params": {"proportions": [1, 2, 3]}}
    (fault,) = Pipeline([static]).check(config({}))
    assert fault.startswith("mixer static: proportions")
    (fault,) = Pipeline([MIX]).check(config({"val_size": 0.1}))
    assert "val_size is 0.1" in fault
    (fault,) = Pipeline([MIX]).check(config({}, mixture_sample_rule="uniform"))
    assert "mixture_sample_rule is 'uniform'" in fault
    (fault,) = Pipeline([FILTER]).check(config({}, init_mixture_proportions=[1, 2]))
    assert "init_mixture_proportions is set, but the pipeline has no mixer" in fault
    (fault,) = Pipeline([FILTER]).check(config({}, mixer_eval_dataset=["a_eval"]))
    assert "mixer_eval_dataset is set" in fault
    assert Pipeline([MIX]).check(config({}, init_mixture_proportions=[1, 2])) == []


def test_a_mixer_needs_a_usable_row_in_every_domain(run_of: Callable[..., RunContext]) -> None:
    run = run_of([3, 2], [3, 4])
    with pytest.raises(BadInput, match="no row with a target token in 'b'"):
        Pipeline([MIX]).check_data(run.data, run.config)
    Pipeline([FILTER]).check_data(run.data, run.config)


def test_all_stages_are_let_go_even_if_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []

    def failing(self: object) -> None:
        gone.append(type(self).__name__)
        raise OSError("disk")

    for cls in (Head, Shares, Onward):
        monkeypatch.setattr(cls, "finish", failing, raising=False)
    with pytest.raises(OSError, match="disk"):
        Pipeline([FILTER, MIX, ORDER]).finish()
    assert sorted(gone) == ["Head", "Onward", "Shares"]


# -- answers that are none ------------------------------------------------------------------------


def test_an_answer_outside_of_the_pool_is_refused(run_of: Callable[..., RunContext]) -> None:
    for stages, what in (
        ([{**FILTER, "params": {"rows": [99]}}], "selector head.*99.*10 rows"),
        ([{**FILTER, "params": {"rows": []}}], "selector head"),
        ([FILTER, {**ORDER, "params": {"stray": 7}}], "reorder onward.*7.*5 rows"),
        ([{**MIX, "params": {"proportions": [0.5, 0.4, 0.1]}}], "expected 2 numbers"),
        ([{**MIX, "params": {"proportions": [0.5, 0.4]}}], "must sum to 1"),
    ):
        with pytest.raises(BadInput, match=what):
            plans(Pipeline(stages), run_of([6, 4]), [10], 2, Schedule(10, 10, 1, 20))


# -- warm-up --------------------------------------------------------------------------------------


def test_a_warm_up_opens_with_the_mixture_and_the_reorders_beginning(
    run_of: Callable[..., RunContext],
) -> None:
    run = run_of([60, 30], init_mixture_proportions=(0.75, 0.25))
    of_row = run.data.domains.of_row  # type: ignore[union-attr]
    rows = Pipeline([MIX]).warmup(8, context_at(0, run), 0)
    assert np.bincount(of_row[rows]).tolist() == [6, 2]
    assert Pipeline([MIX]).warmup(8, context_at(0, run), 1).tolist() != rows.tolist()
    ordered = Pipeline([MIX, ORDER]).warmup(8, context_at(0, run), 0)
    assert ordered.tolist() == sorted(ordered.tolist())
    late = Pipeline([{**MIX, "warmup_step": 5}, {**ORDER, "warmup_step": 5}])
    uniform = late.warmup(80, context_at(0, run), 0)
    assert uniform.tolist() != sorted(uniform.tolist())
    assert len(set(uniform.tolist())) == 80


# -- state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_restored_pipeline_goes_on_as_if_nothing_had_happened(
    cut: int, run_of: Callable[..., RunContext]
) -> None:
    stages = [{**FILTER, "every": 30}, {**MIX, "every": 20}]
    run, schedule = run_of([60, 40]), Schedule(10, 10, 0, 90)
    steps = list(range(10, 90, 10))
    never_stopped, first, second = (Pipeline(stages) for _ in range(3))
    whole = plans(never_stopped, run, steps, 8, schedule)
    plans(first, run, steps[:cut], 8, schedule)
    second.restore(first.state())
    assert second.rows[0].strategy.restored == len(first.rows[0].strategy.seen)
    rest = plans(second, run, steps[cut:], 8, schedule)
    assert [p.rows.tolist() for p in rest] == [p.rows.tolist() for p in whole[cut:]]
    seen = [pipeline.rows[0].strategy.seen for pipeline in (first, second, never_stopped)]
    rates = [[context.learning_rate for context in contexts] for contexts in seen]
    assert rates[0] + rates[1] == rates[2]
    assert second.state()["rates"] == never_stopped.state()["rates"]


def test_the_scoreboards_view_accepts_older_losses_of_the_same_board(
    run_of: Callable[..., RunContext],
) -> None:
    asked: list[tuple[list[int], int]] = []

    def losses(rows: Any, *, max_rows: int) -> Any:
        asked.append((rows.tolist(), max_rows))
        return np.full(4, float(len(asked)))

    train = run_of([4]).data.train
    board = Scoreboard(train, losses)
    view = board.view(max_age=10, max_rows=2)
    assert board.losses(10, np.array([0, 1])).tolist()[:2] == [1.0, 1.0]
    assert view.losses(20, np.array([1, 2])).tolist()[1:3] == [1.0, 2.0]
    assert view.losses(21, np.array([1])).tolist()[1] == 3.0
    assert asked == [([0, 1], 1024), ([2], 2), ([1], 2)]
    kept = Scoreboard(train, losses)
    kept.restore(board.state())
    assert kept.losses(21, np.array([1])).tolist()[1] == 3.0
    assert len(asked) == 3


# -- what a user is told --------------------------------------------------------------------------


def test_a_line_names_the_stages_that_fired_and_what_they_kept(
    run_of: Callable[..., RunContext],
) -> None:
    pipeline = Pipeline([{**FILTER, "every": 20}, MIX, ORDER])
    found = plans(pipeline, run_of([40, 20]), [10, 20], 8, Schedule(10, 10, 0, 30))
    lines = [describe(plan, ["a", "b"]) for plan in found]
    mixed = "shares mixes a 0.50, b 0.50: 8 of 30; onward orders 8 of 8"
    assert lines == [f"head keeps 30 of 60; {mixed}", mixed]
    few = Pipeline([{**FILTER, "keep_ratio": 0.1}])
    (plan,) = plans(few, run_of([40]), [10], 8, Schedule(10, 10, 1, 20))
    assert describe(plan, ["a"]) == "head keeps 4 of 40; 8 served, some again"
    late = Pipeline([{**DRAW, "warmup_step": 30}])
    (plan,) = plans(late, run_of([40]), [10], 8, Schedule(10, 10, 0, 20))
    assert describe(plan, ["a"]) == "no stage fires; 8 served"


def test_what_has_no_say_is_told() -> None:
    def about(stages: list[dict[str, Any]], rows: int = 8, **ours: Any) -> str:
        shape = BatchShape(rows, 1, 1)
        return " ".join(warnings_of(Pipeline(stages), config({}, update_step=10, **ours), shape))

    assert "fires every 50 steps, update_step is 10" in about([{**MIX, "every": 50}])
    assert about([{**MIX, "every": 10}, WEIGHT]) == ""
    assert about([WEIGHT], rows=1).startswith("weighter loss: one sample is weighted at a time")
    assert "every: 50 is ignored" in about([{**WEIGHT, "every": 50}])
    assert about([{**FILTER, "every": 50}]) == "", "a filter leaves the draw to others"
    assert about([FILTER, MIX, ORDER]).count("restarts its order each time") == 1
    assert about([{**FILTER, "every": 20}, ORDER]) == ""
    alpha = {"family": "mixer", "component": "alpha"}
    opening = {"init_mixture_proportions": [1, 2]}
    assert "weights the loss and leaves rows alone" in about([alpha], **opening)
    assert about([alpha, MIX], **opening) == ""
    assert "static_mix is ignored" in about([MIX], static_mix=True)


# -- what a dry run asks --------------------------------------------------------------------------


def test_stages_forecast_for_the_steps_at_which_they_fire() -> None:
    class Tells(Head):
        def forecasts(self, run: Any, steps: Sequence[int]) -> Any:
            return [Forecast(f"at {list(steps)}", len(steps))]

    class Weighs(Alpha):
        def forecasts(self, run: Any, steps: Sequence[int]) -> Any:
            return [Forecast(f"weights from {steps[0]}", len(steps))]

    pipeline = Pipeline([{"family": "selector", "component": "random", "every": 6},
                         {"family": "mixer", "component": "doremi", "warmup_step": 4}])  # fmt: skip
    (row,), (loss,) = pipeline.rows, pipeline.loss
    pipeline.rows, pipeline.loss = (
        (replace(row, strategy=Tells()),),
        (replace(loss, strategy=Weighs()),),
    )
    told = pipeline.forecasts(None, [2, 5, 8, 11])  # type: ignore[arg-type]
    assert [(f.what, f.times) for f in told] == [("at [2, 8]", 2), ("weights from 5", 3)]
