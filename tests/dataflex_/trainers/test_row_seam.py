"""Intervals of rows, served without a Trainer: what a resume goes on with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.checkpoints.state import RunState
from dataflex.data.order import BatchShape
from dataflex.run.ranks import Ranks
from dataflex.run.schedule import Interval, Schedule
from dataflex.trainers.row_seam import RowSeam, logged_norms
from gradstore.errors import DamagedData


class Served(RowSeam):
    """Two warm-up steps, then updates of four; a step has three rows of the number of its start."""

    def __init__(self, rows: int = 100) -> None:
        self._interval: Interval | None = None
        self._rows = np.empty(0, dtype=np.int64)
        self._rate_sum, self._rate_steps = 0.0, 0
        self.train_dataset = list(range(rows))
        self.data_collator = list
        self.args: Any = SimpleNamespace(seed=5, process_index=0, dataloader_num_workers=0,
                                         dataloader_pin_memory=False)  # fmt: skip
        self.run: Any = SimpleNamespace(shape=BatchShape(3, 1, 1), schedule=Schedule(2, 4, 2, 10),
                                        ranks=Ranks(), tuned=None)  # fmt: skip
        self.lr_scheduler: Any = SimpleNamespace(get_last_lr=lambda: [0.25])
        self.asked: list[int] = []

    def rows_for(self, interval: Interval) -> Any:
        self.asked.append(interval.start)
        return np.arange(interval.start, interval.start + 3 * interval.steps)

    def serve(self, steps: range) -> list[list[int]]:
        batches = []
        for step in steps:
            self._enter(step)
            batches.append(next(self._batches))
            self._rate_sum, self._rate_steps = self._rate_sum + step, self._rate_steps + 1
        return batches


def resumed(earlier: Served, step: int) -> Served:
    later = Served()
    later.restore_more(RunState(step, "id", (2, 4, 2), "", more=earlier.more_state()))
    return later


@pytest.mark.parametrize("step", [1, 2, 3, 5, 6, 9])
def test_a_resume_serves_the_batches_that_would_have_come(step: int) -> None:
    whole = Served().serve(range(10))
    earlier = Served()
    assert earlier.serve(range(step)) == whole[:step]
    later = resumed(earlier, step)
    assert later.serve(range(step, 10)) == whole[step:]
    assert later.asked == [start for start in (2, 6) if start >= step], "not for a running interval"


def test_a_resume_keeps_the_mean_learning_rate_since_the_last_update() -> None:
    earlier = Served()
    earlier.serve(range(5))
    assert earlier._mean_rate() == pytest.approx((2 + 3 + 4) / 3)
    assert resumed(earlier, 5)._mean_rate() == pytest.approx(3)
    assert Served()._mean_rate() == 0.25, "before any step, the scheduler's"


def test_rows_that_do_not_exist_are_damage() -> None:
    earlier = Served()
    earlier.serve(range(5))
    later = Served(rows=4)
    with pytest.raises(DamagedData, match="names rows that do not exist"):
        later.restore_more(RunState(5, "id", (2, 4, 2), "", more=earlier.more_state()))


def test_a_strategy_is_told_the_last_finite_norms_that_were_logged() -> None:
    log = [{"grad_norm": float(norm)} for norm in range(12)]
    assert logged_norms(log) == tuple(range(2, 12))
    mixed: Any = [{"grad_norm": 3.0}, {"eval_loss": 1.0}, {"grad_norm": float("nan")}]
    assert logged_norms(mixed) == (3.0,)
    assert logged_norms([]) == ()
