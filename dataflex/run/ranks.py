"""Collective operations of a run's processes: share work, agree on answers, fail as one.

Every method is collective: each rank must call it, in the same order. Alone (world 1) nothing is
communicated. A failure with a message of one line (`messages.explain`) is raised on all ranks, so
that none waits for a dead one; any other ends its process, and torchrun ends the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from dataflex.run.messages import Failure, RemoteFailure, explain
from gradstore.errors import StoreError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One process among `world`.

    Attributes:
        rank: this process, 0-based.
        world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """True for the process that decides, writes and logs."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """Return this rank's part of a list of work items: every `world`-th item."""
        return work[self.rank :: self.world]

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; every rank gets all results, in the order of the ranks.

        Raises:
            StoreError: `work` failed on some rank; the first failure, on every rank.
        """
        if self.world == 1:
            return [work()]
        import torch.distributed as dist

        own: BaseException | None = None
        answer: Any = None
        try:
            answer = work()
        except (StoreError, OSError) as error:
            failure = explain(error)
            if failure is None:
                raise
            own, answer = error, failure
        answers: list[Any] = [None] * self.world
        dist.all_gather_object(answers, answer)
        failed = next((a for a in answers if isinstance(a, Failure)), None)
        if failed is not None:
            raise own or RemoteFailure(failed)
        return answers

    def decide(self, choose: Callable[[], T]) -> T:
        """Run `choose` on rank 0 alone; every rank gets its answer, or its failure."""
        answers: list[T] = self.gather(choose if self.leads else _nothing)
        return answers[0]

    def concatenated(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Concatenate the float64 vectors of all ranks; they may differ in length."""
        if self.world == 1:
            return values
        return np.concatenate(self.gather(lambda: values))

    def summed(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum arrays of one shape element-wise over ranks; the same bits on every rank."""
        if self.world == 1:
            return values
        return np.asarray(np.sum(self.gather(lambda: values), axis=0), dtype=np.float64)


def _nothing() -> Any:  # noqa: ANN401 - stands in for a result that is not asked for
    return None
