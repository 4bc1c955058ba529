"""The writer of a store, alone or as a worker among others: creates or opens it, plans, cleans up.

```
with StoreWriter("runs/a/gradstore", provenance={...}) as writer:
    generation = writer.begin(record, rows, dim=4096)
    for unit in list(generation.pending):
        generation.write_unit(unit.index, features, norm, status, tokens)
    generation.commit()
    embeddings = writer.with_space("minilm", {...})       # a further space, under the same lock
    embeddings.begin(embedding_record(...), rows, dim=384)
```
"""

from __future__ import annotations

import importlib.metadata
import logging
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from gradstore.errors import BadInput, DamagedData, expect
from gradstore.format.layout import (
    COMMITS,
    GENERATIONS,
    GRADIENT,
    METADATA,
    PLANS,
    SPACES,
    UNIT_ROWS,
    group_json,
    root_json,
)
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.format.text_table import Formats, Text
from gradstore.storage.leases import Leases, Worker
from gradstore.storage.local import STAGING, StoreFiles
from gradstore.storage.location import Location, Place, location
from gradstore.storage.places import files_at, lock_of
from gradstore.storage.probes import check_sharing, check_zarr, probe
from gradstore.storage.unseen import check_unseen
from gradstore.store.cleaning import clean_store, remove_dead_staging
from gradstore.store.curvature import FactorSample, step_factors
from gradstore.store.empty_place import check_empty
from gradstore.store.forgetting import finish_removals
from gradstore.store.generation_writer import GenerationWriter
from gradstore.store.own_units import quarantine
from gradstore.store.reader import Store, read_identity
from gradstore.store.space_writer import SpaceFields, SpaceWriter, publish_metadata
from gradstore.store.worker_group import begin_group, group_mark, of_group

if TYPE_CHECKING:
    from torch import nn

    from gradstore.export.gradient_space import GradientSpace
    from gradstore.export.kronecker import CurvatureRule, KroneckerFactors

_log = logging.getLogger(__name__)


class StoreWriter:
    """Writer of a store, which it opens or, if need be, creates; holds its lock until `close`.

    A writer has the store to itself. Workers share it, in any number of processes and machines that
    see its folder: each makes the same calls, and they divide the units of each generation.

    Attributes:
        path: where the store is.
        space: the space that `begin` writes into; `with_space` opens further ones.

    Raises:
        BadInput: the folder holds something else, or zarr is too old.
        ProvenanceMismatch: the space's features can't be compared with this run's; lists every
            differing field. Nothing was written.
        StoreBusy: another process writes to this store; for a worker, one that is no worker.
        StoreIOError: the disk is full, read-only, or lacks link, rename, fsync or flock; or, for a
            worker, it keeps locks to one machine.
        DamagedData: what was committed is damaged.
    """

    _store: Store
    _main: SpaceWriter

    def __init__(
        self,
        path: Place,
        *,
        provenance: Mapping[str, Any],
        space: str = GRADIENT,
        setting_keys: Mapping[str, str] | None = None,
        worker: Worker | None = None,
        files: StoreFiles | None = None,
    ) -> None:
        """Create or open the store.

        Args:
            path: the store's folder, s3://BUCKET/PREFIX, or https://HOST.
            provenance: the MUST-EQUAL fields of the space, JSON-like, nested mappings welcome. A
                field called `canary` is compared with a tolerance.
            space: `gradient`, or one per embedding model.
            setting_keys: dotted field -> YAML key that sets it, for the way out of a refusal.
            worker: this process among those that share the store; None has it to itself.
            files: the store's files, for tests that interrupt them.
        """
        check_zarr(importlib.metadata.version("zarr"))
        is_worker = worker is None or isinstance(worker, Worker)
        expect(is_worker, "worker", worker, "gradstore.Worker(i, N), or None")
        self.path: Location = location(path)
        fields = SpaceFields(space, provenance, setting_keys)
        self.space = fields.space
        self._files = files or files_at(self.path)
        if self._files.has(METADATA):
            self._check_before_lock(fields)
        else:
            check_empty(self._files)
            self._files.make_root()
        self._closed = False
        self._leases: Leases | None = None
        self._lock = lock_of(self._files)
        try:
            if worker is None:
                self._lock.acquire()
                check_unseen(self._files)
                self._prepare()
            else:
                self._join(worker)
            self._main = SpaceWriter(self._files, self._view, fields, self._leases)
        except BaseException:  # Ctrl-C too: nobody but us would let the lock go
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
        """Release the lock; committed data stays, pending data can be resumed."""
        self._closed = True
        self._files.end()  # before anybody else may write
        try:
            if self._leases is not None:
                self._leases.close()
        finally:
            try:
                self._lock.release()
            finally:
                self._files.close()

    @property
    def store(self) -> Store:
        """The store as readers see it now."""
        self._store = self._store.refresh()
        return self._store

    def with_space(
        self,
        space: str,
        provenance: Mapping[str, Any],
        *,
        setting_keys: Mapping[str, str] | None = None,
    ) -> SpaceWriter:
        """Open a further space under this writer's lock, valid as long as this writer is open.

        Names of its generations carry the prefix `names.space_run(space, run)`.

        Args:
            space: `gradient`, or one per embedding model.
            provenance: the MUST-EQUAL fields of that space.
            setting_keys: dotted field -> YAML key that sets it, for the way out of a refusal.

        Raises:
            BadInput: this writer was closed.
            ProvenanceMismatch: lists every field in which the space differs; nothing was written.
            DamagedData: its stored provenance is damaged.
        """
        fields = SpaceFields(space, provenance, setting_keys)
        return SpaceWriter(self._files, self._view, fields, self._leases)

    def check_space_for(self, rows: int, dim: int, dtype: str = "float16", count: int = 1) -> None:
        """Call `SpaceWriter.check_space_for` of this writer's own space."""
        self._main.check_space_for(rows, dim, dtype, count)

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
        """Call `SpaceWriter.begin` of this writer's own space."""
        return self._main.begin(
            record, rows, dim=dim, dtype=dtype, unit_rows=unit_rows, losses=losses
        )

    def keep_texts(
        self, rows: RowSet, texts: Iterable[Text], formats: Formats | None = None
    ) -> None:
        """Call `SpaceWriter.keep_texts`; a text belongs to rows, not to a space."""
        self._main.keep_texts(rows, texts, formats)

    def factors(
        self,
        model: nn.Module,
        space: GradientSpace,
        rule: CurvatureRule,
        *,
        autocast: str,
        sample: FactorSample | None,
    ) -> KroneckerFactors:
        """Call `gradstore.store.curvature.step_factors` on this store."""
        if sample is not None:
            sample = replace(sample, rows=self._view().without_forgotten(sample.rows, of=""))
        return step_factors(
            self._files, self._view(), model, space, rule,
            autocast=autocast, sample=sample, leases=self._leases,
        )  # fmt: skip

    def clean(self, keep_generations: int | None = None) -> list[str]:
        """Remove what is no longer needed: dead staging, abandoned plans, superseded attempts.

        Args:
            keep_generations: keep the newest this many steps of train and of each target set; None
                keeps them all.

        Returns:
            Full names of the generations removed.

        Raises:
            BadInput: this is a worker among others, whose files would be among them.
        """
        if self._leases is not None:
            raise BadInput(
                "a worker among others can't clean up the store; open it without worker=, once no "
                "worker writes to it"
            )
        found = clean_store(self._files, lambda: self.store, keep_generations)
        return [*found.retire, *found.abandoned]

    # ---- opening -----------------------------------------------------------------------------

    def _view(self) -> Store:
        """Return the current store, for code that writes under this writer's lock."""
        if self._closed:
            raise BadInput(f'the writer of store "{self.path}" was closed; open it again')
        return self.store

    def _check_before_lock(self, fields: SpaceFields) -> None:
        """Reject invalid input before a byte is written; damage is handled under the lock."""
        try:
            read_identity(self._files)
            fields.compare(self._files)
        except DamagedData:
            return

    def _join(self, worker: Worker) -> None:
        """Share the lock with other workers; the first prepares the store for all of them."""
        files = self._files
        check_sharing(files)

        def set_up() -> None:
            check_unseen(files)
            self._prepare()
            begin_group(files, self._store, worker.lease_seconds)

        self._lock.join(
            str(worker),
            set_up,
            lambda: files.has(group_mark(files)),
            lambda: remove_dead_staging(files),
        )
        self._store = Store(files)
        self._leases = Leases(files, of_group(files, worker))
        self._leases.open()

    def _prepare(self) -> None:
        files = self._files
        files.make_directory(STAGING)
        remove_dead_staging(files)
        self._create_if_missing()
        self._store = Store(files)
        finish_removals(files, lambda: self.store)
        for folder in (COMMITS, PLANS, SPACES, GENERATIONS):
            files.make_directory(folder)
            files.sync_directory(folder)
        top = f"{GENERATIONS}/{METADATA}"
        publish_metadata(files, {top: group_json()}, [top] if self._store.commits else [])

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
        publish_metadata(files, {f"{GENERATIONS}/{METADATA}": group_json()}, ())
        if not files.publish(METADATA, root_json(str(uuid.uuid4()))):
            _log.warning("another process created store %s at the same moment", self.path)
