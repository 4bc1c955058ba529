"""Writing one generation: finish its pending units in any order, then commit it whole."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import BadInput, DamagedData, DamagedFile, StoreBusy
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    COMMITS,
    METADATA,
    SCHEMA_VERSION,
    RowStatus,
    commit_path,
    read_root,
    root_json,
    unit_path,
)
from gradstore.format.plans import Plan, UnitRange
from gradstore.storage.local import StoreFiles, parent_of
from gradstore.store.documents import check_beside_plan, check_committed_plan
from gradstore.store.encoding import encoded_unit
from gradstore.store.generation import committed_records
from gradstore.store.own_units import Done, OwnUnits, Units
from gradstore.store.reader import Store
from gradstore.store.shared_units import SharedUnits
from gradstore.store.unit_files import check_unit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from gradstore.storage.leases import Leases


class GenerationWriter:
    """Writer of one planned generation, made by `StoreWriter.begin`.

    For use from one thread, but for `write_unit` and `copy_unit`: several may call them at once,
    each with another unit, so that their waiting for the disk overlaps.

    Attributes:
        plan: what will be written.
        pending: units that are not finished, in order; empty when all that is left is `commit`.
    """

    def __init__(
        self,
        files: StoreFiles,
        plan: Plan,
        plan_sha256: str,
        view: Callable[[], Store],
        *,
        leases: Leases | None = None,
        committed: Commit | None = None,
    ) -> None:
        """Find the units that earlier, interrupted writers, or other workers, finished.

        Args:
            files: the store's files.
            plan: the plan on disk.
            plan_sha256: its seal.
            view: gives the store as it is now.
            leases: of a worker among others; None of a writer that has the store to itself.
            committed: the commit, where this generation is complete already.
        """
        self.plan = plan
        self._files = files
        self._plan_sha = plan_sha256
        self._view = view
        self._shared = leases is not None
        self._units: Units = (
            OwnUnits(files, plan, plan_sha256)
            if leases is None
            else SharedUnits(files, plan, plan_sha256, leases)
        )
        self._commit = committed
        self._seals: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._guard = threading.Lock()
        self._being_written: set[int] = set()
        self.pending: list[UnitRange] = []
        if committed is None:
            found = dict(zip(plan.units, self._units.finished(plan.units), strict=True))
            self.pending = self._units.in_turn([unit for unit, done in found.items() if not done])
            for unit, done in found.items():
                if done is not None:
                    self._count(unit, done)
        else:
            self._counts.update(view().generation(plan.name).status_counts())

    @property
    def name(self) -> str:
        """Full name, with `.attempt` from the second on."""
        return self.plan.name

    @property
    def bad_counts(self) -> dict[str, int]:
        """Rows that can't be used, per status name, in the units finished so far."""
        names = (status.name.lower() for status in RowStatus if status != RowStatus.OK)
        return {name: self._counts[name] for name in names}

    def claimed(
        self,
        elsewhere: Callable[[int], None] = lambda _: None,
        *,
        idle: Callable[[], None] = lambda: None,
    ) -> Iterator[UnitRange]:
        """Yield each unit that is to be computed here and given to `write_unit`, once.

        For a writer that has the store to itself these are the pending units, in order. For a
        worker among others each is claimed when it is asked for, units that others finish are left
        out, and those of workers that died are among them; at the end nothing is pending but those
        of the units that were yielded which are not written yet.

        Args:
            elsewhere: called with the rows of each unit that another worker finished.
            idle: called before each wait for other workers.
        """

        def settle(unit: UnitRange, done: Done) -> None:
            self._settle(unit, done)
            elsewhere(unit.stop - unit.start)

        yield from self._units.handed_out(list(self.pending), settle, idle)

    def write_unit(
        self,
        index: int,
        features: np.ndarray,
        norm: np.ndarray,
        status: np.ndarray,
        tokens: np.ndarray,
        loss: np.ndarray | None = None,
    ) -> None:
        """Publish one unit; when this returns it survives a crash.

        Of workers that both computed a unit the first that publishes it decides; what another one
        gives is discarded without a word.

        Args:
            index: number of a pending unit.
            features: (k, d) float32, the unit's rows in the order of the plan.
            norm: (k,) float32, norm of each feature before projection.
            status: (k,) uint8 `RowStatus`; a row called ok that holds NaN, infinity or only zeros
                is stored as non_finite or zero_norm.
            tokens: (k,) target tokens per row.
            loss: (k,) float32, mean loss over the target tokens; needed where the plan keeps
                losses, left out otherwise.

        Raises:
            BadInput: the unit is not pending, or a shape is wrong.
            StoreIOError: the disk is full or not writable.
            StoreBusy: another process, past the lock, wrote other values for this unit.
        """
        with self._taken(index) as unit:
            values = encoded_unit(self.plan, unit, features, norm, status, tokens, loss)
            self._settle(unit, self._units.publish(unit, values))

    def copy_unit(self, index: int, values: Mapping[str, np.ndarray]) -> None:
        """Publish one unit of values that are stored already, as those of an earlier attempt.

        Args:
            index: number of a pending unit.
            values: array name -> (k, ...) values in the stored dtype.

        Raises:
            BadInput, StoreIOError, StoreBusy: as `write_unit`.
        """
        with self._taken(index) as unit:
            self._settle(unit, self._units.publish(unit, values))

    @contextmanager
    def _taken(self, index: int) -> Iterator[UnitRange]:
        """Find a pending unit, which no other thread can take meanwhile."""
        with self._guard:
            unit = next((each for each in self.pending if each.index == index), None)
            if unit is None or index in self._being_written:
                raise BadInput(
                    f"unit {index} of {self.name} is not pending: finished, being written by "
                    "another thread, or not planned; take one of `pending`"
                )
            self._being_written.add(index)
        try:
            yield unit
        finally:
            with self._guard:
                self._being_written.discard(index)

    def commit(self) -> Commit:
        """Check every unit and make the generation visible, complete, to readers.

        Returns:
            The commit; the existing one if the generation was committed before.

        Raises:
            BadInput: units are pending.
            DamagedData: a unit changed on disk since it was written; nothing is committed.
            StoreBusy: another writer, past the lock, committed something else.
        """
        if self.pending:
            raise BadInput(
                f"{self.name} can't be committed: {len(self.pending):,} of "
                f"{len(self.plan.units):,} units are pending, first {self.pending[0].index}; "
                "write them first"
            )
        if self._commit is None:
            self._units.commit(self._is_committed, self._publish)
        assert self._commit is not None
        if self._shared:  # a worker that wrote it may have died before it synced the name
            self._files.sync_directory(COMMITS)
        return self._commit

    def _is_committed(self) -> bool:
        """Look for the commit of another worker."""
        for commit in self._view().commits:
            if commit.kind == "generation" and commit.generation == self.name:
                self._commit = commit
        return self._commit is not None

    def _publish(self) -> None:
        store = self._view()
        draft = Commit(
            number=len(store.commits) + 1,
            store_uuid=store.uuid,
            parent=None if store.head is None else store.head.sha256,
            kind="generation",
            generations=(self.name,),
            plan_sha256=self._plan_sha,
            units=tuple(self._seals[unit.index] for unit in self.plan.units),
            chunk_bytes=self.plan.chunk_bytes,
        )
        self._check(draft)
        if self._shared:  # the same of records
            self._files.sync_directory(parent_of(unit_path(self.name, 0)))
        self._commit = publish_commit(self._files, draft, self._view, shared=self._shared)

    def _settle(self, unit: UnitRange, done: Done) -> None:
        with self._guard:
            self._count(unit, done)
            self.pending.remove(unit)

    def _count(self, unit: UnitRange, done: Done) -> None:
        record, self._seals[unit.index] = done
        self._counts.update(record.status)

    def _check(self, draft: Commit) -> None:
        files, plan = self._files, self.plan
        try:
            check_committed_plan(files, draft)
            check_beside_plan(files, plan)
            records = committed_records(files, plan, draft)
            checked = files.at_once(lambda each: check_unit(files, each), records)
            faults = [fault for found in checked for fault in found]
        except DamagedFile as error:
            faults = [error.fault]
        if faults:
            raise DamagedData(
                f"{self.name} is not committed: {faults[0]} ({len(faults)} file(s) changed on disk "
                "since they were written). Run again: damaged units are redone"
            )


def raise_schema(files: StoreFiles, store: Store, version: int) -> None:
    """Let a store's root ask for a newer release, before anything that older ones can't read.

    It lasts when this returns, also where another process raised it, which may have died before it
    synced the name.
    """
    found = files.read(METADATA) if store.schema_version < version else b""
    if found and read_root(found)[0] < version:
        files.replace(METADATA, root_json(store.uuid, version), found)
    elif version > SCHEMA_VERSION:
        files.sync_directory(parent_of(METADATA))


def publish_commit(
    files: StoreFiles, draft: Commit, view: Callable[[], Store], *, shared: bool = False
) -> Commit:
    """Append one commit to the chain.

    Args:
        files: the store's files.
        draft: what to commit, as the successor of the newest commit.
        view: gives the store as it is now.
        shared: whether other workers may commit, so that the successor moves on with the chain.

    Returns:
        The commit that is in the chain now.

    Raises:
        StoreBusy: another process committed something else under this number.
    """
    while True:
        store = view()
        # A text may be kept, retired and kept again; a generation's name comes once.
        for commit in store.commits if draft.generations else ():
            if replace(commit, number=draft.number, parent=draft.parent) == draft:
                return commit
        if shared and draft.kind == "texts":
            kept = store.text_commits()
            if all(table.rows_sha256 in kept for table in draft.texts):
                return kept[draft.texts[0].rows_sha256]
        if shared and store.head is not None:
            draft = replace(draft, number=store.head.number + 1, parent=store.head.sha256)
        if files.publish(commit_path(draft.number), draft.to_bytes()):
            return draft
        if not shared:
            break
    raise StoreBusy(
        f"commit {draft.number} was taken meanwhile by another process, in spite of the lock of "
        f'store "{files.root}"; {", ".join(draft.generations)} is not committed. Let that process '
        "finish, then run again: finished units are reused"
    )
