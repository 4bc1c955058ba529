"""Training on LlamaFactory's own data, in its own order, with weighted samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dataflex.config import RunConfig
from dataflex.data import RunData
from dataflex.schedule import Schedule
from dataflex.trainers.losses import LossSeam
from dataflex.weighters.base import LossContributor
from gradstore.errors import BadInput


class WeightSeam(LossSeam):
    """The plain loss for W steps, then the weighter's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the Trainer's own
        super().__init__(*args, **kwargs)
        if (steps := self.run.config.dataflex.train_step) > 0:
            self.args.max_steps = steps

    @classmethod
    def plan(
        cls,
        strategy: Any,  # noqa: ANN401
        config: RunConfig,
        data: RunData,
        global_batch: int,
        args: Any,  # noqa: ANN401
    ) -> Schedule:
        """W alone counts: the budget is LlamaFactory's own, or `train_step`."""
        if (warmup := config.dataflex.warmup_step) < 0:
            raise BadInput(f"warmup_step is {warmup}; it must be 0 or more.")
        return Schedule(warmup, update_step=1, update_times=0, budget=warmup + 1)

    def contributors(self, step: int) -> Sequence[LossContributor]:
        """The weighter, from step W on."""
        return () if step < self.schedule.warmup_step else (self.run.strategy,)
