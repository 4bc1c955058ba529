"""Reading a store: what was committed, and nothing else.

>>> from gradstore.store.reader import open_store
>>> from gradstore.errors import BadInput
>>> try:
...     open_store("no/such/folder")
... except BadInput as error:
...     print(error)
no store at "no/such/folder": ...
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from gradstore.errors import (
    BadInput,
    DamagedFile,
    Fault,
    ProvenanceMismatch,
)
from gradstore.format.canonical import Json
from gradstore.format.commits import Commit
from gradstore.format.forgotten import Receipt, Request, asked_for
from gradstore.format.layout import (
    COMMITS,
    INDEX,
    METADATA,
    NEEDS,
    PLANS,
    SPACES,
    provenance_path,
    read_root,
)
from gradstore.format.names import GenerationName
from gradstore.format.provenance import read_provenance
from gradstore.format.records import RowSet
from gradstore.storage.location import Location, Place
from gradstore.storage.places import reads_at
from gradstore.storage.reading import ReadFiles
from gradstore.store.description import describe, describe_planned
from gradstore.store.documents import read_chain, read_requests
from gradstore.store.generation import Generation
from gradstore.store.texts import RowTexts

if TYPE_CHECKING:
    from gradstore.export.kronecker import KroneckerFactors


def open_store(path: Place) -> Store:
    """Open a store for reading, at its newest commit.

    Args:
        path: the store's folder, s3://BUCKET/PREFIX, or https://HOST.

    Raises:
        BadInput: there is no store.
        ProvenanceMismatch: it was written by a newer schema; says which release reads it.
        DamagedData: its root or a commit is damaged.
    """
    return Store(reads_at(path))


class Store:
    """A read-only view of the commits that existed when it was opened.

    Attributes:
        path: where the store is.
        uuid: the store's id; checkpoints carry it.
        schema_version: version of the layout.
        commits: the chain, oldest first.
    """

    def __init__(self, files: ReadFiles, earlier: Store | None = None) -> None:
        self._files = files
        self.path: Location = files.root
        self.schema_version, self.uuid = read_identity(files)
        known = () if earlier is None or earlier.uuid != self.uuid else earlier.commits
        self.commits: tuple[Commit, ...] = tuple(read_chain(files, self.uuid, known))
        self._opened: dict[str, Generation] = {} if earlier is None else dict(earlier._opened)
        self._texts: dict[str, RowTexts] = {} if earlier is None else dict(earlier._texts)

    def __repr__(self) -> str:
        return f'<Store "{self.path}": {len(self.commits)} commits>'

    def refresh(self) -> Self:
        """Return a view of the current commits that keeps what this one has already checked."""
        return type(self)(self._files, self)

    @property
    def head(self) -> Commit | None:
        """The newest commit, None in an empty store."""
        return self.commits[-1] if self.commits else None

    @property
    def index_folder(self) -> Path | None:
        """Folder in which indexes of the store are cached; None of one in a bucket, without any."""
        return self.path / INDEX if isinstance(self.path, Path) else None

    def spaces(self) -> list[str]:
        """List the names of the spaces that have a provenance."""
        return [s for s in self._files.names(SPACES) if self._files.has(provenance_path(s))]

    def provenance(self, space: str = "gradient") -> dict[str, Json]:
        """Return the MUST-EQUAL fields of a space.

        Raises:
            BadInput: there is no such space.
            DamagedData: its document was changed.
        """
        path = provenance_path(space)
        if not self._files.has(path):
            raise BadInput(
                f'store "{self.path}" has no space {space!r}; take one of {self.spaces()}'
            )
        try:
            return read_provenance(self._files.read(path), space)[0]
        except ValueError as error:
            fault = Fault(path, "the provenance that was written", str(error))
            raise DamagedFile(fault, str(self.path)) from error

    def live_commits(self, *, superseded: bool = False) -> list[Commit]:
        """List the commits whose generations can be read, oldest first.

        Args:
            superseded: also those for which a later attempt was committed.
        """
        retired = {n for c in self.commits if c.kind == "retire" for n in c.generations}
        live = [c for c in self.commits if c.kind == "generation" and c.generation not in retired]
        if superseded:
            return live
        newest = {str(GenerationName.parse(c.generation).base()): c.number for c in live}
        kept = set(newest.values())
        return [commit for commit in live if commit.number in kept]

    def generations(self, *, superseded: bool = False) -> list[Generation]:
        """Open all committed generations, newest last; the newest attempt of each.

        Args:
            superseded: earlier attempts too, as far as clean-up left them.
        """
        return [self._open(commit) for commit in self.live_commits(superseded=superseded)]

    def generation(self, name: str) -> Generation:
        """Open one generation: the newest attempt, or exactly `<step>.<attempt>`.

        Raises:
            BadInput: it was never committed, or was removed by clean-up; lists what there is.
            DamagedData: it is not as it was committed.
        """
        if commit := self._by_name.get(str(GenerationName.parse(name))):
            return self._open(commit)
        there = ", ".join(c.generation for c in self.live_commits()) or "none"
        raise BadInput(f'store "{self.path}" has no committed generation {name!r}; it has: {there}')

    def requests(self) -> list[tuple[Request, Receipt | None]]:
        """Return what was asked to be removed, in order, each with its receipt if it is complete.

        Raises:
            DamagedData: one of the documents is not as it was written.
        """
        return read_requests(self._files, self.uuid)

    def without_forgotten(self, rows: RowSet, *, of: str | None = None) -> RowSet:
        """Return rows of a data set without those that were removed from this store on request.

        A row is known again by its id; and where a stored set has the same rows otherwise, whatever
        is in the places of removed ones is left out like them.

        Args:
            rows: n rows, as a data set has them today.
            of: the set: "" for train, or a target set's name; None is any.
        """
        requests = [request for request, _ in self.requests()]
        if not requests:
            return rows
        ids = {one for request in requests for one in request.ids}
        gone = asked_for(rows, requests[0].key, ids)
        for generation in self.generations():
            if of not in (None, generation.set):
                continue
            stored = generation.plan.rows
            there = ~stored.forgotten
            if len(stored) == len(rows) and there.any() and not there.all():
                others = (stored.hashes == rows.without(gone).hashes).all(axis=1)
                if others[there].all() and _same_places(stored, rows, there):
                    gone = gone | stored.forgotten
                    break
        return rows.without(gone)

    def text_commits(self) -> dict[str, Commit]:
        """Map the sha256 of each row set whose text is kept to the commit that added it."""
        kept: dict[str, Commit] = {}
        for commit in self.commits:
            for table in commit.texts:
                if commit.kind == "texts":
                    kept[table.rows_sha256] = commit
                else:
                    kept.pop(table.rows_sha256, None)
        return kept

    def texts(self, generation: Generation) -> RowTexts | None:
        """Open the text of a generation's rows; None where this store keeps none.

        Raises:
            DamagedData: a file of it is missing or has another size.
        """
        commit = self.text_commits().get(generation.plan.rows.sha256)
        if commit is None:
            return None
        if commit.sha256 not in self._texts:
            self._texts[commit.sha256] = RowTexts(self._files, commit.texts[0])
        return self._texts[commit.sha256]

    def factors(self, generation: Generation) -> KroneckerFactors | None:
        """Read the factors of the metric that a generation's features are in; None without one.

        Raises:
            DamagedData: they are missing, or others.
        """
        if not generation.record.curvature:
            return None
        from gradstore.store.curvature import recorded_factors  # torch: readers may do without

        return recorded_factors(self._files, generation.record)

    def planned(self) -> list[str]:
        """List generations that were planned and never committed; newest attempt last."""
        committed = {n for c in self.commits for n in c.generations}
        names = []
        for path in self._files.walk(PLANS):
            name = path.removeprefix(f"{PLANS}/").removesuffix(".json")
            if name not in committed and _is_name(name):
                names.append(name)
        return sorted(names, key=lambda n: (str(GenerationName.parse(n).base()), len(n), n))

    def info(self) -> dict[str, Json]:
        """Describe the store: the schema of `gradstore info --json`, plus some more fields."""
        kept = self.text_commits()
        entries = [
            describe(generation) | {"text": generation.plan.rows.sha256 in kept}
            for generation in self.generations()
        ]
        entries += [
            e for e in (describe_planned(self._files, name) for name in self.planned()) if e
        ]
        return {
            "store_uuid": self.uuid,
            "schema_version": self.schema_version,
            "head": None if self.head is None else self.head.sha256,
            "commits": len(self.commits),
            "generations": entries,
        }

    @cached_property
    def _by_name(self) -> dict[str, Commit]:
        """Commits of live generations by their names; by a name without attempt, the newest."""
        live = self.live_commits(superseded=True)
        exact = {commit.generation: commit for commit in live}
        return exact | {str(GenerationName.parse(c.generation).base()): c for c in live}

    def _open(self, commit: Commit) -> Generation:
        opened = self._opened.get(commit.sha256)
        if opened is None:
            held = [generation.plan.rows for generation in tuple(self._opened.values())]
            try:
                opened = Generation(self._files, commit, self._explain_retired, held)
            except DamagedFile:
                self._explain_retired(commit.generation)
                raise
            self._opened[commit.sha256] = opened
        return opened

    def _explain_retired(self, name: str) -> None:
        """Raise BadInput if a clean-up removed the generation since this view was opened."""
        for commit in read_chain(self._files, self.uuid, self.commits)[len(self.commits) :]:
            if commit.kind == "retire" and name in commit.generations:
                raise BadInput(
                    f"generation {name} was removed by clean-up (commit {commit.number}) after "
                    "this store was opened; open the store again"
                )


def read_identity(files: ReadFiles) -> tuple[int, str]:
    """Read schema version and uuid from the store's own zarr.json.

    Raises:
        BadInput: there is no store here.
        ProvenanceMismatch: its schema is newer than this release.
        DamagedFile: it is a store, and its zarr.json is damaged.
    """
    root = files.read_if_there(METADATA)
    if root is None:
        files.check_place()
        if files.names(COMMITS):
            raise DamagedFile(Fault(METADATA, "a file", "no file"), str(files.root))
        raise BadInput(f'no store at "{files.root}": check the path, or build one first')
    try:
        version, uuid, needs = read_root(root)
    except ValueError as error:
        if not files.exists(COMMITS):
            raise BadInput(
                f'"{files.root}" is another Zarr group, no gradient store: check the path'
            ) from error
        fault = Fault(METADATA, "the bytes gradstore wrote", str(error))
        raise DamagedFile(fault, str(files.root)) from error
    if version not in NEEDS:
        newest = max(NEEDS)
        raise ProvenanceMismatch(
            f'store "{files.root}" has schema {version}, this release reads up to {newest}; '
            f"it needs {needs!r}. Upgrade, or choose another store with gradstore=PATH",
            [f"schema_version differs: store has {version}, this release has {newest}"],
        )
    return version, uuid


def _same_places(stored: RowSet, rows: RowSet, there: np.ndarray) -> bool:
    """Tell whether rows are of the data set that stored ones are of, as far as that is known."""
    if stored.sources is None or rows.sources is None:
        return True
    pairs = zip(stored.sources, rows.sources, there.tolist(), strict=True)
    return all(theirs == ours for theirs, ours, kept in pairs if kept)


def _is_name(name: str) -> bool:
    try:
        GenerationName.parse(name)
    except BadInput:
        return False
    return True
