"""Filling a generation: computed units are written by a process that holds the store's lock.

Writing a unit is mostly waiting, for the disk or a server, so it can go on in threads of its own
while the next unit is computed. Few are on their way at a time; the failure of one ends the pass.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from gradstore.errors import BadInput, expect, expect_whole
from gradstore.export.units import UnitFeatures, check_bad_rows
from gradstore.format.layout import EMBEDDING, RowStatus
from gradstore.format.plans import UnitRange
from gradstore.store.generation import Generation
from gradstore.store.generation_writer import GenerationWriter

_log = logging.getLogger(__name__)

#: What a process that ends waits for its last units before it says so.
_SILENT_SECONDS = 1.0

#: Reasons by status.
_UNUSABLE = {
    "zero_norm": "with a gradient that is zero",
    "non_finite": "with a gradient that is not finite",
    "masked": "masked, without a target token",
    "too_long": "longer than the model's context",
    "forgotten": "removed on request",
}


@dataclass
class ExportSummary:
    """Summary of one pass over a data set."""

    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0
    status_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointExport:
    """The generations of one checkpoint, committed.

    Attributes:
        train: name of the generation of the training rows; "" where there are none.
        targets: one name per target set.
        target_rows: rows of all target sets.
        tokens: tokens that went through the model in this pass; 0 where everything was reused.
        seconds: duration of the passes.
    """

    train: str
    targets: tuple[str, ...]
    target_rows: int
    tokens: int
    seconds: float


class UnitSink:
    """Sink that writes computed units of one generation and stops where too many rows are bad.

    The rows of all units given count together, whichever process computed them, and so do those of
    an earlier, interrupted export and those that other workers have finished.

    As a context manager it leaves no unit on its way: on an error, or Ctrl-C, too, those that were
    given are written before the store is closed. A second Ctrl-C gives them up.
    """

    def __init__(
        self,
        writer: GenerationWriter,
        *,
        max_bad_fraction: float = 0.01,
        behind: int = 0,
        written: Callable[[UnitRange], None] = lambda unit: None,
    ) -> None:
        """Begin a pass; do not commit.

        Args:
            writer: from `StoreWriter.begin`.
            max_bad_fraction: share of non-finite rows above which `write` stops.
            behind: units, at most, that are being written when `write` returns, each in a thread;
                `settle` waits for them. With 1 they are written in the order they come.
            written: called with each unit once it survives a crash, in the thread that wrote it.
        """
        expect(hasattr(writer, "bad_counts"), "writer", writer, "what StoreWriter.begin returns")
        self.summary = ExportSummary()
        self._writer = writer
        self._limit = max_bad_fraction
        self._behind = expect_whole(behind, "behind", 0)
        self._written = written
        self._guard = threading.Lock()
        self._on_their_way: set[Future[None]] = set()
        self._failure: BaseException | None = None
        self._bad_before = writer.bad_counts["non_finite"]
        self._non_finite: list[int] = []
        self._what = EMBEDDING if writer.plan.record.feature == EMBEDDING else "gradient"
        self._began = time.perf_counter()

    def __enter__(self) -> UnitSink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self.settle()
            finally:  # others are on their way where one has failed
                wait(self._on_their_way)
            return
        if wait(self._on_their_way, timeout=_SILENT_SECONDS).not_done:
            _log.warning("writing what was computed before this ends; Ctrl-C gives it up")
        for each in wait(self._on_their_way).done:
            failure = each.exception()
            if failure is not None and failure is not error:
                _log.warning("a unit that was computed is not written: %s", failure)

    def claimed(self, elsewhere: Callable[[int], None] = lambda _: None) -> Iterator[UnitRange]:
        """Yield each unit that is to be computed here; see `GenerationWriter.claimed`.

        Before it waits for other workers it waits for its own units: one that can't be written is
        told at once, and is free for those others.
        """
        return self._writer.claimed(elsewhere, idle=self.settle)

    def check(self) -> None:
        """Stop where too many rows are bad; once nothing is pending, those of other workers too."""
        # Units on their way may be counted by the writer already, or not yet.
        counted = self._writer.bad_counts["non_finite"]
        check_bad_rows(
            max(counted, self._bad_before + len(self._non_finite)),
            sorted(self._non_finite),
            len(self._writer.plan.rows),
            self._limit,
            self._what,
        )

    def write(self, done: UnitFeatures) -> None:
        """Publish one pending unit; when this returns all but the last `behind` survive a crash.

        Args:
            done: not to be changed from now on.

        Raises:
            BadInput: more than `max_bad_fraction` of the rows are non-finite, or the unit is not
                pending.
            StoreError: this unit, or one that was given before, could not be written.
        """
        bad = done.unit.start + np.flatnonzero(done.status == RowStatus.NON_FINITE)
        self._non_finite += bad.tolist()
        self.check()
        if self._behind:
            self._wait(most=self._behind - 1)
            self._start(done)
        else:
            self._publish(done)
        summary = self.summary
        summary.rows += len(done.status)
        summary.tokens += done.model_tokens
        for status, count in zip(*np.unique(done.status, return_counts=True), strict=True):
            name = RowStatus(int(status)).name.lower()
            summary.status_counts[name] = summary.status_counts.get(name, 0) + int(count)
        summary.seconds = time.perf_counter() - self._began

    def look(self) -> None:
        """Raise what has come in the way of a unit that was given; do not wait.

        May be called from another thread than `write`.
        """
        with self._guard:
            done = {each for each in self._on_their_way if each.done()}
            self._on_their_way -= done
            for each in done:
                self._failure = self._failure or each.exception()
        if self._failure is not None:
            raise self._failure

    def settle(self) -> None:
        """Wait until every unit that was given survives a crash.

        Raises:
            BadInput: more than `max_bad_fraction` of the rows are non-finite, with those of other
                workers.
            StoreError: one could not be written.
        """
        self._wait(most=0)
        self.check()
        self.summary.seconds = time.perf_counter() - self._began

    def _wait(self, most: int) -> None:
        """Wait until that many units at most are on their way, whichever are done first."""
        self.look()
        while len(self._on_their_way) > most:
            wait(self._on_their_way, return_when=FIRST_COMPLETED)
            self.look()

    def _start(self, done: UnitFeatures) -> None:
        """Write a unit in a thread, which a process that ends does not wait for."""
        future: Future[None] = Future()

        def run() -> None:
            try:
                self._publish(done)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)

        with self._guard:
            self._on_their_way.add(future)
        threading.Thread(target=run, name=f"unit {done.unit.index}", daemon=True).start()

    def _publish(self, done: UnitFeatures) -> None:
        self._writer.write_unit(
            done.unit.index, done.features, done.norm, done.status, done.tokens, done.loss
        )
        self._written(done.unit)


def check_usable(generation: Generation) -> None:
    """Refuse a committed set of rows that says nothing.

    Raises:
        BadInput: none of its rows is usable; counts the reasons.
    """
    if not generation.usable.any():
        name = f"target set {generation.set!r}" if generation.set else "the training set"
        counts = generation.status_counts()
        reasons = [f"{counts[status]:,} {why}" for status, why in _UNUSABLE.items()
                   if counts.get(status)]  # fmt: skip
        raise BadInput(
            f"{name} has no usable row among its {generation.rows:,}: "
            f"{', '.join(reasons)}. Give it rows that the model can learn from."
        )


def fill(
    writer: GenerationWriter,
    compute: Callable[[UnitRange], UnitFeatures],
    *,
    max_bad_fraction: float = 0.01,
    behind: int = 0,
) -> ExportSummary:
    """Compute and write the units of a generation that are not done yet; does not commit.

    A worker among others computes those that it is handed, and returns when all are done.

    Args:
        writer: from `StoreWriter.begin` or `SpaceWriter.begin`.
        compute: unit -> its features, such as
            `partial(compute_unit, model, batches, recipe)` or
            `partial(compute_embedding_unit, embed, batches, dim=writer.plan.dim)`.
        max_bad_fraction: share of non-finite rows above which it stops.
        behind: units, at most, that are written while the next is computed, in a thread each; then
            `compute` has to give other arrays every time. 1 keeps up with any model; where units
            come as fast as a disk takes them, more let their waiting for it overlap.

    Raises:
        BadInput: more than `max_bad_fraction` of the rows are non-finite.
        StoreError: a unit could not be written.
    """
    with UnitSink(writer, max_bad_fraction=max_bad_fraction, behind=behind) as sink:
        for unit in sink.claimed():
            sink.write(compute(unit))
    return sink.summary
