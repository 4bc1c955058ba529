"""What a selector is, and what it may look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from dataflex.data import RunData

if TYPE_CHECKING:
    from torch import nn

    from dataflex.config import RunConfig


@dataclass(frozen=True)
class Selection:
    """A selector's answer.

    Attributes:
        indices: (m,) int64, positions in the training set, distinct unless rows ran short.
        scores: (m,) in the order of `indices`, or None where the strategy has no score.
        target_rows: target rows looked at.
        tokens: tokens of the passes that were made.
        export_seconds: time in forward and backward passes.
        score_seconds: time in turning their results into scores.
        select_seconds: time in choosing rows from the scores.
        skipped: rows that could not be scored, by status.
        manifest: what the scores depend on, for `selections/step_<g>.json`.
    """

    indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.floating[Any]] | None = None
    target_rows: int = 0
    tokens: int = 0
    export_seconds: float = 0.0
    score_seconds: float = 0.0
    select_seconds: float = 0.0
    skipped: Mapping[str, int] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunContext:
    """What stays the same for a whole run.

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


@dataclass(frozen=True)
class SelectContext:
    """What is true at one boundary.

    Attributes:
        run: what stays the same.
        step: g, optimizer steps finished.
        update: c, 1-based count of updates in this stage.
        updates: T, updates a stage has.
        learning_rate: mean over the steps since the previous boundary.
        optimizer: the Trainer's, possibly accelerate's wrapper.
    """

    run: RunContext
    step: int
    update: int
    updates: int
    learning_rate: float
    optimizer: Any


class Selector:
    """Base of all selectors; a user's own class may subclass it or just look like it.

    The constructor's keyword parameters are the accepted `component_params`.
    """

    #: Works on rows one by one: packing and streaming are refused.
    needs_single_rows: ClassVar[bool] = True
    #: Takes LoRA gradients.
    needs_lora: ClassVar[bool] = False
    #: Needs target rows.
    needs_targets: ClassVar[bool] = False
    #: Reads the optimizer's Adam moments; may depend on the parameters.
    needs_moments: bool = False

    def start(self, run: RunContext) -> None:
        """Called once before the first step; the place for refusals that need the model."""

    def finish(self) -> None:
        """Called once after the last step, also when training fails."""

    def select(self, count: int, context: SelectContext) -> Selection:
        """Choose `count` rows for the next interval."""
        raise TypeError(f"{type(self).__name__} does not implement select(count, context)")

    def state(self) -> dict[str, Any]:
        """JSON values that a checkpoint keeps; restored by `restore`."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
