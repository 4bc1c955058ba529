"""Training on domains in proportions that a mixer decides at every update."""

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
from dataflex.data.rows import Domains
from dataflex.run.schedule import EventKind, Interval, Schedule, mix_budget
from dataflex.trainers.job import Job, Run
from dataflex.trainers.loss_seam import LossSeam
from dataflex.trainers.metrics import ByDomain, domain_metrics, domains_summary, flat, largest
from dataflex.trainers.row_seam import RowSeam
from dataflex.trainers.weights import SampleStats, losses_by_domain
from dataflex.weighters.base import LossContributor

_log = logging.getLogger(__name__)


class MixSeam(LossSeam, RowSeam):
    """W steps at the opening proportions, then the mixer's answer every U steps."""

    #: The rows are permuted here: left alone they would come domain by domain.
    ordered = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        self.cursors = Cursors(self.run.data, int(self.args.seed))
        if self.run.ranks.leads:
            for warning in _ignored(self.run.config):
                _log.warning("%s", warning)

    @classmethod
    def plan(cls, job: Job) -> Schedule:
        """Plan W steps, then intervals of U without end; with `static_mix` a single interval."""
        check_domains(job.data)
        opening_proportions(job.config, job.data)
        ours = job.config.dataflex
        budget = mix_budget(
            train_step=job.train_step,
            epochs=float(job.args.num_train_epochs),
            warmup_step=ours.warmup_step,
            update_step=ours.update_step,
            update_times=ours.update_times,
            static_mix=ours.static_mix,
            rows=len(job.data.train),
            global_batch=job.shape.rows,
        )
        if ours.static_mix:
            return Schedule(max(0, budget), update_step=1, update_times=0, budget=budget)
        return Schedule(ours.warmup_step, ours.update_step, update_times=0, budget=budget)

    @property
    def domains(self) -> Domains:
        """The domains that are mixed."""
        return domains_of(self.run.data)

    # -- proportions to rows ----------------------------------------------------------------------

    def rows_for(self, interval: Interval) -> npt.NDArray[np.int64]:
        """Take counts of the largest remainder, read on in each domain."""
        began = time.perf_counter()
        opens = interval.kind is EventKind.WARMUP
        if opens or self.run.config.dataflex.mixture_sample_rule in FIXED_RULES:
            proportions = opening_proportions(self.run.config, self.run.data)
        else:
            proportions = self._ask(interval)
        counts = largest_remainder(proportions, interval.steps * self.run.shape.rows)
        rows = self.cursors.take(counts)
        generator = np.random.default_rng([int(self.args.seed), interval.start])
        self._record(interval, proportions, counts, time.perf_counter() - began)
        return generator.permutation(rows)

    def _ask(self, interval: Interval) -> npt.NDArray[np.float64]:
        """Ask on every rank, so that passes are shared; rank 0's answer is everyone's."""
        context = self.update_context(interval)
        answer = self.run.ranks.gather(lambda: self.run.strategy.mix(context))[0]
        return mixers_answer(answer, self.domains.names, self.run.name)

    def _record(
        self,
        interval: Interval,
        proportions: npt.NDArray[np.float64],
        counts: npt.NDArray[np.int64],
        pause: float,
    ) -> None:
        """Log one line on the screen, one in events.jsonl, metrics for the Trainer's log."""
        shares = self._by_domain(proportions)
        mixture = {f"mix/{name}": share for name, share in shares.items()}
        self.add_to_log({**mixture, "pause_seconds": pause})
        more = self._log_by_domain()
        if not self.run.ranks.leads:
            return
        epochs = self._by_domain(self.cursors.epochs)
        verb = "opens with" if interval.kind is EventKind.WARMUP else "mixes"
        self.log_files.update(
            "mix",
            step=interval.start,
            component=self.run.name,
            summary=f"{verb} {largest(shares, '.2f')} (epochs {largest(epochs, '.1f')})"
            + domains_summary(more),
            proportions=shares,
            counts=self._by_domain(counts),
            epochs=epochs,
            pause_seconds=pause,
            **more,
        )

    def _log_by_domain(self) -> ByDomain:
        """Log the mixer's numbers beside proportions."""
        found = domain_metrics([self.run.strategy], self.domains.names)
        self.add_to_log(flat(found))
        return found

    def _by_domain(self, values: npt.NDArray[Any]) -> dict[str, Any]:
        return dict(zip(self.domains.names, values.tolist(), strict=True))

    # -- losses -----------------------------------------------------------------------------------

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """List the mixer if it weights the loss too, from step W on."""
        strategy = self.run.strategy
        weights = isinstance(strategy, LossContributor) and step >= self.run.schedule.warmup_step
        return (strategy,) if weights else ()

    def observes(self, step: int) -> bool:
        """Return true where the mixer learns from training losses."""
        return bool(self.run.strategy.observes)

    def rows_of_step(self, step: int) -> list[npt.NDArray[np.int64]]:
        """Return the positions of this rank's micro-batches."""
        return self.served_rows(step)

    def after_step(self, seen: SampleStats, rows: npt.NDArray[np.int64] | None) -> None:
        """Hand a step's losses by domain, over all ranks, to a mixer that observes."""
        self._log_by_domain()
        step = int(self.state.global_step)
        if not self.observes(step):
            return
        assert rows is not None
        self.run.strategy.observe(losses_by_domain(step, seen, rows, self.domains, self.run.ranks))

    # -- state ------------------------------------------------------------------------------------

    def more_state(self) -> Mapping[str, Any]:
        """Keep the positions read up to in each domain."""
        return {**super().more_state(), "read": self.cursors.read}

    def restore_more(self, state: RunState) -> None:
        """Read on where the checkpoint stood."""
        super().restore_more(state)
        self.cursors.read = np.asarray(state.more["read"], dtype=np.int64)

    @classmethod
    def settings(cls, run: Run) -> Mapping[str, Any]:
        """Add the rows of a domain and the opening mixture, which must agree too."""
        ours, domains = run.config.dataflex, domains_of(run.data)
        opening = ours.init_mixture_proportions
        return {
            **super().settings(run),
            "static_mix": ours.static_mix,
            "mixture_sample_rule": ours.mixture_sample_rule,
            "init_mixture_proportions": None if opening is None else list(opening),
            "rows of the domains": dict(zip(domains.names, domains.sizes.tolist(), strict=True)),
        }


def _ignored(config: RunConfig) -> list[str]:
    """List keys that have no effect in this run, one sentence each."""
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
