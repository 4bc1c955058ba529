"""From a list of rows to the micro-batches of each step and rank: a pure function of its arguments.

The Trainer's own loader fetches ahead and would ask for a selection a step early, so an interval
has a plain DataLoader of its own, with a generator of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class BatchShape:
    """How one optimizer step is cut up.

    Attributes:
        per_device: rows of one micro-batch on one rank.
        accumulation: micro-batches of a step.
        world: ranks.
    """

    per_device: int
    accumulation: int
    world: int

    @classmethod
    def of(cls, args: Any) -> BatchShape:  # noqa: ANN401 - TrainingArguments
        """Read the shape from transformers' TrainingArguments."""
        return cls(
            args.per_device_train_batch_size * max(1, args.n_gpu),
            args.gradient_accumulation_steps,
            args.world_size,
        )

    @property
    def rows(self) -> int:
        """B, rows of one optimizer step over all ranks."""
        return self.per_device * self.accumulation * self.world


@dataclass(frozen=True)
class RowOrder:
    """The order in which an interval's rows are trained on.

    Attributes:
        rows: (k,) positions in the training set, k >= 1.
        seed: of the shuffle; None keeps the given order.
    """

    rows: npt.NDArray[np.int64]
    seed: tuple[int, ...] | None

    def window(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """`count` rows from position `first`; past the end the rows are read again, reshuffled."""
        found, at = [], first
        while at < first + count:
            lap, offset = divmod(at, len(self.rows))
            take = min(len(self.rows) - offset, first + count - at)
            found.append(self._lap(lap)[offset : offset + take])
            at += take
        return np.concatenate(found)

    def micro_batches(self, step: int, rank: int, shape: BatchShape) -> list[list[int]]:
        """The micro-batches of one rank in step `step` of the interval (0-based)."""
        window = self.window(step * shape.rows, shape.rows)
        grid = window.reshape(shape.accumulation, shape.world, shape.per_device)
        return [micro.tolist() for micro in grid[:, rank]]

    def _lap(self, lap: int) -> npt.NDArray[np.int64]:
        if self.seed is None:
            return self.rows
        return np.random.default_rng([*self.seed, lap]).permutation(self.rows)


def loader(
    dataset: Sequence[Any],
    order: RowOrder,
    steps: range,
    rank: int,
    shape: BatchShape,
    collate: Callable[[list[Any]], Any],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """Collated micro-batches of one rank for `steps` of an interval, in order."""
    import torch
    from torch.utils.data import DataLoader

    batches = [micro for step in steps for micro in order.micro_batches(step, rank, shape)]
    return iter(
        DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),
        )
    )
