"""The values that a session hands to its trainer, before and after its steps are planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dataflex.config.keys import RunConfig
from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.data.rows import RunData
from dataflex.run.ranks import Ranks
from dataflex.run.schedule import Schedule


@dataclass(frozen=True)
class Job:
    """A run whose rows are known, and whose schedule is not.

    Attributes:
        config: the checked configuration.
        component: the preset, resolved.
        strategy: the component, built and complete, not started; of the trainer's own kind.
        data: rows, as processed.
        args: LlamaFactory's TrainingArguments.
        shape: of one optimizer step.
        ranks: this process among those of the run.
        tuned: LlamaFactory's FinetuningArguments; None without LlamaFactory.
    """

    config: RunConfig
    component: Component
    strategy: Any
    data: RunData
    args: Any
    shape: BatchShape
    ranks: Ranks
    tuned: Any = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        """The preset's name, for messages."""
        return self.component.name

    @property
    def params(self) -> Mapping[str, Any]:
        """The preset's parameters with `component_params` over them."""
        return self.component.params

    @property
    def train_step(self) -> int:
        """Optimizer steps asked for: `train_step`, else `max_steps`; 0 where neither is set."""
        return self.config.dataflex.train_step or max(0, int(self.args.max_steps))


@dataclass(frozen=True)
class Run(Job):
    """A planned run.

    Attributes:
        schedule: of the whole run.
        run_id: the same for a run and its resumes.
    """

    schedule: Schedule
    run_id: str
