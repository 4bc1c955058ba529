"""Writing into one space of a store that `StoreWriter` holds open."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any

from gradstore.errors import (
    BadInput,
    DamagedData,
    DamagedFile,
    Fault,
    StoreIOError,
    TooLarge,
    expect,
)
from gradstore.format.canonical import Json, plain
from gradstore.format.layout import (
    UNIT_ROWS,
    check_dtype,
    dtype_of_role,
    generation_bytes,
    generation_path,
    plan_path,
    provenance_path,
)
from gradstore.format.names import check_space
from gradstore.format.plans import Plan
from gradstore.format.provenance import compare, provenance_bytes, read_provenance, refuse
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.format.text_table import Formats, Text
from gradstore.storage.leases import Leases
from gradstore.storage.local import StoreFiles, parent_of
from gradstore.store.attempts import PlanChoice, choose_plan, warn_of_libraries
from gradstore.store.documents import metadata
from gradstore.store.generation_writer import GenerationWriter, raise_schema
from gradstore.store.own_units import quarantine
from gradstore.store.reader import Store
from gradstore.store.text_writer import keep_texts
from gradstore.store.unit_files import publish_anew
from gradstore.store.worker_group import generations_before

_log = logging.getLogger(__name__)

#: Plans of dead writers that may come late, one after the other, before a writer gives up.
_PLANS = 3


class SpaceFields:
    """A space and the MUST-EQUAL fields that this run brings to it."""

    def __init__(
        self, space: str, provenance: Mapping[str, Any], setting_keys: Mapping[str, str] | None
    ) -> None:
        """Check the space name and the fields.

        Args:
            space: `gradient`, or one per embedding model.
            provenance: the fields, JSON-like.
            setting_keys: dotted field -> YAML key that sets it.
        """
        expect(isinstance(provenance, Mapping), "provenance", provenance, "a mapping of fields")
        self.space = check_space(space)
        self.fields: dict[str, Json] = plain(provenance, "provenance")
        self._setting_keys = setting_keys

    def compare(self, files: StoreFiles) -> str | None:
        """Compare the fields with the stored ones; return the seal, None if nothing is stored.

        Raises:
            ProvenanceMismatch: lists every differing field.
            DamagedData: what is stored is damaged.
        """
        path = provenance_path(self.space)
        if not files.has(path):
            return None
        try:
            stored, sha = read_provenance(files.read(path), self.space)
        except ValueError as error:
            fault = Fault(path, "the provenance that was written", str(error))
            raise DamagedFile(fault, str(files.root)) from error
        differences = compare(stored, self.fields, self._setting_keys)
        if differences:
            raise refuse(str(files.root), differences)
        return sha

    def settle(self, files: StoreFiles, store: Store) -> str:
        """Compare the fields, or store them if there are none yet; return the seal."""
        path = provenance_path(self.space)
        try:
            sha = self.compare(files)
        except DamagedData as error:
            if store.commits or isinstance(error, TooLarge):
                raise
            quarantine(files, path)
            sha = None
        if sha is not None:  # by a process that may have died before it synced the name
            files.make_directory(parent_of(path))
            files.sync_directory(parent_of(path))
            return sha
        if not files.publish(path, provenance_bytes(self.space, self.fields)):
            _log.warning("another process wrote the provenance of %s meanwhile", self.space)
        return self.compare(files) or ""


class SpaceWriter:
    """Planner of one space's generations, made by `StoreWriter`, which holds the lock it needs.

    Attributes:
        space: name of the space.
    """

    def __init__(
        self,
        files: StoreFiles,
        view: Callable[[], Store],
        fields: SpaceFields,
        leases: Leases | None = None,
    ) -> None:
        """Compare the space's provenance with the stored one, or store it.

        Args:
            files: the store's files.
            view: gives the store as it is now; raises once its lock was given back.
            fields: the space, and its MUST-EQUAL fields.
            leases: of a worker among others; None of a writer that has the store to itself.
        """
        self.space = fields.space
        self._files, self._view, self._leases = files, view, leases
        self._before = None if leases is None else generations_before(files)
        self._seal = fields.settle(files, view())

    @property
    def store(self) -> Store:
        """The store as readers see it now, all spaces of it."""
        return self._view()

    def check_space_for(self, rows: int, dim: int, dtype: str = "float16", count: int = 1) -> None:
        """Check that `count` generations of (rows, dim) fit on the disk; nothing is allocated.

        In units of the usual size; `begin` checks again, in those that it is given.

        Raises:
            StoreIOError: they do not; names the bytes needed and free.
        """
        needed = count * generation_bytes(rows, dim, dtype)
        self._check_free(needed, f"{count} generation(s) of {rows:,} x {dim:,} {dtype}")

    def begin(
        self,
        record: GenerationRecord,
        rows: RowSet,
        *,
        dim: int,
        dtype: str = "float16",
        unit_rows: int = UNIT_ROWS,
        losses: bool = False,
    ) -> GenerationWriter:
        """Plan a generation, or take up an interrupted or finished one.

        A generation of this name that was committed with the same identity comes back complete
        (`pending` empty); one that was planned and interrupted is resumed; anything else of this
        run is superseded by a new attempt.

        Args:
            record: what makes the generation.
            rows: its n rows, in order.
            dim: d.
            dtype: of the space's train rows; `dtype_of_role` says that of target rows.
            unit_rows: rows per unit of a new plan; an existing plan wins.
            losses: keep the loss of each row; an existing plan wins.

        Raises:
            BadInput: dim or dtype can't be stored, the name is not one of this space, the rows are
                too many for one plan, or the writer was closed.
            ProvenanceMismatch: other rows, d or dtype than before, a name of another run or
                space, or another state than the other workers have.
            StoreIOError: not enough room.
        """
        check_dtype(dtype)
        if rows.forgotten.any():
            raise BadInput(
                f"row {int(rows.forgotten.argmax())} of {record.name} has the hash that stands for "
                "a row that was removed; give the values of gradstore.row_hash"
            )
        rows = self._view().without_forgotten(rows, of=record.set)
        stored = dtype_of_role(dtype, record.role)
        wanted = Plan(
            record.name, self.space, self._seal, record, rows, dim, stored, unit_rows, losses
        )
        chosen, tries = self._plan(wanted), _PLANS
        while chosen.committed is None and not self._files.publish(
            plan_path(chosen.plan.name), chosen.plan.to_bytes()
        ):
            tries -= 1
            if self._leases is None and not (self._files.late_writes and tries):
                raise another_plan(self._files, chosen.plan)
            chosen = self._plan(wanted)  # another worker came first: its plan; or one came late
        plan, view, leases = chosen.plan, self._view, self._leases
        if chosen.committed is None and plan.unit_rows != unit_rows:
            _log.info("%s goes on in units of %d rows, as it was begun", plan.name, plan.unit_rows)
        if chosen.committed is None:
            _publish_metadata(self._files, view(), plan)
        return GenerationWriter(
            self._files, plan, chosen.sha256, view, leases=leases, committed=chosen.committed
        )

    def _plan(self, wanted: Plan) -> PlanChoice:
        """Choose the plan; see that there is room for it, and that readers know of its schema."""
        store = self._view()
        chosen = choose_plan(self._files, store, wanted, self._before)
        plan = chosen.plan
        if chosen.committed is None:
            warn_of_libraries(store, plan)
            needed = generation_bytes(len(plan.rows), plan.dim, plan.dtype, plan.unit_rows)
            if chosen.resumed:
                done = len(self._files.names(f"{generation_path(plan.name)}/units"))
                needed -= needed * done // len(plan.units)
            what = f"{plan.name} ({len(plan.rows):,} x {plan.dim:,} {plan.dtype})"
            self._check_free(needed, what)
            if not chosen.resumed:
                _check_size(self._files, plan)
            raise_schema(self._files, store, plan.schema_version)
        return chosen

    def keep_texts(
        self, rows: RowSet, texts: Iterable[Text], formats: Formats | None = None
    ) -> None:
        """Keep the text of a row set, for people and pages that look into the store.

        Args:
            rows: n rows, in order; generations of the same rows share one table, in every space.
            texts: one `Text` for each row; nothing is read of it where the store keeps them.
            formats: of their `original`: data set -> its entry in LlamaFactory's dataset_info.json.

        Raises:
            BadInput: more or fewer texts than rows, or the writer was closed.
            StoreIOError: not enough room.
        """
        keep_texts(self._files, self._view, rows, texts, formats, leases=self._leases)

    def _check_free(self, needed: int, what: str) -> None:
        free = self._files.free_bytes()
        if needed > free:
            raise StoreIOError(
                f"{what} needs {needed:,} bytes, {free:,} free on the disk of store "
                f'"{self._files.root}". Free some space, choose another disk with gradstore=PATH, '
                "or fewer dimensions"
            )


def publish_plan(files: StoreFiles, store: Store, plan: Plan) -> None:
    """Write a generation's plan and every zarr.json that it needs, before any unit.

    Raises:
        BadInput: its rows are too many for one plan.
        DamagedFile: another plan has this name.
    """
    _check_size(files, plan)
    raise_schema(files, store, plan.schema_version)
    if not files.publish(plan_path(plan.name), plan.to_bytes()):
        raise another_plan(files, plan)
    _publish_metadata(files, store, plan)


def _check_size(files: StoreFiles, plan: Plan) -> None:
    """Refuse a plan that nobody could read again, before a gradient is computed for it."""
    if plan.byte_count > files.most_bytes:
        rows = len(plan.rows)
        raise BadInput(
            f"{plan.name} has {rows:,} rows: its plan would be of {plan.byte_count:,} bytes, and "
            f"{files.most_bytes:,} are the most that are read again, about "
            f"{rows * files.most_bytes // plan.byte_count:,} rows. Split the rows over several "
            "stores, each with gradstore=PATH of its own"
        )


def another_plan(files: StoreFiles, plan: Plan) -> DamagedFile:
    """Make the error that somebody's plan, past the lock, has a plan's name."""
    fault = Fault(plan_path(plan.name), "no plan yet", "another writer's plan")
    return DamagedFile(fault, str(files.root))


def _publish_metadata(files: StoreFiles, store: Store, plan: Plan) -> None:
    own, documents = generation_path(plan.name), metadata(plan)
    committed = [path for path in documents if store.commits and not path.startswith(own)]
    publish_metadata(files, documents, committed)
    files.make_directory(f"{own}/units")


def publish_metadata(
    files: StoreFiles, documents: Mapping[str, bytes], committed: Collection[str]
) -> None:
    """Write every zarr.json; replace a damaged one only if nothing committed needs it.

    Args:
        files: the store's files.
        documents: path -> what must be there.
        committed: paths that something committed may need.

    Raises:
        DamagedFile: others' bytes are there.
    """
    found = dict(zip(documents, files.at_once(files.read_if_there, documents), strict=True))

    def settle(path: str) -> bool:
        if found[path] == documents[path]:
            files.make_directory(parent_of(path))
            files.sync_directory(parent_of(path))
            return True
        return (files.publish if path in committed else replace)(path, documents[path])

    replace = partial(publish_anew, files)
    for path, there in found.items():
        if there not in (None, documents[path]):
            if path in committed:
                raise _others_bytes(files, path)
            if not files.late_writes:
                quarantine(files, path)
    for path, settled in zip(documents, files.at_once(settle, documents), strict=True):
        if not settled:
            raise _others_bytes(files, path)


def _others_bytes(files: StoreFiles, path: str) -> DamagedFile:
    return DamagedFile(Fault(path, "the bytes gradstore wrote", "others"), str(files.root))
