"""Training on the decisions of a pipeline of strategies, renewed at every update."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.checkpoints.state import RunState
from dataflex.config.keys import RunConfig
from dataflex.data.mixture import domains_of
from dataflex.data.order import BatchShape
from dataflex.data.rows import Domains
from dataflex.mixers.base import Mixer
from dataflex.pipelines.asking import Part
from dataflex.pipelines.pipeline import Pipeline, Plan
from dataflex.pipelines.stages import UNIFORM
from dataflex.run.schedule import EventKind, Interval
from dataflex.selectors.base import Selection
from dataflex.trainers.job import Job, Run
from dataflex.trainers.loss_seam import LossSeam
from dataflex.trainers.metrics import (
    ByDomain,
    domain_metrics,
    domains_summary,
    flat,
    largest,
    selection_metrics,
)
from dataflex.trainers.row_seam import RowSeam
from dataflex.trainers.weight import weighted_alone
from dataflex.trainers.weights import SampleStats, losses_by_domain
from dataflex.weighters.base import LossContributor

_log = logging.getLogger(__name__)


class LegoSeam(LossSeam, RowSeam):
    """W steps of warm-up, then the pipeline's plan every U steps, its weighters at every step."""

    within_rows = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self.timetable = self.pipeline.timetable(self.run.schedule)
        if self.run.ranks.leads:
            _log.info("pipeline: %s", self.pipeline.describe())
            for warning in warnings_of(self.pipeline, self.run.config, self.run.shape):
                _log.warning("%s", warning)

    @property
    def pipeline(self) -> Pipeline:
        """The component."""
        found: Pipeline = self.run.strategy
        return found

    @property
    def domains(self) -> Domains:
        """The domains of the rows."""
        return domains_of(self.run.data)

    # -- rows -------------------------------------------------------------------------------------

    @classmethod
    def keeps_order(cls, job: Job) -> bool:
        """Keep the order that a reorder stage has made."""
        return job.strategy.reorder is not None or super().keeps_order(job)

    def rows_for(self, interval: Interval) -> npt.NDArray[np.int64]:
        """Open with the pipeline's warm-up, or follow its plan."""
        began = time.perf_counter()
        count = interval.steps * self.run.shape.rows
        context = self.update_context(interval)
        if interval.kind is EventKind.WARMUP:
            return self.pipeline.warmup(count, context, interval.stage)
        plan = self.pipeline.plan(count, context, self.timetable)
        self._record(interval.start, plan, time.perf_counter() - began)
        return plan.rows

    def _record(self, step: int, plan: Plan, pause: float) -> None:
        """Log one line on the screen, one in events.jsonl, metrics for the Trainer's log."""
        numbers: dict[str, float] = {"pause_seconds": pause}
        proportions: dict[str, float] = {}
        for part in plan.parts:
            numbers[f"kept/{part.stage.spec.family}"] = len(part.rows)
            if isinstance(part.answer, Selection):
                numbers |= selection_metrics(self.run.data, part.answer.indices, part.answer)
            elif isinstance(part.answer, np.ndarray):
                proportions = dict(zip(self.domains.names, part.answer.tolist(), strict=True))
        self.add_to_log({**numbers, **{f"mix/{name}": p for name, p in proportions.items()}})
        more = self._log_by_domain()
        if not self.run.ranks.leads:
            return
        counts = np.bincount(self.domains.of_row[plan.rows], minlength=len(self.domains.names))
        self.log_files.update(
            "pipeline",
            step=step,
            component=self.run.name,
            summary=describe(plan, self.domains.names) + domains_summary(more),
            fired=[part.stage.spec.name for part in plan.parts if part.fired],
            kept={part.stage.spec.name: len(part.rows) for part in plan.parts},
            proportions=proportions,
            counts=dict(zip(self.domains.names, counts.tolist(), strict=True)),
            pause_seconds=pause,
            **more,
        )
        self._write_selection(step, plan)
        if self.pipeline.save_plans:
            stages = [
                {"stage": part.stage.spec.name, "fired": part.fired, "rows": part.rows.tolist()}
                for part in plan.parts
            ]
            self.log_files.plan(step, {"stages": stages, "rows": plan.rows.tolist()})

    def _log_by_domain(self) -> ByDomain:
        """Log the mixers' numbers beside proportions, also of those that weight the loss."""
        strategies = [stage.strategy for stage in self.pipeline.everyone]
        mixers = [strategy for strategy in strategies if isinstance(strategy, Mixer)]
        found = domain_metrics(mixers, self.domains.names)
        self.add_to_log(flat(found))
        return found

    def _write_selection(self, step: int, plan: Plan) -> None:
        """Write a selector's answer as `dynamic_select` does."""
        for part in plan.parts:
            if isinstance(part.answer, Selection):
                indices = np.asarray(part.answer.indices, dtype=np.int64)
                manifest = {
                    **self.manifest(len(indices), part.stage.component.params),
                    "stage": part.stage.spec.name,
                    **part.answer.manifest,
                }
                self.chosen_rows.write(step, indices, part.answer.scores, manifest)

    # -- losses -----------------------------------------------------------------------------------

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """List the stages that weight samples, from step W and from their own warm-up on."""
        return () if step < self.run.schedule.warmup_step else self.pipeline.contributors(step)

    def observes(self, step: int) -> bool:
        """Return true where a stage learns from training losses."""
        return self.pipeline.observes

    def rows_of_step(self, step: int) -> list[npt.NDArray[np.int64]]:
        """Return the positions of this rank's micro-batches."""
        return self.served_rows(step)

    def after_step(self, seen: SampleStats, rows: npt.NDArray[np.int64] | None) -> None:
        """Hand a step's losses by domain, over all ranks, to stages that observe."""
        self._log_by_domain()
        if self.pipeline.observes:
            assert rows is not None
            step = int(self.state.global_step)
            self.pipeline.observe(losses_by_domain(step, seen, rows, self.domains, self.run.ranks))

    # -- state ------------------------------------------------------------------------------------

    def more_state(self) -> Mapping[str, Any]:
        """Keep losses that a later boundary may use."""
        board = self.context.board
        kept = board.state() if board is not None and self.pipeline.keeps_scores else {}
        return {**super().more_state(), "board": kept}

    def restore_more(self, state: RunState) -> None:
        """Restore them."""
        super().restore_more(state)
        if state.more["board"] and self.context.board is not None:
            self.context.board.restore(state.more["board"])

    @classmethod
    def settings(cls, run: Run) -> Mapping[str, Any]:
        """Add the stages' parameters, the domains and the opening mixture, which must agree too."""
        opening, domains = run.config.dataflex.init_mixture_proportions, domains_of(run.data)
        return {
            **super().settings(run),
            "stages": run.strategy.resolved(),
            "init_mixture_proportions": None if opening is None else list(opening),
            "rows of the domains": dict(zip(domains.names, domains.sizes.tolist(), strict=True)),
        }


def describe(plan: Plan, domains: Sequence[str]) -> str:
    """Describe the stages that fired and what they kept, for one line on the screen."""
    parts = [_describe_part(part, domains) for part in plan.parts if part.fired]
    ready = len(plan.parts[-1].rows) if plan.parts else None
    if not parts:
        parts.append("no stage fires")
    if ready != len(plan.rows):
        repeats = len(np.unique(plan.rows)) < len(plan.rows)
        parts.append(f"{len(plan.rows)} served" + (", some again" if repeats else ""))
    return "; ".join(parts)


def _describe_part(part: Part, domains: Sequence[str]) -> str:
    spec, kept = part.stage.spec, len(part.rows)
    if spec.family == "selector":
        return (
            f"{spec.component} {'draws' if spec.mode == 'draw' else 'keeps'} {kept} of {part.pool}"
        )
    if spec.family == "reorder":
        return f"{spec.component} orders {kept} of {part.pool}"
    assert isinstance(part.answer, np.ndarray)
    shares = dict(zip(domains, part.answer.tolist(), strict=True))
    return f"{spec.component} mixes {largest(shares, '.2f')}: {kept} of {part.pool}"


def warnings_of(pipeline: Pipeline, config: RunConfig, shape: BatchShape) -> list[str]:
    """List keys that have no effect, and stages that serve the same rows again."""
    ours, warnings = config.dataflex, list(pipeline.warnings)
    warnings += [
        f"{stage.spec.name}: {warning}"
        for stage in pipeline.loss
        if (warning := weighted_alone(stage.strategy, shape))
    ]
    if pipeline.filled_by != UNIFORM and pipeline.rows[-1].spec.every > ours.update_step:
        spec = pipeline.rows[-1].spec
        warnings.append(
            f"{spec.name} fires every {spec.every} steps, update_step is {ours.update_step}: in "
            f"between the same {ours.update_step} steps of rows are served again. Set every to "
            f"{ours.update_step}, or update_step to {spec.every}."
        )
    if pipeline.reorder is not None:
        warnings += [
            f"{stage.spec.name} passes on another pool at every update, so {pipeline.filled_by} "
            "restarts its order each time: set every: "
            f"{4 * ours.update_step} or so for the former."
            for stage in pipeline.rows[:-1]
            if stage.spec.every <= ours.update_step
        ][:1]
    if ours.init_mixture_proportions is not None and pipeline.mixer is None:
        warnings.append(
            "init_mixture_proportions is ignored: the mixer stage weights the loss and leaves rows "
            "alone. Add a mixer stage static to draw in fixed proportions."
        )
    if ours.static_mix:
        warnings.append("static_mix is ignored: it belongs to train_type dynamic_mix.")
    return warnings
