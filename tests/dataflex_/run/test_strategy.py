"""A user's class that only looks like a strategy is completed to one of its kind, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataflex.api import (
    DomainLosses,
    LossContributor,
    Mixer,
    Ordering,
    Reorder,
    Selection,
    Selector,
    Strategy,
    Weighter,
)
from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import resolve
from dataflex.config.registry import target_of
from dataflex.launch.build import feature_settings
from dataflex.pipelines.pipeline import Pipeline, build_strategy
from dataflex.run.strategy import FSDP, adapt
from gradstore.errors import BadInput


class Selects:
    def select(self, count: int, context: Any) -> Selection:
        return Selection(np.arange(count))


class Mixes:
    def mix(self, context: Any) -> Any:
        return np.array([0.25, 0.75])


class Weights:
    def weights(self, losses: Any, context: Any) -> Any:
        return losses * 2


class Orders:
    def order(self, count: int, context: Any) -> Ordering:
        return Ordering(np.arange(count)[::-1])


KINDS: list[tuple[type, type[Any], str]] = [
    (Selects, Selector, "select(count, context)"),
    (Mixes, Mixer, "mix(context)"),
    (Weights, Weighter, "weights(losses, context)"),
    (Orders, Reorder, "order(count, context)"),
]


@pytest.mark.parametrize(("bare", "base", "method"), KINDS)
def test_one_method_makes_a_strategy_of_its_kind(bare: type, base: type[Any], method: str) -> None:
    own = bare()
    adapted = adapt(own, base)
    assert isinstance(adapted, base)
    assert isinstance(adapted, bare)
    assert getattr(adapted, base.required) == getattr(own, base.required)
    nothing: Any = None
    plain = base()
    for name in (name for name in dir(base) if not name.startswith("_")):
        if name not in dir(bare) and not callable(getattr(base, name)):
            assert getattr(adapted, name) == getattr(plain, name), name
    assert adapted.check(nothing) == []
    assert adapted.check_data(nothing, nothing) is None
    assert adapted.start(nothing) is None
    assert adapted.state() == {}
    assert adapted.restore({}) is None
    assert adapted.finish() is None


@pytest.mark.parametrize(("bare", "base", "method"), KINDS)
def test_a_class_without_its_method_is_refused_when_it_is_built(
    bare: type, base: type[Any], method: str
) -> None:
    class Lacks(base):  # type: ignore[misc] - a variable as base
        pass

    class Holds:
        pass

    setattr(Holds, base.required, 3)
    for other in (Lacks, Holds, object):
        with pytest.raises(BadInput) as refused:
            adapt(other(), base)
        assert str(refused.value) == (
            f"{target_of(other)} has no method {method}, which every {base.__name__} needs: "
            f"define it; `python -m pydoc dataflex.api.{base.__name__}` says what it returns."
        )


def test_what_a_class_has_counts_before_what_its_base_has() -> None:
    class Mine(Selects):
        needs_targets = True
        whole_model = frozenset({FSDP})
        neutral = frozenset({"speed"})

        def __init__(self) -> None:
            self.needs_single_rows = False
            self.served = 0

        @property
        def distinct(self) -> bool:
            return self.served > 0

        def check(self, config: Any) -> list[str]:
            return ["a fault"]

        def state(self) -> dict[str, Any]:
            return {"served": self.served}

        def restore(self, state: Any) -> None:
            self.served = state["served"]

    own = Mine()
    adapted = adapt(own, Selector)
    assert adapted.needs_targets
    assert not adapted.needs_single_rows
    assert adapted.whole_model == {FSDP}
    assert adapted.neutral == {"speed"}
    nothing: Any = None
    assert adapted.check(nothing) == ["a fault"]
    assert not adapted.distinct
    adapted.restore({"served": 4})
    assert own.served == 4
    assert adapted.state() == {"served": 4}
    assert adapted.distinct, "as it is now, not as it was when it was built"


def test_methods_of_the_base_call_those_of_the_class() -> None:
    nothing: Any = None
    assert adapt(Orders(), Reorder).warmup(3, nothing).rows.tolist() == [2, 1, 0]

    class Distinct(Selects):
        distinct = True

    data: Any = type("Data", (), {})
    data.train = type("Train", (), {"target_tokens": np.ones(4), "__len__": lambda _: 4})()
    adapt(Selects(), Selector).check_count(5, data)
    with pytest.raises(BadInput, match="asked 5, 4 usable"):
        adapt(Distinct(), Selector).check_count(5, data)


def test_a_class_that_delegates_is_asked_for_everything() -> None:
    class Logged:
        """Wraps another strategy, as users do to look into it."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class Inner(Mixer):
        observes = True
        dynamic = False

        def __init__(self) -> None:
            self.seen: list[DomainLosses] = []

        def mix(self, context: Any) -> Any:
            return np.ones(1)

        def observe(self, losses: DomainLosses) -> None:
            self.seen.append(losses)

    inner = Inner()
    adapted = adapt(Logged(inner), Mixer)
    assert adapted.observes
    assert not adapted.dynamic
    losses = DomainLosses(0, np.ones(1), np.ones(1), np.ones(1))
    adapted.observe(losses)
    assert inner.seen == [losses]


def test_a_checkpoint_keeps_the_name_of_the_users_class() -> None:
    for built, base in ((Selects(), Selector), (Mixes(), Mixer)):
        assert target_of(type(adapt(built, base))) == target_of(type(built))


@pytest.mark.parametrize(("bare", "base", "method"), KINDS)
def test_a_subclass_of_strategy_alone_gets_the_defaults_of_its_kind(
    bare: type, base: type[Any], method: str
) -> None:
    class Mine(bare, Strategy):  # type: ignore[misc] - variables as bases
        pass

    adapted, plain = adapt(Mine(), base), base()
    assert isinstance(adapted, base)
    assert isinstance(adapted, Mine)
    for name in (name for name in dir(base) if not name.startswith("_")):
        if not callable(getattr(base, name)):
            assert getattr(adapted, name) == getattr(plain, name), name
        elif name not in dir(bare):
            assert getattr(adapted, name).__func__ is getattr(base, name), name


def test_what_a_subclass_of_strategy_says_counts_also_where_it_repeats_a_default() -> None:
    class Mine(Strategy):
        needs_single_rows = Strategy.needs_single_rows

        def __init__(self) -> None:
            self.observes = Strategy.observes
            self.needs_lora = True

        def mix(self, context: Any) -> Any:
            return np.ones(1)

    assert not Mixer.needs_single_rows
    adapted = adapt(Mine(), Mixer)
    assert adapted.needs_single_rows
    assert adapted.needs_lora
    assert not adapted.observes

    class Further(Mine):
        pass

    assert adapt(Further(), Mixer).needs_single_rows


def test_bases_of_another_kind_are_kept() -> None:
    class Both(LossContributor):
        relative = False

        def mix(self, context: Any) -> Any:
            return np.ones(2) / 2

        def weights(self, losses: Any, context: Any) -> Any:
            return losses

    adapted: Any = adapt(Both(), Mixer)
    assert isinstance(adapted, Mixer)
    assert isinstance(adapted, LossContributor)
    assert adapted.scope == "window"
    assert not adapted.relative
    assert not isinstance(adapt(Mixes(), Mixer), LossContributor)


def test_a_strategy_of_its_kind_is_left_as_it_is() -> None:
    class Mine(Selector):
        def __init__(self) -> None:
            self.select = lambda count, context: Selection(np.arange(count))  # type: ignore[method-assign]

    mine = Mine()
    assert adapt(mine, Selector) is mine


def test_a_pipeline_has_to_be_one() -> None:
    class Mine(Strategy):
        pass

    with pytest.raises(BadInput, match=r"Mine is no Pipeline: subclass dataflex\.pipelines\.pipe"):
        adapt(Mine(), Pipeline)


BARE = """
class Bare:
    def __init__(self, share: float = 0.5): self.share = share
    def select(self, count, context): return count
    def mix(self, context): return [1]
    def weights(self, losses, context): return losses
    def order(self, count, context): return count
class Empty: pass
"""


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_own.py").write_text(BARE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("train_type", "family", "base"),
    [("dynamic_select", "selector", Selector), ("dynamic_mix", "mixer", Mixer),
     ("dynamic_weight", "weighter", Weighter), ("dynamic_reorder", "reorder", Reorder)],
)  # fmt: skip
@pytest.mark.usefixtures("beside")
def test_a_run_and_a_stage_build_a_users_class_the_same_way(
    train_type: str, family: str, base: type[Strategy]
) -> None:
    params = {"target": "users_own:Bare", "share": 0.25}
    single: Any = build_strategy(resolve(train_type, "custom", params))
    pipeline: Any = build_strategy(
        resolve("dynamic_lego", "pipeline",
                {"stages": [{"family": family, "component": "custom", "params": params}]})
    )  # fmt: skip
    (stage,) = pipeline.everyone
    for strategy in (single, stage.strategy):
        assert isinstance(strategy, base)
        assert strategy.share == 0.25
        assert target_of(type(strategy)) == "users_own:Bare"
    (resolved,) = pipeline.resolved()
    assert resolved["class"] == "users_own:Bare"
    assert pipeline.needs_single_rows == base.needs_single_rows
    assert not pipeline.observes
    nothing: Any = None
    assert pipeline.state()["stages"] == [{}]
    pipeline.start(nothing)
    pipeline.finish()


@pytest.mark.usefixtures("beside")
def test_an_empty_class_is_refused_by_name_in_a_run_and_in_a_stage() -> None:
    params = {"target": "users_own:Empty"}
    with pytest.raises(BadInput, match=r"users_own:Empty has no method mix\(context\)"):
        build_strategy(resolve("dynamic_mix", "custom", params))
    stage = {"family": "mixer", "component": "custom", "params": params}
    says = r"stage 1 \(mixer custom\): users_own:Empty has no method mix\(context\)"
    with pytest.raises(BadInput, match=says):
        build_strategy(resolve("dynamic_lego", "pipeline", {"stages": [stage]}))


def test_settings_of_features_are_those_of_the_component_or_of_less() -> None:
    def settings(name: str, **params: Any) -> Any:
        ours = DataFlexConfig(train_type="dynamic_select", component_name=name,
                              component_params=params)  # fmt: skip
        return feature_settings(RunConfig(ours, {}, Path("run.yaml")))

    assert settings("less", gradient_type="sign").gradient_type == "sign"
    assert settings("random") == settings("less")
    assert settings("coincide") == settings("less")
