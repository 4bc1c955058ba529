"""The `stages` of a pipeline: strict keys, a fixed order, one stage that fills the interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Gt, Le

from dataflex.config.parameters import Count, Natural, declared, faults
from dataflex.config.presets import Component, resolve
from dataflex.config.registry import KINDS, unknown
from dataflex.mixers.base import Mixer
from dataflex.pipelines.planning import Pace
from dataflex.reorders.base import Reorder
from dataflex.run.strategy import Strategy, adapt
from dataflex.selectors.base import Selector
from dataflex.weighters.base import LossContributor, Weighter
from gradstore.errors import BadInput

#: family -> train_type under which its components are registered.
FAMILIES: Mapping[str, str] = {
    kind: train_type for train_type, (_, kind) in KINDS.items() if kind != "pipeline"
}

#: family -> the base that its strategies are completed to.
BASES: Mapping[str, type[Strategy]] = {
    "selector": Selector,
    "mixer": Mixer,
    "reorder": Reorder,
    "weighter": Weighter,
}

#: Stages that decide about rows, in the order in which they run: proportions are those of the
#: rows that are left, and an order holds only if nothing comes after it.
ROW_FAMILIES = ("selector", "mixer", "reorder")

#: Fills the interval where no stage does.
UNIFORM = "uniform draw"

_COMMON = ("family", "component", "warmup_step", "every", "enabled", "score_max_age",
           "params", "component_params")  # fmt: skip

#: family -> the keys of its stages.
ACCEPTED: Mapping[str, tuple[str, ...]] = {
    "selector": (*_COMMON, "mode", "keep_ratio"),
    "mixer": (*_COMMON, "allow_replacement"),
    "reorder": _COMMON,
    "weighter": _COMMON,
}


@dataclass(frozen=True)
class StageSpec:
    """One entry of `stages`, checked.

    Attributes:
        family: selector, mixer, reorder or weighter.
        component: its preset or strategy, as in `component_name`.
        warmup_step: before this step it passes its pool through, or weights nothing.
        every: optimizer steps between two firings, at least.
        enabled: false leaves it out.
        score_max_age: how many steps old a loss of the shared scoreboard may be.
        params: over the preset's.
        mode: of a selector: filter shrinks the pool, draw chooses the interval.
        keep_ratio: share of the pool that a filter keeps.
        allow_replacement: of a mixer that fills the interval: repeat rows of a domain that is
            too small.
    """

    family: str
    component: str
    warmup_step: Natural = 0
    every: Count = 1
    enabled: bool = True
    score_max_age: Natural = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    mode: Literal["filter", "draw"] = "filter"
    keep_ratio: Annotated[float, Gt(0), Le(1)] = 0.5
    allow_replacement: bool = False

    @property
    def name(self) -> str:
        """For messages and lines: `selector loss`."""
        return f"{self.family} {self.component}"

    @property
    def pace(self) -> Pace:
        """Pace at which the stage fires."""
        return Pace(self.warmup_step, self.every)


@dataclass(frozen=True)
class Stage:
    """A stage with its strategy, built.

    Attributes:
        spec: what the user wrote.
        component: the strategy's class and merged parameters.
        strategy: the strategy.
    """

    spec: StageSpec
    component: Component
    strategy: Any

    @property
    def weights_loss(self) -> bool:
        """True if it multiplies the samples' weights; such a mixer (DoReMi) leaves rows alone."""
        return self.spec.family == "weighter" or isinstance(self.strategy, LossContributor)


@dataclass(frozen=True)
class Arrangement:
    """The stages of a pipeline in the order in which they run.

    Attributes:
        rows: at most one selector, mixer and reorder each, in this order.
        loss: those that weight samples, in the order of the YAML.
        filled_by: name of the stage that decides the interval's rows, or UNIFORM.
        warnings: what was put right, one sentence each.
    """

    rows: tuple[Stage, ...]
    loss: tuple[Stage, ...]
    filled_by: str
    warnings: tuple[str, ...]


def arrange(stages: Sequence[Stage]) -> Arrangement:
    """Arrange stages by rules 1 and 2 of ALGORITHMS 5.

    Raises:
        BadInput: two stages of one family decide about rows, or a selector draws the interval
            though another stage comes after it.
    """
    deciding = [stage for stage in stages if not stage.weights_loss]
    rows = sorted(deciding, key=lambda stage: ROW_FAMILIES.index(stage.spec.family))
    for earlier, later in pairwise(rows):
        if earlier.spec.family == later.spec.family:
            raise BadInput(
                f"two stages are of family {earlier.spec.family} ({earlier.spec.component} and "
                f"{later.spec.component}); a pipeline runs at most one selector, one mixer and one "
                "reorder. Set enabled: false for one of them."
            )
    if rows and rows[0].spec.mode == "draw" and len(rows) > 1:
        raise BadInput(
            f"{rows[0].spec.name} has mode: draw, which chooses the rows of the interval, but "
            f"{rows[-1].spec.name} comes after it and would replace them. Set mode: filter."
        )
    warnings = []
    if rows != deciding:
        warnings.append(
            f"stages are listed as {_chain(deciding)}; they run as {_chain(rows)}, the only order "
            "in which no stage overrides another"
        )
    warnings += [
        f"{stage.spec.name} weights every step: every: {stage.spec.every} is ignored"
        for stage in stages
        if stage.weights_loss and stage.spec.every > 1
    ]
    warnings += [
        f"{stage.spec.name} weights by the losses of training: score_max_age is ignored"
        for stage in stages
        if stage.weights_loss and stage.spec.score_max_age > 0
    ]
    warnings += [
        f"{earlier.spec.name}: allow_replacement is ignored, since {later.spec.name} serves each "
        "row once"
        for earlier, later in pairwise(rows)
        if earlier.spec.allow_replacement
    ]
    filled_by = UNIFORM
    if rows and (rows[-1].spec.family != "selector" or rows[-1].spec.mode == "draw"):
        filled_by = rows[-1].spec.name
    loss = tuple(stage for stage in stages if stage.weights_loss)
    return Arrangement(tuple(rows), loss, filled_by, tuple(warnings))


def build_stages(
    entries: Sequence[object],
    presets_file: Path | None,
    placeholders: Mapping[str, Any] | None = None,
) -> list[Stage]:
    """Build the enabled stages, each with its strategy.

    Args:
        entries: `stages` of the preset.
        presets_file: components.yaml in which their components are looked up.
        placeholders: what `${key}` in it stands for.

    Raises:
        BadInput: none is enabled, unknown keys, values out of range, unknown components or
            parameters; every fault found, one per line.
    """
    stages, found = [], []
    for number, entry in enumerate(entries, start=1):
        where = f"stage {number}"
        try:
            spec = parse_stage(entry)
            where = f"stage {number} ({spec.name})"
            if spec.enabled:
                stages.append(_build(spec, presets_file, placeholders))
        except BadInput as error:
            found.append(f"{where}: {error}")
    if not (stages or found):
        found.append("every stage has enabled: false; enable one.")
    if found:
        raise BadInput("\n".join(found))
    return stages


def parse_stage(entry: object) -> StageSpec:
    """Parse one entry of `stages`, with strict keys.

    Raises:
        BadInput: an unknown key or family, a missing one, or a value out of range.
    """
    if not isinstance(entry, Mapping):
        raise BadInput(f"{entry!r} is no mapping; write {{family: ..., component: ...}}.")
    given = {str(key): value for key, value in entry.items() if value is not None}
    if missing := [key for key in ("family", "component") if key not in given]:
        raise BadInput(f"{' and '.join(missing)} missing; a stage needs family and component.")
    family = str(given["family"])
    family = family.removesuffix("s") if family not in FAMILIES else family
    if family not in FAMILIES:
        raise BadInput(unknown("family", [str(given["family"])], FAMILIES))
    if extra := set(given) - set(ACCEPTED[family]):
        raise BadInput(unknown(f"key of a {family} stage", extra, ACCEPTED[family]))
    if "params" in given and "component_params" in given:
        raise BadInput("params and component_params mean the same; set only one of them.")
    params = given.pop("component_params", given.pop("params", {}))
    values = {**given, "family": family, "component": str(given["component"]), "params": params}
    if found := faults(declared(StageSpec.__init__), values):
        raise BadInput(" ".join(f"{fault}." for fault in found))
    return StageSpec(**values)


def _build(
    spec: StageSpec, presets_file: Path | None, placeholders: Mapping[str, Any] | None
) -> Stage:
    family = FAMILIES[spec.family]
    component = resolve(family, spec.component, spec.params, presets_file, placeholders)
    strategy = adapt(component.build(), BASES[spec.family])
    if isinstance(strategy, Reorder):
        # apply_at: raw orders rows before tokenisation, when no other stage can act on them.
        strategy.by_index()
    return Stage(spec, component, strategy)


def _chain(stages: Sequence[Stage]) -> str:
    return " -> ".join(stage.spec.family for stage in stages)
