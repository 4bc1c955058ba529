"""The commit log: `commits/<N>.json`, a hash chain that nothing but `os.link` can add to.

Commit N names its parent's sha256 and carries its own (its seal), so an edit anywhere breaks the
chain there. There is no mutable HEAD: the newest commit is the highest N of an unbroken chain. A
commit either adds one whole generation or retires old ones before their files are removed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Literal

from gradstore.disk.canonical import Json, canonical_json, seal, unseal
from gradstore.disk.damage import DamagedFile, Fault
from gradstore.disk.reading import ReadFiles
from gradstore.errors import BadInput
from gradstore.layout import COMMITS, SCHEMA_VERSION, GenerationName, commit_path

_NAME = re.compile(r"([1-9][0-9]{0,17})\.json")


@dataclass(frozen=True)
class Commit:
    """One link of the chain.

    Attributes:
        number: N, from 1.
        store_uuid: the store it belongs to.
        parent: sha256 of commit N-1, None for the first.
        kind: `generation` adds one, `retire` takes some back.
        generations: the full names it adds or retires.
        plan_sha256: seal of the added generation's plan; "" for `retire`.
        units: seal of each unit record of the added generation, in order.
        chunk_bytes: bytes of the added generation's chunks.
    """

    number: int
    store_uuid: str
    parent: str | None
    kind: Literal["generation", "retire"]
    generations: tuple[str, ...]
    plan_sha256: str = ""
    units: tuple[str, ...] = ()
    chunk_bytes: int = 0

    def to_dict(self) -> dict[str, Json]:
        """Gives the sealed document."""
        body = {each.name: getattr(self, each.name) for each in fields(self)}
        return seal({"schema_version": SCHEMA_VERSION, **body})

    def to_bytes(self) -> bytes:
        """Gives the bytes of its file."""
        return canonical_json(self.to_dict())

    @cached_property
    def sha256(self) -> str:
        """The commit's seal, by which indexes and checkpoints name it."""
        return str(self.to_dict()["sha256"])

    @property
    def generation(self) -> str:
        """The generation it adds."""
        return self.generations[0]

    @classmethod
    def from_bytes(cls, data: bytes) -> Commit:
        """Reads a commit; ValueError when the bytes are not exactly one."""
        document = unseal(data)
        try:
            commit = cls(
                number=document["number"],
                store_uuid=document["store_uuid"],
                parent=document["parent"],
                kind=document["kind"],
                generations=tuple(document["generations"]),
                plan_sha256=document["plan_sha256"],
                units=tuple(document["units"]),
                chunk_bytes=document["chunk_bytes"],
            )
            same = commit.to_bytes() == data
            for name in commit.generations:
                GenerationName.parse(name)
        except (KeyError, TypeError, AttributeError, BadInput) as error:
            raise ValueError(f"not a commit: {error!r}") from error
        if not same or commit.kind not in ("generation", "retire") or not commit.generations:
            raise ValueError("not a commit of this schema")
        return commit


def read_chain(files: ReadFiles, store_uuid: str, known: tuple[Commit, ...] = ()) -> list[Commit]:
    """Reads all commits, oldest first, and checks the chain.

    Args:
        files: the store's files.
        store_uuid: what every commit must name.
        known: commits checked before by this process; they are not read again.

    Raises:
        DamagedFile: a commit is missing, edited, or of another store ("chain broken at N").
    """
    numbers = set()
    for name in files.names(COMMITS):
        match = _NAME.fullmatch(name)
        if match is None:
            fault = Fault(f"{COMMITS}/{name}", "only <N>.json files here", "another name")
            raise DamagedFile(fault, str(files.root))
        numbers.add(int(match[1]))
    chain = list(known)
    for number in range(len(chain) + 1, max(numbers, default=0) + 1):
        path = commit_path(number)
        if number not in numbers:
            raise _broken(files, path, number, "a commit", "no file")
        chain.append(_read_one(files, path, number, store_uuid, chain))
    return chain


def _read_one(
    files: ReadFiles, path: str, number: int, store_uuid: str, chain: list[Commit]
) -> Commit:
    try:
        commit = Commit.from_bytes(files.read(path))
    except ValueError as error:
        raise _broken(files, path, number, "the bytes that were committed", str(error)) from error
    parent = chain[-1].sha256 if chain else None
    for name, expected, found in (
        ("number", number, commit.number),
        ("store", store_uuid, commit.store_uuid),
        ("parent", parent, commit.parent),
    ):
        if expected != found:
            raise _broken(files, path, number, f"{name} {expected}", f"{name} {found}")
    return commit


def _broken(files: ReadFiles, path: str, number: int, expected: str, found: str) -> DamagedFile:
    fault = Fault(path, expected, f"{found} (chain broken at {number})")
    return DamagedFile(fault, str(files.root))
