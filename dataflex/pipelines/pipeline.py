"""Strategies of several kinds in one run: which rows, in what mixture and order, how weighted."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import MinLen, doc

from dataflex.config.keys import RunConfig
from dataflex.config.parameters import Count, Natural
from dataflex.config.presets import Component
from dataflex.config.registry import register, target_of
from dataflex.data.mixture import FIXED_RULES, check_domains
from dataflex.data.rows import RunData
from dataflex.pipelines.asking import Part, ask, open_with
from dataflex.pipelines.planning import IntArray, Timetable, firings, fit, kept_by_filter
from dataflex.pipelines.stages import BASES, Stage, arrange, build_stages
from dataflex.run.context import DomainLosses, RunContext, UpdateContext
from dataflex.run.schedule import Schedule
from dataflex.run.strategy import Strategy, adapt, ask_forecasts
from dataflex.selectors.base import Selector
from dataflex.weighters.base import LossContributor

if TYPE_CHECKING:
    from dataflex.run.forecast import Forecast


@dataclass(frozen=True)
class Plan:
    """The rows of an interval, and how they came about.

    Attributes:
        rows: (n,) positions.
        parts: one for each stage that decides about rows.
    """

    rows: IntArray
    parts: tuple[Part, ...]


@register("pipeline", "pipeline")
class Pipeline(Strategy):
    """Stages of other strategies: select, then mix, then reorder, and weight what is trained on.

    A stage is {family, component} (selector, mixer, reorder or weighter, and the name of its
    preset) and may have: warmup_step (0), every (1), enabled (true), score_max_age (0), params; a
    selector also mode (filter or draw) and keep_ratio (0.5), a mixer allow_replacement (false).
    ALGORITHMS 5 has the rules.

    Args:
        stages: the list of stages.
        score_batch_size: rows of a scoring batch, at most, whichever stage asks.
        seed: of the draws between the stages, combined with the step.
        save_plans: write the rows that each stage passed on to dataflex/plans/step_<g>.json.
        components_cfg_file: where the stages' components are looked up; where the pipeline itself
            was found, if not given.
        placeholders: what `${key}` in that file stands for; the run's own keys, if not given.
    """

    neutral = frozenset(
        {"score_batch_size", "save_plans", "components_cfg_file", "placeholders", "stages"}
    )

    def __init__(
        self,
        stages: Annotated[Sequence[Any], MinLen(1), doc("a list of {family, component, ...}")],
        score_batch_size: Count = 8,
        seed: Natural = 42,
        save_plans: bool = False,
        components_cfg_file: str | None = None,
        placeholders: Mapping[str, Any] | None = None,
    ) -> None:
        presets = None if components_cfg_file is None else Path(components_cfg_file)
        arranged = arrange(build_stages(stages, presets, placeholders))
        self.rows, self.loss = arranged.rows, arranged.loss
        self.filled_by, self.warnings = arranged.filled_by, arranged.warnings
        self.score_batch_size = score_batch_size
        self.seed = seed
        self.save_plans = save_plans
        strategies = [stage.strategy for stage in self.everyone]
        self.needs_single_rows = any(s.needs_single_rows for s in strategies)
        self.needs_lora = any(s.needs_lora for s in strategies)
        self.needs_targets = any(s.needs_targets for s in strategies)
        self.needs_moments = any(s.needs_moments for s in strategies)
        self.reads_losses = any(s.reads_losses for s in strategies)
        self.scores_by_loss = any(s.scores_by_loss for s in strategies)
        self.observes = any(s.observes for s in strategies)
        self.whole_model = frozenset().union(*(s.whole_model for s in strategies))
        settings = (s.gradient_features for s in strategies)
        self.gradient_features = next((s for s in settings if s is not None), None)
        #: Rows that each stage of `rows` passed on when it last fired.
        self._handed: list[IntArray | None] = [None] * len(self.rows)
        #: Sum and number of the learning rates since each stage of `rows` last fired.
        self._rates = [(0.0, 0)] * len(self.rows)
        self._planned = 0

    # -- what the stages need ---------------------------------------------------------------------

    @property
    def everyone(self) -> tuple[Stage, ...]:
        """All stages: those that decide about rows, then those that weight samples alone."""
        return (*self.rows, *self.loss)

    @property
    def mixer(self) -> Stage | None:
        """The stage that decides in what proportions domains are served."""
        return next((stage for stage in self.rows if stage.spec.family == "mixer"), None)

    @property
    def reorder(self) -> Stage | None:
        """The stage that decides in which order rows are served."""
        return next((stage for stage in self.rows if stage.spec.family == "reorder"), None)

    @property
    def keeps_scores(self) -> bool:
        """True if a loss may be used after the boundary it was taken at."""
        return any(stage.spec.score_max_age > 0 for stage in self.rows)

    def describe(self) -> str:
        """Describe the stages as they run, for one line on the screen."""
        rows = [stage.spec.name for stage in self.rows]
        chain = " -> ".join(rows if self.filled_by in rows else [*rows, self.filled_by])
        weights = " x ".join(stage.spec.component for stage in self.loss)
        return chain + (f", samples weighted by {weights}" if weights else "")

    def resolved(self) -> list[dict[str, Any]]:
        """List the stages with all parameters that change an answer, presets included."""
        listed = []
        for stage in self.everyone:
            neutral = stage.strategy.neutral
            params = {k: v for k, v in stage.component.params.items() if k not in neutral}
            cls = target_of(type(stage.strategy))
            listed.append({**vars(stage.spec), "class": cls, "params": params})
        return listed

    # -- life cycle -------------------------------------------------------------------------------

    def check(self, config: RunConfig) -> list[str]:
        """List the faults of all stages, and keys that a pipeline has no use for."""
        faults = [
            f"{stage.spec.name}: {fault}"
            for stage in self.everyone
            for fault in stage.strategy.check(config)
        ]
        ours = config.dataflex
        if config.known.val_size > 0:
            faults.append(
                f"val_size is {config.known.val_size}, but a pipeline works on whole data "
                "sets: remove it, and name eval_dataset or target_dataset."
            )
        if ours.mixture_sample_rule in FIXED_RULES:
            faults.append(
                f"mixture_sample_rule is {ours.mixture_sample_rule!r}; in a pipeline a mixer stage "
                "decides the mixture: remove it."
            )
        if not any(stage.spec.family == "mixer" for stage in self.everyone):
            faults += [
                f"{key} is set, but the pipeline has no mixer stage: add one, or remove {key}."
                for key in ("init_mixture_proportions", "mixer_eval_dataset")
                if getattr(ours, key)
            ]
        return faults

    def check_data(self, data: RunData, config: RunConfig) -> None:
        """Refuse rows that some stage cannot work on."""
        if any(stage.spec.family == "mixer" for stage in self.everyone):
            check_domains(data)
        for stage in self.everyone:
            stage.strategy.check_data(data, config)

    def check_count(self, count: int, data: RunData) -> None:
        """Refuse, before the model is loaded, more rows than the selector can answer.

        Args:
            count: rows of an interval.
            data: what the run reads.
        """
        usable = int((data.train.target_tokens > 0).sum())
        for stage in self.rows:
            if isinstance(stage.strategy, Selector):
                draws = stage.spec.mode == "draw"
                wanted = count if draws else kept_by_filter(usable, stage.spec.keep_ratio)
                stage.strategy.check_count(wanted, data)

    def forecasts(self, run: RunContext, steps: Sequence[int]) -> Sequence[Forecast]:
        """Collect the forecasts of all stages, each for the steps at which it fires."""
        fired = firings(steps, [stage.spec.pace for stage in self.rows])
        asked = [[s for s, fires in zip(steps, column, strict=True) if fires] for column in fired.T]
        asked += [[s for s in steps if s >= stage.spec.warmup_step] for stage in self.loss]
        return [
            forecast
            for stage, when in zip(self.everyone, asked, strict=True)
            for forecast in ask_forecasts(stage.strategy, run, when)
        ]

    def start(self, run: RunContext) -> None:
        """Start every stage."""
        for stage in self.everyone:
            stage.strategy.start(run)

    def finish(self) -> None:
        """Finish every stage, even where another one raises."""
        with contextlib.ExitStack() as stack:
            for stage in self.everyone:
                stack.callback(stage.strategy.finish)

    def state(self) -> dict[str, Any]:
        """Collect the stages' own states, and the rows they passed on."""
        return {
            "stages": [dict(stage.strategy.state()) for stage in self.everyone],
            "handed": list(self._handed),
            "rates": [list(pair) for pair in self._rates],
            "planned": self._planned,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Restore it; a stage that does not fire next hands on the same rows again."""
        for stage, kept in zip(self.everyone, state["stages"], strict=True):
            stage.strategy.restore(kept)
        self._handed = [None if rows is None else np.asarray(rows) for rows in state["handed"]]
        self._rates = [(float(total), int(steps)) for total, steps in state["rates"]]
        self._planned = int(state["planned"])

    # -- loss -------------------------------------------------------------------------------------

    def contributors(self, step: int) -> list[LossContributor]:
        """List what weights the samples of a step: the product of their weights counts."""
        return [stage.strategy for stage in self.loss if step >= stage.spec.warmup_step]

    def observe(self, losses: DomainLosses) -> None:
        """Hand a step's training losses to the stages that learn from them."""
        for stage in self.everyone:
            if stage.strategy.observes:
                stage.strategy.observe(losses)

    # -- rows -------------------------------------------------------------------------------------

    def timetable(self, schedule: Schedule) -> Timetable:
        """Compute when the stages of `rows` fire."""
        return Timetable.of(schedule, [stage.spec.pace for stage in self.rows])

    def plan(self, count: int, context: UpdateContext, timetable: Timetable) -> Plan:
        """Decide the `count` rows of the interval that begins now, the same on every rank."""
        self._note_rate(context)
        pool, parts, arranged = context.candidates, [], False
        turns = timetable.at(context.step)
        for i, (stage, (turn, total)) in enumerate(zip(self.rows, turns, strict=True)):
            before, answer = len(pool), None
            handed = self._handed[i]
            if turn:
                own = replace(self._context_of(i, context, pool), update=turn, updates=total)
                last = i == len(self.rows) - 1
                pool, answer = ask(stage, count, own, self.seed, last=last)
                self._handed[i] = pool
            elif handed is not None:
                pool = handed
            if turn or handed is not None:
                arranged = stage.spec.name == self.filled_by
            parts.append(Part(stage, bool(turn), before, pool, answer))
        generator = np.random.default_rng([self.seed, context.step, len(self.rows)])
        return Plan(fit(pool, count, arranged=arranged, generator=generator), tuple(parts))

    def warmup(self, count: int, context: UpdateContext, stage: int) -> IntArray:
        """Draw rows to train on before the first update of the schedule's `stage`.

        With a mixer the opening mixture; of it what a reorder begins with. A stage whose own
        warm-up is not over has no say.
        """
        mixer, reorder = (
            there if there is not None and context.step >= there.spec.warmup_step else None
            for there in (self.mixer, self.reorder)
        )
        return open_with(mixer, reorder, count, context, [context.run.seed, stage])

    def _context_of(self, i: int, context: UpdateContext, pool: IntArray) -> UpdateContext:
        """Build the view of stage i: its pool, its learning rate, losses as old as it allows."""
        spec = self.rows[i].spec
        total, steps = self._rates[i]
        self._rates[i] = (0.0, 0)
        board = context.run.board
        if board is not None:
            board = board.view(max_age=spec.score_max_age, max_rows=self.score_batch_size)
        return replace(
            context,
            run=replace(context.run, board=board),
            learning_rate=total / steps if steps else context.learning_rate,
            pool=pool,
        )

    def _note_rate(self, context: UpdateContext) -> None:
        """Add the rate; a stage that fires seldom gets the mean since it last fired."""
        steps = context.step - self._planned
        self._planned = context.step
        self._rates = [(s + context.learning_rate * steps, n + steps) for s, n in self._rates]


def build_strategy(component: Component) -> Strategy:
    """Build the strategy of a run: a pipeline, or one of the kinds its stages are of.

    Raises:
        BadInput: a parameter is out of range, or the class is no strategy of its kind.
    """
    return adapt(component.build(), {**BASES, "pipeline": Pipeline}[component.kind])
