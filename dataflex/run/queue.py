"""A queue of work over a run's processes: whoever is free takes the next piece.

No rank waits for another while pieces remain, however unequal pieces or machines are. Rank 0 hands
them out in a thread beside its own work and over a gloo group of its own: what is on the way there
never meets a collective of training. It takes the results in another thread, so that a disk that is
slow for a while holds nobody up. Where it stays slower than all ranks together, they wait for it:
about as many results as there are ranks lie in memory, and no more.
"""

from __future__ import annotations

import pickle
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from dataflex.run.messages import explain
from dataflex.run.ranks import Ranks
from gradstore.errors import StoreError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Piece = TypeVar("Piece")
Result = TypeVar("Result")

#: A piece may take long; of ranks that have died, torchrun ends the others.
_PATIENCE = timedelta(days=365)
#: Seconds between two looks at what has arrived, once nothing is left to hand out.
_LOOK_SECONDS = 0.2

_NOTHING_LEFT = -1


def share_out(
    ranks: Ranks,
    pieces: Sequence[Piece],
    work: Callable[[Piece], Result],
    take: Callable[[Result], None],
    arrived: Callable[[Piece], None],
) -> None:
    """Do every piece once, on whichever rank is free; collective.

    Args:
        ranks: this process among those of the run; more than one.
        pieces: the same on every rank; handed out in their order.
        work: piece -> result, which travels pickled; the same on whatever rank.
        take: called on rank 0 for every result, one at a time, in the order they come, in a thread
            of its own.
        arrived: called on rank 0, in its main thread, for every piece that another rank has done.

    Raises:
        StoreError: on every rank, whatever failed on one; nothing is handed out after that.
    """
    if not pieces:
        return
    failed: BaseException | None = None
    desk = _Desk(ranks.world, pieces, take) if ranks.leads else None
    group = _group()
    if desk is not None:
        desk.open(group)
    try:
        if desk is not None:
            desk.work_too(work, arrived)
        else:
            _work_for(group, pieces, work)
    except BaseException as error:  # Ctrl-C too: results that were brought are not given up
        if not isinstance(error, StoreError | OSError) or explain(error) is None:
            if desk is not None:
                desk.leave()
            raise
        failed = error
    if desk is not None:
        failed = desk.closed(arrived) or failed

    def end() -> None:
        if failed is not None:
            raise failed

    ranks.gather(end)


def _work_for(
    group: ProcessGroup, pieces: Sequence[Piece], work: Callable[[Piece], Result]
) -> None:
    """Ask rank 0 for pieces, and send it their results, until nothing is left."""
    done: Any = None
    while True:
        _send(group, 0, done)
        at = _receive(group, 0)[1]
        if at == _NOTHING_LEFT:
            return
        try:
            done = (at, work(pieces[at]))
        except (StoreError, OSError):
            _send(group, 0, _NOTHING_LEFT)
            _receive(group, 0)
            raise


class _Desk(Generic[Piece, Result]):
    """Rank 0's side: hands pieces out to all ranks, itself included, and takes results."""

    def __init__(self, world: int, pieces: Sequence[Piece], take: Callable[[Result], None]) -> None:
        self._asking = world - 1
        self._pieces, self._take = pieces, take
        self._left: Iterator[int] = iter(range(len(pieces)))
        self._lock = threading.Lock()
        self._stopped = False
        self._failed: BaseException | None = None
        # The piece of another rank, and the result; None once no more will come.
        self._brought: queue.Queue[tuple[int | None, Result] | None] = queue.Queue(world)
        self._done: list[int] = []

    def open(self, group: ProcessGroup) -> None:
        """Answer the other ranks from now on."""
        self._answering = threading.Thread(
            target=self._answer, args=(group,), name="work queue", daemon=True
        )
        self._taking = threading.Thread(target=self._take_all, name="work results", daemon=True)
        self._answering.start()
        self._taking.start()

    def work_too(self, work: Callable[[Piece], Result], arrived: Callable[[Piece], None]) -> None:
        """Do pieces in this thread until nothing is left to hand out."""
        while (at := self._next()) != _NOTHING_LEFT:
            self._brought.put((None, work(self._pieces[at])))
            self._tell(arrived)

    def stop(self) -> None:
        """Hand out nothing more; what is being done elsewhere still arrives."""
        with self._lock:
            self._stopped = True

    def leave(self) -> None:
        """Take what was brought, and wait for no rank: they end with this one."""
        self.stop()
        self._brought.put(None)
        self._taking.join()

    def closed(self, arrived: Callable[[Piece], None]) -> BaseException | None:
        """Wait until no rank works any more; return why taking a result failed, if it did."""
        self.stop()
        self._await(self._answering, arrived)
        self._brought.put(None)
        self._await(self._taking, arrived)
        self._tell(arrived)
        return self._failed

    def _await(self, thread: threading.Thread, arrived: Callable[[Piece], None]) -> None:
        while thread.is_alive():
            thread.join(_LOOK_SECONDS)
            self._tell(arrived)

    def _next(self) -> int:
        with self._lock:
            return _NOTHING_LEFT if self._stopped else next(self._left, _NOTHING_LEFT)

    def _tell(self, arrived: Callable[[Piece], None]) -> None:
        while self._done:
            arrived(self._pieces[self._done.pop(0)])

    def _answer(self, group: ProcessGroup) -> None:
        """Answer every message with the next piece first, then pass on what it brought."""
        try:
            while self._asking:
                sender, brought = _receive(group, None)
                if brought == _NOTHING_LEFT:  # it failed
                    self.stop()
                at = self._next()
                _send(group, sender, at)
                if at == _NOTHING_LEFT:
                    self._asking -= 1
                if isinstance(brought, tuple):
                    self._brought.put(brought)
        except BaseException as error:  # of any kind: the main thread raises it
            self._fail(error)
            self._dismiss(group)

    def _take_all(self) -> None:
        """Take what is brought; where that failed nothing more, but nobody waits to bring it."""
        takes = True
        while (brought := self._brought.get()) is not None:
            if not takes:
                continue
            at, result = brought
            try:
                self._take(result)
            except BaseException as error:  # of any kind: the main thread raises it
                takes = False
                self._fail(error)
                continue
            if at is not None:
                self._done.append(at)

    def _fail(self, error: BaseException) -> None:
        self._failed = self._failed or error
        self.stop()

    def _dismiss(self, group: ProcessGroup) -> None:
        """Tell all ranks that nothing is left; what they bring is lost."""
        try:
            while self._asking:
                _send(group, _receive(group, None)[0], _NOTHING_LEFT)
                self._asking -= 1
        except RuntimeError:  # a rank that is gone asks no more
            return


def _send(group: ProcessGroup, to: int, what: Any) -> None:  # noqa: ANN401 - whatever is done
    import torch
    import torch.distributed as dist

    data = torch.from_numpy(np.frombuffer(bytearray(pickle.dumps(what)), np.uint8))
    dist.send(torch.tensor([data.numel()]), to, group)
    dist.send(data, to, group)


def _receive(group: ProcessGroup, sender: int | None) -> tuple[int, Any]:
    """Wait for a message of one rank, or of any; return whose it is, and the message."""
    import torch
    import torch.distributed as dist

    size = torch.zeros(1, dtype=torch.int64)
    sender = dist.recv(size, sender, group)
    data = torch.empty(int(size), dtype=torch.uint8)
    dist.recv(data, sender, group)
    return sender, pickle.loads(data.numpy().tobytes())


_made: tuple[Any, ProcessGroup] | None = None


def _group() -> ProcessGroup:
    """Return the group of all ranks for messages between two; made once, collectively."""
    global _made
    import torch.distributed as dist

    if _made is None or _made[0] is not dist.group.WORLD:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        _made = dist.group.WORLD, group
    return _made[1]
