"""The view that strategies have of a run: the whole of it, a boundary, a step's losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import RunData
from dataflex.run.ranks import Ranks
from gradstore.export.room import Room

if TYPE_CHECKING:
    from torch import nn

    from dataflex.config.keys import RunConfig
    from dataflex.run.board import Scoreboard
    from dataflex.run.log import Watch
    from gradstore.export.share import OptimizerStep


@dataclass(frozen=True)
class RunContext:
    """The facts that stay the same for a whole run.

    Attributes:
        config: the checked configuration.
        data: training rows and target sets.
        collate: rows -> padded batch with `labels` (b, t).
        model: the model in training, unwrapped.
        output_dir: the run's folder.
        run_id: the same after a resume.
        seed: the run's seed.
        autocast: dtype name of mixed precision, or "off".
        shows_progress: whether this process draws bars.
        ranks: this process among those of the run.
        board: losses of training rows, taken once per model state; None outside of training.
        step: rows and clipping of an optimizer step; None where nobody says.
        watch: who is told of the passes beside this process's own bars.
        room: for batches of exports, as far as memory has shown.
        whole_room: for those of passes that hold whole gradients, which take more.
    """

    config: RunConfig
    data: RunData
    collate: Callable[[list[Any]], Any]
    model: nn.Module
    output_dir: Path
    run_id: str
    seed: int
    autocast: str = "off"
    shows_progress: bool = True
    ranks: Ranks = field(default_factory=Ranks)
    board: Scoreboard | None = None
    step: OptimizerStep | None = None
    watch: Watch | None = None
    room: Room = field(default_factory=Room, compare=False, repr=False)
    whole_room: Room = field(default_factory=Room, compare=False, repr=False)


@dataclass(frozen=True)
class UpdateContext:
    """The facts of one boundary.

    Attributes:
        run: what stays the same.
        step: g, optimizer steps finished.
        update: c, 1-based count of updates in this stage; 0 for a warm-up.
        updates: T, updates a stage has.
        learning_rate: mean over the steps since the previous boundary.
        optimizer: the Trainer's, possibly accelerate's wrapper.
        pool: (m,) int64, rising positions of the training set that may be chosen from; None for
            all of them.
        grad_norms: of the steps that the Trainer logged last, before they were clipped.
    """

    run: RunContext
    step: int
    update: int
    updates: int
    learning_rate: float
    optimizer: Any
    pool: npt.NDArray[np.int64] | None = None
    grad_norms: tuple[float, ...] = ()

    @property
    def candidates(self) -> npt.NDArray[np.int64]:
        """(m,) int64, the pool's positions that have a target token."""
        usable = self.run.data.train.target_tokens > 0
        if self.pool is None:
            return np.flatnonzero(usable)
        return self.pool[usable[self.pool]]

    def among_candidates(self, usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return (n,) bool: `usable` rows that are candidates too."""
        allowed = np.zeros(len(usable), dtype=np.bool_)
        allowed[self.candidates] = True
        return allowed & usable


@dataclass(frozen=True)
class DomainLosses:
    """Training losses of one optimizer step by domain, over all ranks and micro-batches.

    Attributes:
        step: g, optimizer steps finished before it.
        loss_sums: (k,) float64, sum of token losses; 0 where the step had no row of the domain.
        tokens: (k,) float64, target tokens.
        rows: (k,) float64, samples.
    """

    step: int
    loss_sums: npt.NDArray[np.float64]
    tokens: npt.NDArray[np.float64]
    rows: npt.NDArray[np.float64]
