"""The plan of a generation: its rows, in order, cut into fixed units before any gradient is taken.

n never changes after the plan is written, units do not depend on who works on them, and the
exactly-once key is (generation, row).
"""

from __future__ import annotations

import hashlib
import io
import json
from binascii import hexlify, unhexlify
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.canonical import Json, around_seal, plain, unseal_head
from gradstore.format.layout import (
    DTYPES_VERSION,
    FIRST_DTYPES,
    FORGOTTEN_VERSION,
    LOSSES_VERSION,
    MAX_DIM,
    MAX_UNIT_ROWS,
    SCHEMA_VERSION,
    UNIT_ROWS,
    ArraySpec,
    arrays,
    check_dtype,
)
from gradstore.format.names import GenerationName, check_space
from gradstore.format.records import HASH_BYTES, GenerationRecord, RowSet
from gradstore.format.sources import Sources
from gradstore.format.typed import each_of, mapping, sha256, text, whole

#: Bytes of the member that holds a document's seal.
_SEAL_BYTES = len(b'"sha256":"",') + hashlib.sha256().digest_size * 2

_KEYS = {
    "schema_version",
    "generation",
    "space",
    "provenance_sha256",
    "record",
    "dim",
    "dtype",
    "unit_rows",
    "row_count",
    "source_names",
    "sha256",
}


@dataclass(frozen=True, order=True, slots=True)
class UnitRange:
    """Unit `index`: the rows `start` to `stop`, half-open."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Planned content of one generation.

    Attributes:
        name: full name, with attempt.
        space: the space whose provenance it shares.
        provenance_sha256: seal of that provenance.
        record: what made it.
        rows: its n rows in order.
        dim: d.
        dtype: one of `layout.FeatureDtype`.
        unit_rows: rows per unit; only the last unit may hold fewer.
        losses: a loss is kept for each row; the document of a plan without does not say so, as
            those of the first schema do not.
    """

    name: str
    space: str
    provenance_sha256: str
    record: GenerationRecord
    rows: RowSet
    dim: int
    dtype: str
    unit_rows: int = UNIT_ROWS
    losses: bool = False

    def __post_init__(self) -> None:
        check_space(self.space)
        check_dtype(self.dtype)
        if str(GenerationName.parse(self.name).base()) != self.record.name:
            raise BadInput(
                f"plan {self.name!r} records generation {self.record.name!r}; "
                "give both the same name"
            )
        if not 1 <= self.dim <= MAX_DIM or not 1 <= self.unit_rows <= MAX_UNIT_ROWS:
            raise BadInput(
                f"plan {self.name!r} has d={self.dim} and {self.unit_rows} rows per unit; d must "
                f"be 1 to {MAX_DIM}, unit_rows 1 to {MAX_UNIT_ROWS}"
            )

    @cached_property
    def units(self) -> tuple[UnitRange, ...]:
        """All units, in order."""
        n, size = len(self.rows), self.unit_rows
        return tuple(UnitRange(i, s, min(s + size, n)) for i, s in enumerate(range(0, n, size)))

    @property
    def schema_version(self) -> int:
        """The first schema that has words for it."""
        newer = {LOSSES_VERSION} if self.losses else set()
        newer |= set() if self.dtype in FIRST_DTYPES else {DTYPES_VERSION}
        newer |= {FORGOTTEN_VERSION} if self.rows.forgotten.any() else set()
        return max({SCHEMA_VERSION} | newer)

    @cached_property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of the generation, features first."""
        return arrays(self.dim, self.dtype, self.losses)

    @cached_property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Bytes of one chunk of each of `arrays`."""
        return tuple(spec.chunk_bytes(self.unit_rows) for spec in self.arrays)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of all chunks."""
        return len(self.units) * sum(self.chunk_sizes)

    def identity(self) -> dict[str, Json]:
        """Return the fields that must be equal for an earlier attempt to be reused or resumed."""
        return {
            **self.record.identity(),
            "provenance": self.provenance_sha256,
            "space": self.space,
            "rows": self.rows.sha256,
            "dim": self.dim,
            "dtype": self.dtype,
        }

    def to_bytes(self) -> bytes:
        """Return the bytes of the sealed document."""
        out, pieces = io.BytesIO(), self._pieces()
        out.write(next(pieces))
        out.write(b'"sha256":"%s",' % self.sha256.encode())
        out.writelines(pieces)
        return out.getvalue()

    @property
    def sha256(self) -> str:
        """Seal of the document."""
        return self._seal_and_size[0]

    @property
    def byte_count(self) -> int:
        """Bytes of the sealed document."""
        return self._seal_and_size[1]

    @cached_property
    def _seal_and_size(self) -> tuple[str, int]:
        digest, size = hashlib.sha256(), _SEAL_BYTES
        for piece in self._pieces():
            digest.update(piece)
            size += len(piece)
        return digest.hexdigest(), size

    def _pieces(self) -> Iterator[bytes]:
        """Give the document without its seal: what comes before the seal, and the rest by unit."""
        sources = self.rows.sources
        before, after = around_seal(
            plain(
                {
                    "schema_version": self.schema_version,
                    "generation": self.name,
                    "space": self.space,
                    "provenance_sha256": self.provenance_sha256,
                    "record": self.record.to_dict(),
                    "dim": self.dim,
                    "dtype": self.dtype,
                    "unit_rows": self.unit_rows,
                    "row_count": len(self.rows),
                    "source_names": None if sources is None else sources.names,
                    **({"losses": True} if self.losses else {}),
                }
            )
        )
        yield b"{" + before + b","
        yield after + b',"units":['
        for unit in self.units:
            yield _spelled(unit.start, unit.stop, self.rows.hashes, sources)
        yield b"]}"

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[Plan, str]:
        """Read a plan and its seal.

        Raises:
            BadInput: a position is planned twice (or the units leave a gap).
            ValueError: the bytes are not a plan, or a value in them is not of its type.
        """
        document, first = unseal_head(data, "units")
        losses = document.get("losses", False)
        if losses is not ("losses" in document) or set(document) - {"losses"} != _KEYS:
            raise ValueError("missing or unknown fields")
        _check_types(document)
        try:
            rows = _read_rows(document, data, first)
        except (TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a plan: {error!r}") from error
        try:
            plan = cls(
                name=document["generation"],
                space=document["space"],
                provenance_sha256=document["provenance_sha256"],
                record=GenerationRecord.from_dict(document["record"]),
                rows=rows,
                dim=document["dim"],
                dtype=document["dtype"],
                unit_rows=document["unit_rows"],
                losses=losses,
            )
        except BadInput as error:
            raise ValueError(f"not a plan: {error}") from error
        if document["schema_version"] != plan.schema_version:
            raise ValueError("another schema")
        return plan, document["sha256"]


def seal_of_plan(data: bytes) -> str:
    """Return the seal of a plan, after checking that its bytes have it, without reading its rows.

    Raises:
        ValueError: they are not a sealed plan's.
    """
    return str(unseal_head(data, "units")[0]["sha256"])


def _check_types(document: dict[str, Json]) -> None:
    """Raise ValueError where a member of a plan is not of its type, whoever has sealed it."""
    for name in ("schema_version", "dim", "unit_rows", "row_count"):
        whole(document[name], name, least=1)
    for name in ("generation", "space", "dtype"):
        text(document[name], name)
    sha256(document["provenance_sha256"], "provenance_sha256")
    mapping(document["record"], "record")
    if document["source_names"] is not None:
        for name in each_of(document["source_names"], "source_names"):
            text(name, "a source's name")


def _spelled(start: int, stop: int, hashes: np.ndarray, sources: Sources | None) -> bytes:
    """Spell the unit of rows `start` to `stop` of (n, 16) hashes, after the comma before it."""
    spelled = b'%s{"row_hash":"%s","rows":[%d,%d]' % (
        b"," if start else b"",
        hexlify(np.ascontiguousarray(hashes[start:stop]).data),
        start,
        stop,
    )
    if sources is not None:
        pairs = np.column_stack((sources.code[start:stop], sources.row[start:stop]))
        each = b"[%d,%d]," * len(pairs) % tuple(pairs.ravel().tolist())
        spelled += b',"sources":[' + each[:-1] + b"]"
    return spelled + b"}"


def _read_rows(document: dict[str, Json], data: bytes, at: int) -> RowSet:
    """Read the rows of a plan, unit by unit; each must be spelled as it would be written.

    Args:
        document: the plan's other members.
        data: the whole plan.
        at: where its first unit begins.
    """
    n, names = document["row_count"], document["source_names"]
    if n * 2 * HASH_BYTES > len(data):
        raise ValueError("row_count does not fit the row hashes")
    hashes = np.empty((n, HASH_BYTES), np.uint8)
    sources = None
    if names is not None:
        sources = Sources(names, np.empty(n, np.int32), np.empty(n, np.int64))
    for start in range(0, n, document["unit_rows"]):
        stop = min(start + document["unit_rows"], n)
        unit = data[at : data.index(b"}", at) + 1]
        at += len(unit)
        before, after = unit.split(b'","rows":')
        if not after.startswith(b"[%d,%d]" % (start, stop)):
            raise BadInput(
                f"the plan of {document['generation']} does not hold each of its {n:,} positions "
                "exactly once; start another store with gradstore=PATH"
            )
        found = unhexlify(before[before.rindex(b'"') + 1 :])
        hashes[start:stop] = np.frombuffer(found, np.uint8).reshape(-1, HASH_BYTES)
        if sources is not None:
            numbers = after[after.index(b"[[") :].translate(None, b"[]}")
            pairs = np.fromiter(json.loads(b"[%s]" % numbers), np.int64)
            sources.code[start:stop], sources.row[start:stop] = pairs.reshape(-1, 2).T
        if unit != _spelled(start, stop, hashes, sources):
            raise ValueError(f"the unit of rows {start} to {stop} is not in canonical form")
    if data[at:] != b"]}":
        raise ValueError("row_count does not fit the row hashes")
    if sources is not None and not 0 <= sources.code.min() <= sources.code.max() < len(names):
        raise ValueError("a row's source is none of the names")
    hashes.flags.writeable = False
    return RowSet(hashes, sources)
