"""Units of a generation that several workers fill at once, with nothing between them but the store.

A unit is *free*, *claimed* (a lease names who computes it), *chosen* (one file in staging says
which staged chunks it will consist of) and *finished* (its record exists). Each step is one file
that is linked, and so is made by one worker alone:

* Two workers may compute a unit, if one was slow for so long that the other took it over. Each
  stages its chunks; whichever links the choice first decides, and the other's are discarded.
* From the choice on any worker can finish the unit, by linking the chunks that the choice names:
  so its files never come from two computations, and a worker that dies there loses nothing.
* Choices stay until no worker is left. A worker that wakes up late meets one, whatever it missed.

What a worker leaves when it dies: a lease, which others see expire; staged chunks, which the next
writer that has the store to itself removes; a choice, which others carry out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from gradstore.errors import DamagedFile, Fault, StoreIOError
from gradstore.format.canonical import canonical_json, parse
from gradstore.format.layout import unit_path
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.unit_records import UnitRecord
from gradstore.storage.leases import Holder, Leases, leases_of
from gradstore.storage.local import StoreFiles
from gradstore.store.own_units import Done
from gradstore.store.unit_files import StagedUnit, name_unit, read_record, stage_unit


class SharedUnits:
    """Units of one generation, for one of several workers that fill it.

    Args:
        files: the store's files.
        plan: the plan, the same for all of them.
        plan_sha256: its seal.
        leases: this worker's.
    """

    def __init__(self, files: StoreFiles, plan: Plan, plan_sha256: str, leases: Leases) -> None:
        self._files, self._plan, self._plan_sha = files, plan, plan_sha256
        self._leases = leases

    def finished(self, units: Sequence[UnitRange]) -> list[Done | None]:
        """Return the record of each finished unit; its chunks are checked before the commit."""
        return list(self._files.at_once(self._finished, units))

    def _finished(self, unit: UnitRange) -> Done | None:
        if not self._files.has(unit_path(self._plan.name, unit.index)):
            return None
        return read_record(self._files, self._plan, self._plan_sha, unit)

    def in_turn(self, units: Sequence[UnitRange]) -> list[UnitRange]:
        """Return units from this worker's place in the plan on, going round."""
        first = self._leases.worker.start(len(self._plan.units))
        return sorted(units, key=lambda unit: (unit.index < first, unit.index))

    def publish(self, unit: UnitRange, values: Mapping[str, np.ndarray]) -> Done:
        """Publish one unit, or discard these values where another worker's were chosen.

        Returns:
            The record, of this worker's or the other's values.

        Raises:
            DamagedFile: files of the unit are not those that were chosen.
        """
        files = self._files
        staged = stage_unit(files, self._plan, self._plan_sha, unit, values)
        document = {"record": staged.record.to_dict(), "staged": staged.staged}
        try:
            files.share(staged.staged.values())
        except StoreIOError:
            files.discard(staged.staged.values())
            raise
        try:
            files.publish(self._choice(unit), canonical_json(document))
        except StoreIOError:
            if not files.late_writes and not files.has(self._choice(unit)):
                files.discard(staged.staged.values())
            raise  # a choice that comes late names them: the next writer alone removes both
        done = self._carry_out(unit)
        files.discard(staged.staged.values())
        return done

    def handed_out(
        self,
        pending: Sequence[UnitRange],
        settle: Callable[[UnitRange, Done], None],
        idle: Callable[[], None],
    ) -> Iterator[UnitRange]:
        """Yield units that this worker alone is to compute and publish, each of them once.

        The next unit is claimed when it is asked for. Where all that are left are claimed by others
        that live it waits: for their records, or for the end of a lease.

        Args:
            pending: units that are not finished, in turn.
            settle: called for each unit that another worker finished.
            idle: called before each wait; what fails here must not be waited for there.
        """
        left = list(pending)
        while left:
            waiting_for: Holder | None = None
            yielded = False
            for unit in list(left):
                if self._is_settled(unit, settle):
                    left.remove(unit)
                    continue
                holder = self._leases.claim(self._task(str(unit.index)))
                if holder is not None:
                    waiting_for = waiting_for or holder
                    continue
                left.remove(unit)
                if not self._is_settled(unit, settle):  # the holder before may have finished it
                    yielded = True
                    yield unit
            if not yielded and waiting_for is not None:
                idle()
                self._leases.wait(f"units of {self._plan.name} that others compute", waiting_for)

    def commit(self, done: Callable[[], bool], act: Callable[[], None]) -> None:
        """Commit the generation, or wait until another worker has."""
        name = self._plan.name
        self._leases.once(self._task("commit"), done, act, f"the commit of {name}")

    def _is_settled(self, unit: UnitRange, settle: Callable[[UnitRange, Done], None]) -> bool:
        done = self._finished(unit)
        if done is None and self._files.has(self._choice(unit)):
            done = self._carry_out(unit)
        if done is not None:
            settle(unit, done)
        return done is not None

    def _carry_out(self, unit: UnitRange) -> Done:
        """Finish a unit as its choice says, whoever made it."""
        chosen = self._read_choice(unit)
        done = name_unit(self._files, chosen)
        if done is None:
            path = unit_path(self._plan.name, unit.index)
            raise DamagedFile(
                Fault(path, "chunks as they were chosen", "others"), str(self._files.root)
            )
        return done

    def _read_choice(self, unit: UnitRange) -> StagedUnit:
        path = self._choice(unit)
        try:
            document = parse(self._files.read(path))
            record, _ = UnitRecord.from_bytes(canonical_json(document["record"]))
            staged = {str(name): str(source) for name, source in document["staged"].items()}
            fits = (record.generation, record.unit, record.plan_sha256, staged.keys()) == (
                self._plan.name, unit, self._plan_sha, record.files.keys(),
            )  # fmt: skip
        except (ValueError, KeyError, AttributeError) as error:
            fault = Fault(path, "a choice of chunks", str(error))
            raise DamagedFile(fault, str(self._files.root)) from error
        if not fits:
            fault = Fault(path, f"unit {unit.index} of this plan", "another")
            raise DamagedFile(fault, str(self._files.root))
        for source in staged.values():
            self._files.path(source)
        return StagedUnit(record, staged)

    def _choice(self, unit: UnitRange) -> str:
        return f"{leases_of(self._files)}/{self._task(f'{unit.index}.chosen')}"

    def _task(self, name: str) -> str:
        return f"{self._plan_sha}/{name}"
