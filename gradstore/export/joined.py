"""Gradient blocks of neighbouring parameters, handed on together.

A LoRA model has hundreds of small matrices, and a GPU is done with one of them before the next
kernel is launched. Joined to runs, a batch takes a few large launches.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from gradkernels import Feature
from torch import Tensor

from gradstore.capture.slots import ParameterSlot
from gradstore.export.features import FeatureMap

#: Parameters of a run, if there are so many of its kind in a row: of float32 16 MiB for 16 rows,
#: which a large GPU's second-level cache holds, and 256 MiB for a unit's 256. A constant: a run's
#: bounds, in which sums are added, may not depend on the rows.
RUN_PARAMETERS = 1 << 18


@dataclass(frozen=True)
class Run:
    """Neighbouring slots.

    Attributes:
        slots: whole ones, each beginning where that before it ends.
        feature: of their parameters together; None for the gradients themselves.
    """

    slots: tuple[ParameterSlot, ...]
    feature: Feature | None

    @property
    def start(self) -> int:
        """First index in the flat gradient."""
        return self.slots[0].start

    @property
    def stop(self) -> int:
        """Index behind the last."""
        return self.slots[-1].start + self.slots[-1].numel


def runs_of(
    slots: Sequence[ParameterSlot], features: FeatureMap, hooked: Container[ParameterSlot]
) -> list[Run]:
    """Cut a layout into runs, of one feature each.

    Args:
        slots: all of them, in order.
        features: of the slots.
        hooked: those whose blocks come layer by layer; another comes at the end, and a run with it
            would wait for it.
    """
    runs: list[list[ParameterSlot]] = []
    size, last = 0, None
    for slot in slots:
        small = slot in hooked and slot.numel < RUN_PARAMETERS
        alike = features.numbers(slot) if small else None
        if alike is None or alike != last or size >= RUN_PARAMETERS:
            runs.append([])
            size = 0
        runs[-1].append(slot)
        size, last = size + slot.numel, alike
    return [Run(tuple(run), features.join(run)) for run in runs]


@dataclass
class JoiningSink:
    """Takes a batch's blocks and hands on those of a run when the last of them is there.

    Of one that stays incomplete nothing is handed on: a capture delivers every slot.

    Args:
        runs: of the whole layout.
        take: called with a run and its gradients (b, stop - start) float32.
    """

    runs: Sequence[Run]
    take: Callable[[Run, Tensor], None]
    _waiting: dict[int, dict[ParameterSlot, Tensor]] = field(default_factory=dict)

    def __call__(self, slot: ParameterSlot, block: Tensor) -> None:
        """Take a slot's block (b, numel)."""
        run = self._run_of[slot]
        blocks = self._waiting.setdefault(run.start, {})
        blocks[slot] = block
        if len(blocks) == len(run.slots):
            del self._waiting[run.start]
            ordered = [blocks[slot] for slot in run.slots]
            self.take(run, torch.cat(ordered, dim=1) if len(ordered) > 1 else block)

    @cached_property
    def _run_of(self) -> dict[ParameterSlot, Run]:
        return {slot: run for run in self.runs for slot in run.slots}
