"""Training on domains in proportions that a mixer decides anew at every update."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dataflex.checkpoints.state import RunState
from dataflex.config.keys import RunConfig
from dataflex.data.mixture import (
    FIXED_RULES,
    Cursors,
    check_domains,
    domains_of,
    largest_remainder,
    mixers_answer,
    opening_proportions,
)
from dataflex.data.rows import Domains, RunData
from dataflex.run.schedule import EventKind, Interval, Schedule, mix_budget
from dataflex.trainers.loss_seam import LossSeam
from dataflex.trainers.row_seam import ServedSeam
from dataflex.trainers.telling import listed, told_by_domain
from dataflex.trainers.weights import SampleStats, losses_by_domain
from dataflex.weighters.base import LossContributor

_log = logging.getLogger(__name__)


class MixSeam(LossSeam, ServedSeam):
    """W steps at the opening proportions, then the mixer's answer every U steps."""

    #: The rows are permuted here: left alone they would come domain by domain.
    ordered = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self.cursors = Cursors(self.run.data, int(self.args.seed))
        if self.ranks.leads:
            for warning in _ignored(self.run.config):
                _log.warning("%s", warning)

    @classmethod
    def plan(
        cls,
        strategy: Any,  # noqa: ANN401
        config: RunConfig,
        data: RunData,
        global_batch: int,
        args: Any,  # noqa: ANN401
    ) -> Schedule:
        """W steps, then intervals of U without end; with `static_mix` one interval is the run."""
        check_domains(data)
        opening_proportions(config, data)
        ours = config.dataflex
        budget = mix_budget(
            train_step=_steps_asked(config, args),
            epochs=float(args.num_train_epochs),
            warmup_step=ours.warmup_step,
            update_step=ours.update_step,
            update_times=ours.update_times,
            static_mix=ours.static_mix,
            rows=len(data.train),
            global_batch=global_batch,
        )
        if ours.static_mix:
            return Schedule(max(0, budget), update_step=1, update_times=0, budget=budget)
        return Schedule(ours.warmup_step, ours.update_step, update_times=0, budget=budget)

    @property
    def domains(self) -> Domains:
        """Whose proportions are mixed."""
        return domains_of(self.run.data)

    # -- proportions to rows ----------------------------------------------------------------------

    def rows_for(self, interval: Interval, learning_rate: float) -> npt.NDArray[np.int64]:
        """The interval's rows: counts of the largest remainder, read on in each domain."""
        began = time.perf_counter()
        opens = interval.kind is EventKind.WARMUP
        if opens or self.run.config.dataflex.mixture_sample_rule in FIXED_RULES:
            proportions = opening_proportions(self.run.config, self.run.data)
        else:
            proportions = self._ask(interval, learning_rate)
        counts = largest_remainder(proportions, interval.steps * self.batch_shape.rows)
        rows = self.cursors.take(counts)
        generator = np.random.default_rng([int(self.args.seed), interval.start])
        self._record(interval, proportions, counts, time.perf_counter() - began)
        return generator.permutation(rows)

    def _ask(self, interval: Interval, learning_rate: float) -> npt.NDArray[np.float64]:
        """Ask on every rank, so that passes are shared; rank 0's answer is everyone's."""
        context = self.update_context(interval, learning_rate)
        answer = self.ranks.gather(lambda: self.run.strategy.mix(context))[0]
        return mixers_answer(answer, self.domains.names, self.run.name)

    def _record(
        self,
        interval: Interval,
        proportions: npt.NDArray[np.float64],
        counts: npt.NDArray[np.int64],
        pause: float,
    ) -> None:
        """One line on the screen, one in events.jsonl, numbers for the Trainer's log."""
        shares = self._by_domain(proportions)
        self.tell({**{f"mix/{name}": p for name, p in shares.items()}, "pause_seconds": pause})
        more = self._tell_by_domain()
        if not self.ranks.leads:
            return
        epochs = self._by_domain(self.cursors.epochs)
        verb = "opens with" if interval.kind is EventKind.WARMUP else "mixes"
        self.log_files.update(
            "mix",
            step=interval.start,
            component=self.run.name,
            told=f"{verb} {listed(shares, '.2f')} (epochs {listed(epochs, '.1f')})"
            + "".join(f"; {what} {listed(values, '.3g')}" for what, values in more.items()),
            proportions=shares,
            counts=self._by_domain(counts),
            epochs=epochs,
            pause_seconds=pause,
            **more,
        )

    def _tell_by_domain(self) -> dict[str, Any]:
        """What the mixer has to tell beside proportions: name -> domain -> value."""
        found = told_by_domain(self.run.strategy, self.domains.names)
        self.tell({f"{w}/{name}": v for w, each in found.items() for name, v in each.items()})
        return found

    def _by_domain(self, values: npt.NDArray[Any]) -> dict[str, Any]:
        return dict(zip(self.domains.names, values.tolist(), strict=True))

    # -- losses -----------------------------------------------------------------------------------

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """A mixer that weights the loss too, from step W on."""
        strategy = self.run.strategy
        weights = isinstance(strategy, LossContributor) and step >= self.schedule.warmup_step
        return (strategy,) if weights else ()

    def observes(self, step: int) -> bool:
        """Where the mixer learns from training losses."""
        return bool(getattr(self.run.strategy, "observes", False))

    def rows_of_step(self, step: int) -> list[npt.NDArray[np.int64]]:
        """Positions of this rank's micro-batches."""
        return self.served_rows(step)

    def after_step(self, seen: SampleStats, rows: npt.NDArray[np.int64] | None) -> None:
        """Hand a step's losses by domain, over all ranks, to a mixer that observes."""
        self._tell_by_domain()
        step = int(self.state.global_step)
        if not self.observes(step):
            return
        assert rows is not None
        self.run.strategy.observe(losses_by_domain(step, seen, rows, self.domains, self.ranks))

    # -- state ------------------------------------------------------------------------------------

    def more_state(self) -> Mapping[str, Any]:
        """How far each domain has been read."""
        return {**super().more_state(), "read": self.cursors.read}

    def restore_more(self, state: RunState) -> None:
        """Read on where the checkpoint stood."""
        super().restore_more(state)
        self.cursors.read = np.asarray(state.more["read"], dtype=np.int64)

    def settings(self) -> Mapping[str, Any]:
        """The rows of a domain and the opening mixture must agree, too."""
        ours = self.run.config.dataflex
        opening = ours.init_mixture_proportions
        return {
            **super().settings(),
            "static_mix": ours.static_mix,
            "mixture_sample_rule": ours.mixture_sample_rule or "mixture",
            "init_mixture_proportions": None if opening is None else list(opening),
            "rows of the domains": self._by_domain(self.domains.sizes),
        }


def _steps_asked(config: RunConfig, args: Any) -> int:  # noqa: ANN401 - TrainingArguments
    """`train_step`, or `max_steps` in its place; 0 where neither is given."""
    return config.dataflex.train_step or max(0, int(args.max_steps))


def _ignored(config: RunConfig) -> list[str]:
    """Keys the user wrote that have no say in this run."""
    ours, warnings = config.dataflex, []
    steps = ours.train_step > 0 or config.known.max_steps > 0
    by_updates = not steps and not ours.static_mix and ours.update_times >= 0
    if by_updates and config.known.num_train_epochs is not None:
        warnings.append(
            f"num_train_epochs is ignored: the run has warmup_step + update_step * update_times = "
            f"{ours.warmup_step + ours.update_step * ours.update_times} steps. "
            "Set update_times: -1 to train for epochs."
        )
    if ours.mixture_sample_rule in FIXED_RULES and ours.init_mixture_proportions is not None:
        warnings.append(
            f"init_mixture_proportions is ignored: mixture_sample_rule is "
            f"{ours.mixture_sample_rule!r}."
        )
    return warnings
