"""Training on LlamaFactory's own data, in its own order, with weighted samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from dataflex.data.order import BatchShape
from dataflex.run.schedule import Schedule
from dataflex.trainers.job import Job
from dataflex.trainers.loss_seam import LossSeam
from dataflex.weighters.base import LossContributor
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)


class WeightSeam(LossSeam):
    """The plain loss for W steps, then the weighter's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        if (steps := self.run.config.dataflex.train_step) > 0:
            self.args.max_steps = steps

    @classmethod
    def plan(cls, job: Job) -> Schedule:
        """Plan the plain loss before step W, and the budget that LlamaFactory would train for."""
        ours, args = job.config.dataflex, job.args
        if args.n_gpu > 1:
            raise BadInput(
                f"{args.n_gpu} GPUs in one process: weights need a process for each. Start with "
                "dataflex-cli train, which launches them."
            )
        if warning := weighted_alone(job.strategy, job.shape):
            _log.warning("%s", warning)
        epochs = math.ceil(args.num_train_epochs * math.ceil(len(job.data.train) / job.shape.rows))
        budget = job.train_step or epochs
        return Schedule(ours.warmup_step, update_step=1, update_times=0, budget=budget)

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """List the weighter, from step W on."""
        return () if step < self.run.schedule.warmup_step else (self.run.strategy,)


def weighted_alone(contributor: LossContributor, shape: BatchShape) -> str | None:
    """Warn where a contributor sees one sample at a time, whose weight then cancels out.

    Args:
        contributor: the strategy that weights.
        shape: of one optimizer step.

    Returns:
        The warning, or None.
    """
    micro = contributor.scope == "micro"
    together = shape.rows // shape.accumulation if micro else shape.rows
    if not contributor.relative or together > 1:
        return None
    more = "" if micro else " or gradient_accumulation_steps"
    return (
        "one sample is weighted at a time, so its weight has no effect: raise "
        f"per_device_train_batch_size{more}"
    )
