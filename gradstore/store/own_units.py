"""Units of a generation whose store this process has to itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from gradstore.errors import DamagedFile, Fault, StoreBusy
from gradstore.format.layout import generation_path, plan_path, unit_path
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.unit_records import UnitRecord
from gradstore.storage.local import STAGING, StoreFiles, parent_of
from gradstore.store.unit_files import check_unit, name_unit, read_record, stage_unit

_log = logging.getLogger(__name__)

QUARANTINE = f"{STAGING}/quarantine"

#: A finished unit: its record and the record's seal.
Done: TypeAlias = tuple[UnitRecord, str]


class Units(Protocol):
    """Units of one generation, as one of its writers meets them."""

    def finished(self, units: Sequence[UnitRange]) -> list[Done | None]:
        """Return the record of each unit that is complete in the store, else None."""

    def in_turn(self, units: Sequence[UnitRange]) -> list[UnitRange]:
        """Return units in the order in which this writer takes them."""

    def publish(self, unit: UnitRange, values: Mapping[str, np.ndarray]) -> Done:
        """Publish the values of a unit; return what its record says in the end."""

    def handed_out(
        self,
        pending: Sequence[UnitRange],
        settle: Callable[[UnitRange, Done], None],
        idle: Callable[[], None],
    ) -> Iterator[UnitRange]:
        """Yield units to be computed here; call `settle` for each that another finished."""

    def commit(self, done: Callable[[], bool], act: Callable[[], None]) -> None:
        """Call `act` unless the generation is committed, as `done` says."""


class OwnUnits:
    """Units that nobody else writes, for a process that holds the store's lock exclusively."""

    def __init__(self, files: StoreFiles, plan: Plan, plan_sha256: str) -> None:
        self._files, self._plan, self._plan_sha = files, plan, plan_sha256

    def finished(self, units: Sequence[UnitRange]) -> list[Done | None]:
        """Return the record of each unit that is complete; quarantine other files of the rest.

        Where a removal may come late, what has been freed can't be written again: chunks stay, and
        whoever publishes the unit settles them.
        """
        files = self._files
        found = []
        for unit, looked in zip(units, files.at_once(self._look, units), strict=True):
            done, left, faults = looked
            if done is not None:
                for folder in dict.fromkeys(map(parent_of, self._paths(unit))):
                    files.make_directory(folder)
                    files.sync_directory(folder)
            elif faults:
                _log.warning(
                    "unit %d of %s is damaged (%s): redone", unit.index, self._plan.name, faults[0]
                )
            record = unit_path(self._plan.name, unit.index)
            for path in [] if done is not None else left:
                if path == record or not files.late_writes:
                    quarantine(files, path)
            found.append(done)
        return found

    def _look(self, unit: UnitRange) -> tuple[Done | None, list[str], list[Fault]]:
        """Read a unit: its record if it is complete, the files that are there, and faults."""
        files, paths = self._files, self._paths(unit)
        there = files.at_once(files.has, paths)
        left = [path for path, is_there in zip(paths, there, strict=True) if is_there]
        if paths[-1] not in left:
            return None, left, []
        try:
            record, sha = read_record(files, self._plan, self._plan_sha, unit)
            faults = check_unit(files, record)
        except DamagedFile as error:
            faults = [error.fault]
        return None if faults else (record, sha), left, faults

    def _paths(self, unit: UnitRange) -> list[str]:
        """List the files of a unit, the record last."""
        base = generation_path(self._plan.name)
        chunks = [f"{base}/{spec.chunk_path(unit.index)}" for spec in self._plan.arrays]
        return [*chunks, unit_path(self._plan.name, unit.index)]

    def in_turn(self, units: Sequence[UnitRange]) -> list[UnitRange]:
        """Return units in order."""
        return list(units)

    def publish(self, unit: UnitRange, values: Mapping[str, np.ndarray]) -> Done:
        """Publish one unit; when this returns it survives a crash.

        Raises:
            StoreBusy: another writer, past the lock, wrote other values for this unit.
        """
        files = self._files
        staged = stage_unit(files, self._plan, self._plan_sha, unit, values)
        try:
            done = name_unit(files, staged)
        finally:
            files.discard(staged.staged.values())
        if done is None:
            raise StoreBusy(
                f"unit {unit.index} of {self._plan.name} was written meanwhile by another process "
                f'with other values, in spite of the lock of store "{files.root}". Let that one '
                "finish"
            )
        return done

    def handed_out(
        self,
        pending: Sequence[UnitRange],
        settle: Callable[[UnitRange, Done], None],
        idle: Callable[[], None],
    ) -> Iterator[UnitRange]:
        """Yield each pending unit; there is nobody else to finish one, or to wait for."""
        yield from pending

    def commit(self, done: Callable[[], bool], act: Callable[[], None]) -> None:
        """Call `act`."""
        act()


def quarantine_plan(files: StoreFiles, name: str) -> None:
    """Move the damaged plan of an uncommitted generation into quarantine, with all made for it."""
    quarantine(files, plan_path(name))
    if files.exists(generation_path(name)):
        quarantine(files, generation_path(name))


def quarantine(files: StoreFiles, relative: str) -> None:
    """Move an uncommitted file or folder into quarantine, in staging, for inspection."""
    number = len(files.names(QUARANTINE))
    while files.exists(f"{QUARANTINE}/{number}"):
        number += 1
    files.move(relative, f"{QUARANTINE}/{number}")
