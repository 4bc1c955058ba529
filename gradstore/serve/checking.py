"""Checks of a file that a client gives, before it gets its name.

A store's writer checks its own work. These are the checks of somebody who does not trust it: each
file is what its path says, comes after what it needs, and agrees with it. So whoever has the key
that writes can add to a store and, as any writer, retire generations or ask for rows to be removed;
but nothing committed is changed, and nothing is committed that `gradstore verify` would call
damaged. What no check can tell is whether values are the model's, and words those of their row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from gradstore.errors import BadInput, DamagedFile
from gradstore.format.commits import Commit
from gradstore.format.layout import (
    CRC_BYTES,
    TEXTS_VERSION,
    ArraySpec,
    RowStatus,
    generation_path,
    group_json,
    plan_path,
    provenance_path,
    read_root,
)
from gradstore.format.paths import StorePath
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.provenance import compare, read_provenance, refuse
from gradstore.format.unit_records import UnitRecord, crc32c
from gradstore.serve.forgetting import check_receipt, check_request
from gradstore.serve.problems import out_of_order, reading
from gradstore.storage.reading import ReadFiles
from gradstore.store.attempts import check_plan, ever_committed
from gradstore.store.documents import metadata
from gradstore.store.reader import Store
from gradstore.store.texts import RowTexts
from gradstore.store.unit_files import check_unit, read_record, row_hash_file, status_counts

#: Plans that are kept at hand.
_PLANS_KEPT = 16


class Checks:
    """Checks of what clients write and remove; used from several threads.

    Args:
        files: the store's files.
        view: gives the store as it is now, None while there is none.
    """

    def __init__(self, files: ReadFiles, view: Callable[[], Store | None]) -> None:
        self._files, self._view = files, view
        self._plans: dict[str, tuple[Plan, str]] = {}
        self._lock = threading.Lock()
        self._by_kind: dict[str, Callable[[StorePath, bytes], None]] = {
            "root": self._root, "group": self._group, "generation": self._metadata,
            "array": self._metadata, "chunk": self._chunk, "unit": self._unit, "plan": self._plan,
            "commit": self._commit, "space": self._space, "text": self._text,
            "factors": self._factors, "request": self._request, "receipt": self._receipt,
        }  # fmt: skip

    def check(self, where: StorePath, data: bytes) -> None:
        """Check a file before it is published under a free name.

        Raises:
            BadInput: it is not what its path says.
            Refusal: something must come before it.
            ProvenanceMismatch: it differs from what is stored; lists every difference.
            DamagedData: what it belongs to is damaged.
        """
        self._by_kind[where.kind](where, data)

    def forget_plans(self) -> None:
        """Read plans anew, since one may have been removed."""
        with self._lock:
            self._plans.clear()

    # ---- the store and its spaces ------------------------------------------------------------

    def _root(self, where: StorePath, data: bytes) -> None:
        if self._files.has(where.path):
            return  # the same bytes again, or taken
        with reading(where.path):
            read_root(data)

    def check_newer_root(self, data: bytes) -> None:
        """Check a root that takes the place of another: the same store's, of a later schema."""
        with reading("zarr.json"):
            version, uuid, _ = read_root(data)
        store = self._store()
        if uuid != store.uuid or version < store.schema_version:
            raise BadInput(
                f"zarr.json is of store {uuid}, schema {version}; it can only raise the schema of "
                f"this store, {store.uuid}, which is {store.schema_version}"
            )

    def _store(self) -> Store:
        found = self._view()
        if found is None:
            raise out_of_order("there is no store yet: write its zarr.json first")
        return found

    def _group(self, where: StorePath, data: bytes) -> None:
        _expect(where.path, group_json(), data)

    def _space(self, where: StorePath, data: bytes) -> None:
        self._store()
        with reading(where.path):
            given, _ = read_provenance(data, where.name)
        there = self._files.read_if_there(where.path)
        if there is not None:
            stored, _ = read_provenance(there, where.name)
            if differences := compare(stored, given):
                raise refuse(str(self._files.root), differences)

    # ---- generations -------------------------------------------------------------------------

    def _plan(self, where: StorePath, data: bytes) -> None:
        store = self._store()
        with reading(where.path):
            plan, _ = Plan.from_bytes(data)
        if plan.name != where.name:
            raise BadInput(f"{where.path} holds the plan of {plan.name}")
        space = provenance_path(plan.space)
        seal = None
        if self._files.has(space):
            seal = read_provenance(self._files.read(space), plan.space)[1]
        if seal != plan.provenance_sha256:
            raise out_of_order(
                f"the plan of {plan.name} names the provenance {plan.provenance_sha256}, and space "
                f"{plan.space} has {seal or 'none'}: write {space} first; where another is there, "
                "the answer lists every difference"
            )
        if plan.schema_version > store.schema_version:
            raise out_of_order(
                f"the plan of {plan.name} needs schema {plan.schema_version}: raise that of "
                f"zarr.json first, which is {store.schema_version}"
            )
        check_plan(self._files, store, plan)

    def _planned(self, name: str, path: str) -> tuple[Plan, str]:
        """Return the plan of a generation, and its seal.

        Raises:
            Refusal: there is none.
        """
        known = self._plans.get(name)
        if known is not None:
            return known
        with self._lock:  # a plan of many rows is read once, not by each that waits for it
            if name in self._plans:
                return self._plans[name]
            data = self._files.read_if_there(plan_path(name))
            if data is None:
                raise out_of_order(f"{path} comes before its plan: write {plan_path(name)} first")
            with reading(plan_path(name)):
                found = Plan.from_bytes(data)
            while len(self._plans) >= _PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[name] = found
            return found

    def _metadata(self, where: StorePath, data: bytes) -> None:
        plan, _ = self._planned(where.name, where.path)
        expected = metadata(plan).get(where.path)
        if expected is None:
            raise BadInput(f"{where.name} has no array {where.array!r}")
        _expect(where.path, expected, data)

    def _chunk(self, where: StorePath, data: bytes) -> None:
        plan, _ = self._planned(where.name, where.path)
        spec, unit = self._place_of(plan, where)
        size = spec.chunk_bytes(plan.unit_rows)
        if len(data) != size:
            raise BadInput(f"{where.path} has {len(data):,} bytes; {size:,} are planned")
        values, trailer = memoryview(data)[:-CRC_BYTES], data[-CRC_BYTES:]
        if crc32c(values).to_bytes(CRC_BYTES, "little") != trailer:
            raise BadInput(f"{where.path} does not end with the crc32c of its values")
        if spec.name == "status" and max(values) >= len(RowStatus):
            raise BadInput(f"{where.path} has the status {max(values)}, which there is not")
        if spec.name == "row_hash" and row_hash_file(plan, unit) != {_in_generation(where): data}:
            raise BadInput(f"{where.path} has other row hashes than the plan")

    def _place_of(self, plan: Plan, where: StorePath) -> tuple[ArraySpec, UnitRange]:
        for spec in plan.arrays:
            if where.number < len(plan.units) and (
                spec.chunk_path(where.number) == _in_generation(where)
            ):
                return spec, plan.units[where.number]
        raise BadInput(f"{where.path} is no chunk of the plan: {plan.name} has "
                       f"{len(plan.units):,} units of {', '.join(s.name for s in plan.arrays)}"
                       )  # fmt: skip

    def _unit(self, where: StorePath, data: bytes) -> None:
        plan, sha = self._planned(where.name, where.path)
        with reading(where.path):
            record, _ = UnitRecord.from_bytes(data)
        if where.number >= len(plan.units):
            raise BadInput(f"{where.path} is no unit of the plan, which has {len(plan.units):,}")
        unit = plan.units[where.number]
        sizes = {s.chunk_path(unit.index): s.chunk_bytes(plan.unit_rows) for s in plan.arrays}
        given = (record.generation, record.plan_sha256, record.unit, sum(record.status.values()))
        if given != (plan.name, sha, unit, unit.stop - unit.start) or sizes != {
            name: each.bytes for name, each in record.files.items()
        }:
            raise BadInput(f"{where.path} is no record of unit {unit.index} of this plan")
        faults = check_unit(self._files, record, deep=True)
        if faults:
            told = "; ".join(map(str, faults))
            raise out_of_order(f"{where.path} comes before its chunks, or is of others: {told}")
        counted = self._counted(plan, unit)
        if counted != {name: count for name, count in record.status.items() if count}:
            raise BadInput(f"{where.path} counts rows {dict(record.status)}; they are {counted}")

    def _counted(self, plan: Plan, unit: UnitRange) -> dict[str, int]:
        """Count the rows of a unit by the status that its chunk says."""
        spec = next(spec for spec in plan.arrays if spec.name == "status")
        path = f"{generation_path(plan.name)}/{spec.chunk_path(unit.index)}"
        codes = self._files.read(path, expected_bytes=spec.chunk_bytes(plan.unit_rows))
        with reading(path):
            return status_counts(list(codes[: unit.stop - unit.start]))

    # ---- commits -----------------------------------------------------------------------------

    def _commit(self, where: StorePath, data: bytes) -> None:
        store = self._store()
        with reading(where.path):
            commit = Commit.from_bytes(data)
        if where.number <= len(store.commits):
            return  # the same bytes again, or taken
        head = None if store.head is None else store.head.sha256
        given = (commit.number, commit.store_uuid, commit.parent)
        if given != (where.number, store.uuid, head) or where.number != len(store.commits) + 1:
            raise out_of_order(
                f"{where.path} is no successor of commit {len(store.commits)}, {head}, of store "
                f"{store.uuid}: read what was committed meanwhile"
            )
        if commit.kind == "generation":
            self._whole(store, commit, where)
        elif commit.kind == "texts":
            if store.schema_version < TEXTS_VERSION:
                raise out_of_order(f"{where.path} needs schema {TEXTS_VERSION}: raise that of "
                                   f"zarr.json first, which is {store.schema_version}")  # fmt: skip
            self._whole_text(commit, where)
        else:
            live = {each.generation for each in store.live_commits(superseded=True)}
            gone = set(commit.generations) - live
            gone |= {each.rows_sha256 for each in commit.texts} - store.text_commits().keys()
            if gone:
                raise BadInput(f"{where.path} retires what is not there: {', '.join(sorted(gone))}")

    def _whole(self, store: Store, commit: Commit, where: StorePath) -> None:
        """Check that every unit of a commit is finished, and is the one that it names."""
        plan, sha = self._planned(commit.generation, where.path)
        if (sha, len(plan.units)) != (commit.plan_sha256, len(commit.units)):
            raise BadInput(f"{where.path} names another plan of {plan.name}, or other units")
        if plan.name in ever_committed(store):
            raise BadInput(f"{where.path}: {plan.name} was committed before")
        pairs = list(zip(plan.units, commit.units, strict=True))

        def size_of(pair: tuple[UnitRange, str]) -> int:
            record, _ = read_record(self._files, plan, sha, *pair)
            for name, each in record.files.items():
                path = f"{generation_path(plan.name)}/{name}"
                if self._files.size(path) != each.bytes:
                    raise out_of_order(f"{where.path} comes before {path}, or that is damaged")
            return record.chunk_bytes

        try:
            total = sum(self._files.at_once(size_of, pairs))
        except DamagedFile as error:
            raise out_of_order(f"{where.path} names a unit that is not finished: {error.fault}"
                               ) from error  # fmt: skip
        if total != commit.chunk_bytes:
            raise BadInput(f"{where.path} says {commit.chunk_bytes:,} bytes, there are {total:,}")
        for path, expected in metadata(plan).items():
            if self._files.read_if_there(path) != expected:
                raise out_of_order(f"{where.path} comes before {path}, or that is damaged")
        self._check_factors(plan, where)

    def _check_factors(self, plan: Plan, where: StorePath) -> None:
        if not plan.record.curvature:
            return
        from gradstore.store.curvature import factors_of_record  # torch, which others do without

        path, fault = factors_of_record(self._files, plan.record)
        if fault is not None:
            raise out_of_order(f"{where.path} comes before {path}, or tells of others: {fault}")

    def _whole_text(self, commit: Commit, where: StorePath) -> None:
        """Check that the files of a text are those that a commit names, and hold its rows."""
        for fault in (f for table in commit.texts for f in RowTexts(self._files, table).check()):
            raise out_of_order(f"{where.path} comes before {fault.file}, or names other text: "
                               f"{fault}")  # fmt: skip

    # ---- the rest ----------------------------------------------------------------------------

    def _text(self, where: StorePath, data: bytes) -> None:
        kept = self._store().text_commits().get(where.name)
        if data[:4] != b"PAR1" or data[-4:] != b"PAR1":
            raise BadInput(f"{where.path} is no Parquet file")
        if kept is not None and where.number >= len(kept.texts[0].parts):
            raise BadInput(f"{where.path} is no part of the text that commit {kept.number} names")

    def _factors(self, where: StorePath, data: bytes) -> None:
        from gradstore.export.kronecker import KroneckerFactors  # torch, which others do without

        self._store()
        if KroneckerFactors.from_bytes(data, where.path).sha256 != where.name:
            raise BadInput(f"{where.path} holds other factors than its name says")

    def _request(self, where: StorePath, data: bytes) -> None:
        check_request(self._files, self._store(), where, data)

    def _receipt(self, where: StorePath, data: bytes) -> None:
        check_receipt(self._files, self._store(), where, data)


def _expect(path: str, expected: bytes, data: bytes) -> None:
    if data != expected:
        raise BadInput(f"{path} must hold {expected.decode()}")


def _in_generation(where: StorePath) -> str:
    """Return a file's path within its generation."""
    return where.path.removeprefix(f"{generation_path(where.name)}/")
