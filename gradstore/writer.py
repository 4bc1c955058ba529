"""The one writer of a store: creates or opens it, plans generations, cleans up.

```
with StoreWriter("runs/a/gradstore", provenance={...}) as writer:
    generation = writer.begin(record, rows, dim=4096)
    for unit in list(generation.pending):
        generation.write_unit(unit.index, features, norm, status, tokens)
    generation.commit()
```
"""

from __future__ import annotations

import importlib.metadata
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from gradstore.disk.canonical import Json, plain
from gradstore.disk.cleaning import clean_store, remove_dead_staging
from gradstore.disk.damage import DamagedFile, Fault
from gradstore.disk.documents import metadata
from gradstore.disk.files import STAGING, StoreFiles
from gradstore.disk.generation_writer import GenerationWriter, quarantine
from gradstore.disk.lock import LOCK, WriterLock
from gradstore.disk.planning import choose_plan, warn_of_libraries
from gradstore.disk.probes import check_zarr, probe
from gradstore.errors import BadInput, DamagedData, StoreIOError
from gradstore.layout import (
    COMMITS,
    GENERATIONS,
    METADATA,
    PLANS,
    SPACES,
    UNIT_ROWS,
    check_dtype,
    check_space,
    generation_bytes,
    generation_path,
    group_json,
    plan_path,
    provenance_path,
    root_json,
)
from gradstore.provenance import compare, provenance_bytes, read_provenance, refuse
from gradstore.records import GenerationRecord, RowSet
from gradstore.store import Store, read_identity

logger = logging.getLogger(__name__)

_OURS = {METADATA, COMMITS, GENERATIONS, PLANS, SPACES, STAGING, LOCK, "index"}


class StoreWriter:
    """Opens a store for writing, creating it if need be; holds its lock until `close`.

    Raises:
        BadInput: the folder holds something else, or zarr is too old.
        ProvenanceMismatch: the space's features can't be compared with this run's; lists every
            differing field. Nothing was written.
        StoreBusy: another process writes to this store.
        StoreIOError: the disk is full, read-only, or lacks link, rename, fsync or flock.
        DamagedData: what was committed is damaged.
    """

    _store: Store
    _seal: str

    def __init__(
        self,
        path: str | Path,
        *,
        provenance: Mapping[str, Any],
        space: str = "gradient",
        setting_keys: Mapping[str, str] | None = None,
        files: StoreFiles | None = None,
    ) -> None:
        """Creates or opens the store.

        Args:
            path: the store's folder.
            provenance: the MUST-EQUAL fields of the space, JSON-like, nested mappings welcome. A
                field called `canary` is compared with a tolerance.
            space: `gradient`, or one per embedding model.
            setting_keys: dotted field -> YAML key that sets it, for the way out of a refusal.
            files: the store's files, for tests that interrupt them.
        """
        check_zarr(importlib.metadata.version("zarr"))
        self.path = Path(path)
        self.space = check_space(space)
        self._files = files or StoreFiles(self.path)
        self._fields: dict[str, Json] = plain(provenance, "provenance")
        self._setting_keys = setting_keys
        if self._files.exists(METADATA):
            self._check_before_lock()
        else:
            self._check_foreign()
            self._files.make_root()
        self._lock = WriterLock(self._files)
        self._lock.acquire()
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the lock back; what is committed stays, what is pending can be resumed."""
        try:
            self._lock.release()
        finally:
            self._files.close()

    @property
    def store(self) -> Store:
        """The store as readers see it now."""
        self._store = self._store.refresh()
        return self._store

    def check_space_for(self, rows: int, dim: int, dtype: str = "float16", count: int = 1) -> None:
        """Checks that `count` generations of (rows, dim) fit on the disk; nothing is allocated.

        Raises:
            StoreIOError: they do not; tells the bytes needed and free.
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
    ) -> GenerationWriter:
        """Plans a generation, or takes up an interrupted or finished one.

        A generation of this name that was committed with the same identity comes back complete
        (`pending` empty); one that was planned and interrupted is resumed; anything else of this
        run is superseded by a new attempt.

        Args:
            record: what makes the generation.
            rows: its n rows, in order.
            dim: d.
            dtype: float16 or bfloat16.
            unit_rows: rows per unit of a new plan; an existing plan wins.

        Raises:
            BadInput: dim or dtype can't be stored.
            ProvenanceMismatch: other rows, d or dtype than before, or another run's name.
            StoreIOError: not enough room.
        """
        check_dtype(dtype)
        chosen = choose_plan(
            self._files, self.store, record, rows, self.space, self._seal, dim, dtype, unit_rows
        )
        if chosen.committed is None:
            warn_of_libraries(self._store, record)
        plan, committed = chosen.plan, chosen.committed
        if committed is not None:
            return GenerationWriter(
                self._files, plan, chosen.sha256, lambda: self.store, committed=committed
            )
        needed = generation_bytes(len(plan.rows), plan.dim, plan.dtype, plan.unit_rows)
        if chosen.resumed:
            done = len(self._files.names(f"{generation_path(plan.name)}/units"))
            needed -= needed * done // len(plan.units)
        self._check_free(needed, f"{plan.name} ({len(plan.rows):,} x {plan.dim:,} {plan.dtype})")
        if not self._files.publish(plan_path(plan.name), plan.to_bytes()):
            fault = Fault(plan_path(plan.name), "no plan yet", "another writer's plan")
            raise DamagedFile(fault, str(self.path))
        for path, data in metadata(plan).items():
            self._publish_metadata(path, data, own=path.startswith(generation_path(plan.name)))
        self._files.make_directory(f"{generation_path(plan.name)}/units")
        return GenerationWriter(self._files, plan, chosen.sha256, lambda: self.store)

    def clean(self, keep_generations: int | None = None) -> list[str]:
        """Removes what nobody needs: dead staging, abandoned plans, superseded attempts.

        Args:
            keep_generations: keep the newest this many steps of train and of each target set; None
                keeps them all.

        Returns:
            Full names of the generations removed.
        """
        return clean_store(self._files, lambda: self.store, keep_generations)

    # ---- opening -----------------------------------------------------------------------------

    def _check_before_lock(self) -> None:
        """Refuses what must be refused before a byte is written; damage waits for the lock."""
        try:
            read_identity(self._files)
            self._compare()
        except DamagedData:
            return

    def _check_foreign(self) -> None:
        kind = "nothing" if not self.path.exists() else "folder"
        if kind == "folder" and not self.path.is_dir():
            raise BadInput(f'"{self.path}" is a file; a store is a folder. Choose gradstore=PATH')
        foreign = sorted(set(self._files.names("")) - _OURS)
        if foreign:
            raise BadInput(
                f'"{self.path}" is no store and not empty (it holds {foreign[0]!r}). '
                "Choose another folder with gradstore=PATH"
            )

    def _prepare(self) -> None:
        files = self._files
        files.make_directory(STAGING)
        remove_dead_staging(files)
        self._create_if_missing()
        self._store = Store(files)
        for folder in (COMMITS, PLANS, SPACES, GENERATIONS):
            files.make_directory(folder)
            files.sync_directory(folder)
        self._publish_metadata(f"{GENERATIONS}/{METADATA}", group_json(), own=False)
        self._seal = self._settle_provenance()

    def _create_if_missing(self) -> None:
        files = self._files
        try:
            read_identity(files)
        except BadInput:
            pass
        except DamagedData:
            if files.names(COMMITS):
                raise
            quarantine(files, METADATA)
        else:
            return
        probe(files)
        for folder in (COMMITS, PLANS, SPACES, GENERATIONS):
            files.make_directory(folder)
        self._publish_metadata(f"{GENERATIONS}/{METADATA}", group_json(), own=True)
        if not files.publish(METADATA, root_json(str(uuid.uuid4()))):
            logger.warning("another process created store %s at the same moment", self.path)

    def _compare(self) -> str | None:
        """Compares the space's fields with this run's; gives the seal, None if there are none."""
        path = provenance_path(self.space)
        if not self._files.exists(path):
            return None
        try:
            stored, sha = read_provenance(self._files.read(path), self.space)
        except ValueError as error:
            fault = Fault(path, "the provenance that was written", str(error))
            raise DamagedFile(fault, str(self.path)) from error
        differences = compare(stored, self._fields, self._setting_keys)
        if differences:
            raise refuse(str(self.path), differences)
        return sha

    def _settle_provenance(self) -> str:
        path = provenance_path(self.space)
        try:
            sha = self._compare()
        except DamagedData:
            if self._store.commits:
                raise
            quarantine(self._files, path)
            sha = None
        if sha is None and not self._files.publish(
            path, provenance_bytes(self.space, self._fields)
        ):
            logger.warning("another process wrote the provenance of %s meanwhile", self.space)
        return sha or self._compare() or ""

    # ---- the private parts -------------------------------------------------------------------

    def _publish_metadata(self, path: str, data: bytes, *, own: bool) -> None:
        """Writes a zarr.json; a damaged one is replaced only where nothing committed needs it."""
        if self._files.exists(path) and self._files.kind(path) == "file":
            if self._files.read(path) == data:
                self._files.make_directory(path.rpartition("/")[0])
                self._files.sync_directory(path.rpartition("/")[0])
                return
            if not own and self._store.commits:
                fault = Fault(path, "the bytes gradstore wrote", "others")
                raise DamagedFile(fault, str(self.path))
            quarantine(self._files, path)
        if not self._files.publish(path, data):
            raise DamagedFile(Fault(path, "the bytes gradstore wrote", "others"), str(self.path))

    def _check_free(self, needed: int, what: str) -> None:
        free = self._files.free_bytes()
        if needed > free:
            raise StoreIOError(
                f'{what} needs {needed:,} bytes, {free:,} free on the disk of store "{self.path}". '
                "Free some space, choose another disk with gradstore=PATH, or fewer dimensions"
            )
