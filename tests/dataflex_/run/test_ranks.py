"""Work over several processes: shared out whole, joined in order, failing everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dataflex.run.messages import Failure, RemoteFailure
from dataflex.run.ranks import Ranks
from gradstore.errors import BadInput, ProvenanceMismatch


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the second of two processes sends; fill it."""
    sent: list[Any] = []

    def all_gather(answers: list[Any], own: Any) -> None:
        answers[:] = [own, *sent]

    monkeypatch.setattr("torch.distributed.all_gather_object", all_gather)
    return sent


FIRST = Ranks(rank=0, world=2)


def test_every_item_of_work_is_done_by_one_rank() -> None:
    work = list(range(7))
    shares = [Ranks(rank, 3).share(work) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == work
    assert shares[1] == [1, 4]


def test_results_come_in_the_order_of_the_ranks(other: list[Any]) -> None:
    other.append("second")
    assert FIRST.gather(lambda: "first") == ["first", "second"]


def test_sums_are_sums_over_ranks(other: list[Any]) -> None:
    other.append(np.array([10.0, 20.0]))
    assert FIRST.summed(np.array([1.0, 2.0])).tolist() == [11.0, 22.0]


def test_vectors_of_different_lengths_are_joined(other: list[Any]) -> None:
    other.append(np.array([3.0]))
    assert FIRST.concatenated(np.array([1.0, 2.0])).tolist() == [1.0, 2.0, 3.0]


def test_one_rank_decides_for_all(other: list[Any]) -> None:
    other.append(None)
    assert FIRST.decide(lambda: "chosen") == "chosen"


def test_a_failure_of_another_rank_fails_here_with_its_code(other: list[Any]) -> None:
    other.append(Failure(3, "other features"))
    with pytest.raises(RemoteFailure, match="other features") as caught:
        FIRST.gather(lambda: "fine")
    assert caught.value.exit_code == 3


def test_an_own_failure_is_sent_and_raised(other: list[Any]) -> None:
    other.append("fine")

    def fail() -> None:
        raise ProvenanceMismatch("not comparable")

    with pytest.raises(ProvenanceMismatch, match="not comparable"):
        FIRST.gather(fail)


def test_a_single_process_talks_to_nobody(other: list[Any]) -> None:
    other.append("not asked")
    alone = Ranks()
    assert alone.gather(lambda: 1) == [1]
    assert alone.share([1, 2]) == [1, 2]
    assert alone.summed(np.array([1.0])).tolist() == [1.0]

    def fail() -> None:
        raise BadInput("wrong")

    with pytest.raises(BadInput, match="wrong"):
        alone.gather(fail)
