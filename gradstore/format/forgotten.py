"""Documents of the removal of rows that somebody asked for: a request, and a receipt at its end.

Neither has content of a row: an id is the hash of a row's hash under the store's own key, so that
the row is known again where a data set still has it, and nothing else can be read off.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from gradstore.format.canonical import Json, canonical_json, seal, unseal
from gradstore.format.layout import FORGOTTEN_VERSION
from gradstore.format.records import HASH_BYTES, RowSet
from gradstore.format.typed import each_of, hexadecimal, mapping, sha256, text, whole


@dataclass(frozen=True)
class _Document:
    """A sealed JSON document with the fields of its class."""

    def to_dict(self) -> dict[str, Json]:
        """Return the sealed document."""
        body = {each.name: getattr(self, each.name) for each in fields(self)}
        return seal({"schema_version": FORGOTTEN_VERSION, **body})

    def to_bytes(self) -> bytes:
        """Return the bytes of its file."""
        return canonical_json(self.to_dict())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a document; raise ValueError when the bytes are not exactly one."""
        document: dict[str, Any] = unseal(data)
        try:
            values = {each.name: document[each.name] for each in fields(cls)}
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            found = cls(**values)
            found._check_types()
            same = found.to_bytes() == data
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a {cls.__name__.lower()}: {error!r}") from error
        if not same:
            raise ValueError(f"not a {cls.__name__.lower()} of this schema")
        return found

    def _check_types(self) -> None:
        """Raise ValueError where a value is not of its type, whoever has sealed it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Request(_Document):
    """Rows that are to be removed; from its file on, a removal has begun and can be finished.

    Attributes:
        number: from 1.
        store_uuid: the store.
        asked: time in UTC, ISO 8601; for people alone.
        key: of the store's ids, in hex; the same in all its requests.
        ids: id of each distinct row, in hex, sorted.
        commits: number of commits before.
        commit_before: sha256 of the newest of them.
    """

    number: int
    store_uuid: str
    asked: str
    key: str
    ids: tuple[str, ...]
    commits: int
    commit_before: str | None

    def _check_types(self) -> None:
        whole(self.number, "number", least=1)
        for name in ("store_uuid", "asked"):
            text(getattr(self, name), name)
        hexadecimal(self.key, "key", HASH_BYTES)
        for one in each_of(self.ids, "ids"):
            hexadecimal(one, "an id", HASH_BYTES)
        whole(self.commits, "commits")
        if self.commit_before is not None:
            sha256(self.commit_before, "commit_before")


@dataclass(frozen=True)
class Receipt(_Document):
    """Statement that nothing of a request's rows is left in the store.

    Attributes:
        number: the request's.
        store_uuid: the store.
        request_sha256: seal of the request.
        asked: the request's time.
        done: time in UTC, ISO 8601; for people alone.
        commit_before: the request's.
        commit_after: sha256 of the newest commit after it.
        rows: positions without features now, of each generation written anew.
        removed: full names of the generations whose files were removed.
        texts: sha256 of the row sets whose text was removed.
        chunk_bytes: bytes of the removed generations' chunks.
    """

    number: int
    store_uuid: str
    request_sha256: str
    asked: str
    done: str
    commit_before: str | None
    commit_after: str | None
    rows: Mapping[str, int]
    removed: tuple[str, ...]
    texts: tuple[str, ...]
    chunk_bytes: int

    def _check_types(self) -> None:
        whole(self.number, "number", least=1)
        for name in ("store_uuid", "asked", "done"):
            text(getattr(self, name), name)
        sha256(self.request_sha256, "request_sha256")
        for commit in (self.commit_before, self.commit_after):
            if commit is not None:
                sha256(commit, "the seal of a commit")
        for name, count in mapping(self.rows, "rows").items():
            whole(count, f"rows of {name}")
        for name in each_of(self.removed, "removed"):
            text(name, "a generation's name")
        for each in each_of(self.texts, "texts"):
            sha256(each, "the sha256 of a row set")
        whole(self.chunk_bytes, "chunk_bytes")


def row_ids(rows: RowSet, key: str) -> list[str]:
    """Compute the id of each row, in hex.

    Args:
        rows: n rows.
        key: the store's, in hex.
    """
    return list(_ids(rows, key))


def _ids(rows: RowSet, key: str) -> Iterator[str]:
    secret, data = bytes.fromhex(key), np.ascontiguousarray(rows.hashes).tobytes()
    for i in range(0, len(data), HASH_BYTES):
        one = data[i : i + HASH_BYTES]
        yield hashlib.blake2b(one, key=secret, digest_size=HASH_BYTES).hexdigest()


def asked_for(rows: RowSet, key: str, ids: set[str]) -> np.ndarray:
    """Return (n,) bool, True for the rows that a request names and that are still there."""
    named = np.fromiter((one in ids for one in _ids(rows, key)), bool, len(rows))
    return np.asarray(named & ~rows.forgotten)
