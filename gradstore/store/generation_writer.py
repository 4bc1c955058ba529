"""Writing one generation: finish its pending units in any order, then commit it whole."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import BadInput, DamagedData, DamagedFile, StoreBusy
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    METADATA,
    RowStatus,
    commit_path,
    generation_path,
    root_json,
    unit_path,
)
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.unit_records import UnitRecord
from gradstore.storage.local import STAGING, StoreFiles, parent_of
from gradstore.store.encoding import encoded_unit
from gradstore.store.generation import Generation
from gradstore.store.reader import Store
from gradstore.store.unit_files import check_unit, publish_unit, read_record

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_log = logging.getLogger(__name__)

QUARANTINE = f"{STAGING}/quarantine"


class GenerationWriter:
    """Writer of one planned generation, made by `StoreWriter.begin`; for use from one thread.

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
        committed: Commit | None = None,
    ) -> None:
        """Find the units that earlier, interrupted writers finished.

        Args:
            files: the store's files.
            plan: the plan on disk.
            plan_sha256: its seal.
            view: gives the store as it is now.
            committed: the commit, where this generation is complete already.
        """
        self.plan = plan
        self._files = files
        self._plan_sha = plan_sha256
        self._view = view
        self._commit = committed
        self._done: dict[int, tuple[UnitRecord, str]] = {}
        self.pending: list[UnitRange] = []
        if committed is None:
            for unit in plan.units:
                found = self._finished(unit)
                if found is None:
                    self.pending.append(unit)
                else:
                    self._done[unit.index] = found
        else:
            records = view().generation(plan.name).unit_records
            self._done = {
                r.unit.index: (r, sha) for r, sha in zip(records, committed.units, strict=True)
            }

    @property
    def name(self) -> str:
        """Full name, with `.attempt` from the second on."""
        return self.plan.name

    @property
    def bad_counts(self) -> dict[str, int]:
        """Rows that can't be used, per status name, in the units finished so far."""
        counts = {status.name.lower(): 0 for status in RowStatus if status != RowStatus.OK}
        for record, _ in self._done.values():
            for name in counts:
                counts[name] += record.status.get(name, 0)
        return counts

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
            StoreBusy: another writer, past the lock, wrote other values for this unit.
        """
        unit = self._pending(index)
        self._publish(unit, encoded_unit(self.plan, unit, features, norm, status, tokens, loss))

    def copy_unit(self, index: int, values: Mapping[str, np.ndarray]) -> None:
        """Publish one unit of values that are stored already, as those of an earlier attempt.

        Args:
            index: number of a pending unit.
            values: array name -> (k, ...) values in the stored dtype.

        Raises:
            BadInput, StoreIOError, StoreBusy: as `write_unit`.
        """
        self._publish(self._pending(index), values)

    def _pending(self, index: int) -> UnitRange:
        unit = next((each for each in self.pending if each.index == index), None)
        if unit is None:
            raise BadInput(
                f"unit {index} of {self.name} is not pending: finished, or not planned; "
                "take one of `pending`"
            )
        return unit

    def _publish(self, unit: UnitRange, values: Mapping[str, np.ndarray]) -> None:
        published = publish_unit(self._files, self.plan, self._plan_sha, unit, values)
        if published is None:
            raise StoreBusy(
                f"unit {unit.index} of {self.name} was written meanwhile by another process with "
                f'other values, in spite of the lock of store "{self._files.root}". Let that one '
                "finish"
            )
        self._done[unit.index] = published
        self.pending.remove(unit)

    def commit(self) -> Commit:
        """Check every unit and make the generation visible, complete, to readers.

        Returns:
            The commit; the existing one if the generation was committed before.

        Raises:
            BadInput: units are pending.
            DamagedData: a unit changed on disk since it was written; nothing is committed.
            StoreBusy: another writer, past the lock, committed something else.
        """
        if self._commit is not None:
            return self._commit
        if self.pending:
            raise BadInput(
                f"{self.name} can't be committed: {len(self.pending):,} of "
                f"{len(self.plan.units):,} units are pending, first {self.pending[0].index}; "
                "write them first"
            )
        store = self._view()
        draft = Commit(
            number=len(store.commits) + 1,
            store_uuid=store.uuid,
            parent=None if store.head is None else store.head.sha256,
            kind="generation",
            generations=(self.name,),
            plan_sha256=self._plan_sha,
            units=tuple(self._done[unit.index][1] for unit in self.plan.units),
            chunk_bytes=sum(record.chunk_bytes for record, _ in self._done.values()),
        )
        self._check(draft)
        self._commit = publish_commit(self._files, draft, self._view)
        return self._commit

    def _check(self, draft: Commit) -> None:
        try:
            records = Generation(self._files, draft).unit_records
            faults = [fault for record in records for fault in check_unit(self._files, record)]
        except DamagedFile as error:
            faults = [error.fault]
        if faults:
            raise DamagedData(
                f"{self.name} is not committed: {faults[0]} ({len(faults)} file(s) changed on disk "
                "since they were written). Run again: damaged units are redone"
            )

    def _finished(self, unit: UnitRange) -> tuple[UnitRecord, str] | None:
        """Return the record of a unit that is complete on disk; quarantine other files of it."""
        base, files = generation_path(self.name), self._files
        record_path = unit_path(self.name, unit.index)
        chunks = [f"{base}/{spec.chunk_path(unit.index)}" for spec in self.plan.arrays]
        left = [path for path in (record_path, *chunks) if files.exists(path)]
        if record_path in left:
            try:
                record, sha = read_record(files, self.plan, self._plan_sha, unit)
                faults = check_unit(files, record)
            except DamagedFile as error:
                faults = [error.fault]
            if not faults:
                for path in (*chunks, record_path):
                    files.make_directory(parent_of(path))
                    files.sync_directory(parent_of(path))
                return record, sha
            _log.warning("unit %d of %s is damaged (%s): redone", unit.index, self.name, faults[0])
        for path in left:
            quarantine(files, path)
        return None


def quarantine(files: StoreFiles, relative: str) -> None:
    """Move an uncommitted file or folder into quarantine, in staging, for inspection."""
    number = len(files.names(QUARANTINE))
    while files.exists(f"{QUARANTINE}/{number}"):
        number += 1
    files.move(relative, f"{QUARANTINE}/{number}")


def raise_schema(files: StoreFiles, store: Store, version: int) -> None:
    """Let a store's root ask for a newer release, before anything that older ones can't read."""
    if store.schema_version < version:
        files.replace(METADATA, root_json(store.uuid, version))


def publish_commit(files: StoreFiles, draft: Commit, view: Callable[[], Store]) -> Commit:
    """Append one commit to the chain.

    Returns:
        The commit that is in the chain now.

    Raises:
        StoreBusy: another process committed something else under this number.
    """
    # A text may be kept, retired and kept again; a generation's name comes once.
    for commit in view().commits if draft.generations else ():
        if replace(commit, number=draft.number, parent=draft.parent) == draft:
            return commit
    if files.publish(commit_path(draft.number), draft.to_bytes()):
        return draft
    raise StoreBusy(
        f"commit {draft.number} was taken meanwhile by another process, in spite of the lock of "
        f'store "{files.root}"; {", ".join(draft.generations)} is not committed. Let that process '
        "finish, then run again: finished units are reused"
    )
