"""The queue of work over processes: each piece once, nobody idle, one failure fails all."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from dataflex.run.messages import RemoteFailure
from dataflex.run.queue import share_out
from dataflex.run.ranks import Ranks
from gradstore.errors import BadInput, StoreIOError

PIECES = list(range(12))


def on_ranks(folder: Path, world: int, act: Callable[[Ranks], Any]) -> list[Any]:
    """Run `act` in that many processes of one gloo group; what each returns, as JSON has it."""
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group(
                    "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world
                )
                (folder / f"{rank}.json").write_text(json.dumps(act(Ranks(rank, world))))
                dist.destroy_process_group()
                code = 0
            except BaseException:  # of any kind: a child must never return into its parent's test
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


class Work:
    """Arrays that follow from the piece; a rank's log of what it did, took and was told of."""

    def __init__(self, ranks: Ranks, seconds: float = 0.0) -> None:
        self.ranks, self.seconds = ranks, seconds
        self.done: list[int] = []
        self.taken: list[tuple[int, int]] = []
        self.arrived: list[int] = []

    def __call__(self, piece: int) -> tuple[int, np.ndarray]:
        time.sleep(self.seconds)
        self.done.append(piece)
        return piece, np.full(300_000, piece, np.float32)

    def take(self, result: tuple[int, np.ndarray]) -> None:
        self.taken.append((result[0], int(result[1].sum())))

    def share(self, pieces: list[int] = PIECES) -> list[Any]:
        share_out(self.ranks, pieces, self, self.take, self.arrived.append)
        return [self.done, sorted(self.taken), sorted(self.arrived)]


def test_every_piece_is_done_once_and_taken_by_the_first_rank(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 3, lambda ranks: [Work(ranks).share(), Work(ranks).share()])
    for pass_ in zip(*found, strict=True):
        assert sorted(piece for done, _, _ in pass_ for piece in done) == PIECES
        assert pass_[0][1] == [[piece, 300_000 * piece] for piece in PIECES]
        assert pass_[0][2] == sorted(set(PIECES) - set(pass_[0][0])), "what others did is told of"
        assert [rank[1:] for rank in pass_[1:]] == [[[], []]] * 2


@pytest.mark.parametrize("slow", [0, 1])
def test_a_slow_rank_holds_the_others_up_by_one_piece_at_most(tmp_path: Path, slow: int) -> None:
    """In lock-step, each would do half."""
    (first, second) = on_ranks(
        tmp_path, 2, lambda ranks: Work(ranks, 0.5 if ranks.rank == slow else 0.01).share()
    )
    done = len((first, second)[slow][0])
    assert 1 <= done <= 2
    assert len(first[0]) + len(second[0]) == len(PIECES)


def test_a_result_that_is_taken_slowly_holds_nobody_up(tmp_path: Path) -> None:
    """A disk that is busy for a while: every piece is begun before the first result is written."""

    def act(ranks: Ranks) -> list[Any]:
        began, taken = [], []

        def work(piece: int) -> int:
            began.append(time.monotonic())  # of the machine: the same clock in every process
            time.sleep(0.05)
            return piece

        def take(piece: int) -> None:
            if not taken:
                time.sleep(1.5)
            taken.append((piece, time.monotonic()))

        share_out(ranks, list(range(7)), work, take, lambda _: None)
        return [began, taken]

    found = on_ranks(tmp_path, 3, act)
    taken = found[0][1]
    assert sorted(piece for piece, _ in taken) == list(range(7))
    assert [rank[1] for rank in found[1:]] == [[], []]
    assert max(at for began, _ in found for at in began) < taken[0][1]
    assert all(began for began, _ in found[1:])


def test_results_that_wait_for_a_slow_disk_are_no_more_than_the_ranks(tmp_path: Path) -> None:
    """Not all of a pass lies in the memory of rank 0: its disk sets the pace in the end."""

    def act(ranks: Ranks) -> list[Any]:
        made, waiting = [], []

        def work(piece: int) -> int:
            made.append(time.monotonic())
            return piece

        def take(piece: int) -> None:
            time.sleep(0.1)
            waiting.append(time.monotonic())

        share_out(ranks, list(range(14)), work, take, lambda _: None)
        return [made, waiting]

    found = on_ranks(tmp_path, 2, act)
    made, taken = sorted(found[0][0] + found[1][0]), found[0][1]
    # Two wait; one is being taken; each of two ranks, and the thread that answers, holds another.
    ahead = [sum(at < end for at in made) - number for number, end in enumerate(taken)]
    assert max(ahead) <= 2 + 1 + 2 + 1


def test_ctrl_c_leaves_no_result_of_the_first_rank_untaken(tmp_path: Path) -> None:
    def act(ranks: Ranks) -> list[int]:
        taken: list[int] = []

        def work(piece: int) -> int:
            if ranks.leads and len(taken) >= 2:
                raise KeyboardInterrupt
            return piece

        def take(piece: int) -> None:
            time.sleep(0.05)
            taken.append(piece)

        if ranks.leads:
            brought: list[int] = []

            def noted(piece: int) -> int:
                brought.append(work(piece))
                return piece

            with pytest.raises(KeyboardInterrupt):
                share_out(ranks, list(range(100)), noted, take, lambda _: None)
            assert set(brought) <= set(taken)
            return brought
        with pytest.raises(RuntimeError):  # torch's, of a peer that has gone
            share_out(ranks, list(range(100)), work, take, lambda _: None)
        return []

    def gone(ranks: Ranks) -> list[int]:
        found = act(ranks)
        (tmp_path / f"{ranks.rank}.json").write_text(json.dumps(found))
        os._exit(0)

    assert len(on_ranks(tmp_path, 2, gone)[0]) >= 2


def test_fewer_pieces_than_ranks_and_none_at_all_end(tmp_path: Path) -> None:
    found = on_ranks(tmp_path, 3, lambda ranks: [Work(ranks).share([5]), Work(ranks).share([])])
    assert [rank[1] for rank in found] == [[[], [], []]] * 3
    assert sorted(len(rank[0][0]) for rank in found) == [0, 0, 1]
    assert found[0][0][1] == [[5, 300_000 * 5]]


@pytest.mark.parametrize("failing", ["work of the first", "work of another", "taking"])
def test_a_failure_of_one_ends_all_with_its_message(tmp_path: Path, failing: str) -> None:
    def act(ranks: Ranks) -> list[Any]:
        work = Work(ranks, 0.02)

        def bad(piece: int) -> tuple[int, np.ndarray]:
            if failing == f"work of {'the first' if ranks.leads else 'another'}":
                raise BadInput(f"bad piece, rank {ranks.rank}")
            return work(piece)

        def take(result: tuple[int, np.ndarray]) -> None:
            if failing == "taking" and result[0] not in work.done:  # of the other rank
                raise StoreIOError("disk full")
            work.take(result)

        try:
            share_out(ranks, list(range(200)), bad, take, work.arrived.append)
        except (BadInput, StoreIOError, RemoteFailure) as error:
            return [type(error).__name__, error.exit_code, str(error), len(work.done)]
        return ["nothing was raised"]

    first, second = on_ranks(tmp_path, 2, act)
    message, code = {
        "taking": ("disk full", StoreIOError.exit_code),
        "work of the first": ("bad piece, rank 0", BadInput.exit_code),
        "work of another": ("bad piece, rank 1", BadInput.exit_code),
    }[failing]
    assert first[1] == second[1] == code
    assert message in first[2]
    assert message in second[2]
    assert first[3] + second[3] < 200, "nothing more is handed out"
    assert "RemoteFailure" in (first[0], second[0])
