"""The record of one unit: what each of its chunk files must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import google_crc32c
import numpy as np

from gradstore.format.canonical import Json, seal, sealed, unseal
from gradstore.format.layout import CRC_BYTES, SCHEMA_VERSION, RowStatus
from gradstore.format.plans import UnitRange
from gradstore.format.typed import mapping, sha256, text, whole

_STATUSES = frozenset(status.name.lower() for status in RowStatus)
_CRC_MOST = (1 << 32) - 1


def crc32c(data: bytes | memoryview) -> int:
    """Compute the Castagnoli checksum of `data`."""
    return int(google_crc32c.value(np.frombuffer(data, dtype=np.uint8)))


@dataclass(frozen=True, slots=True)
class FileSeal:
    """Expected size and checksums of a chunk's file.

    Attributes:
        bytes: its exact size.
        crc32c: checksum of the values, which are all but its last 4 bytes.
        sha256: hash of the whole file.
    """

    bytes: int
    crc32c: int
    sha256: str


@dataclass(frozen=True)
class UnitRecord:
    """`units/<u>.json`: a unit is done when this exists and verifies.

    Attributes:
        generation: full name of the generation.
        unit: which unit, and its rows.
        plan_sha256: seal of the plan it belongs to.
        files: chunk path within the generation -> what it must be.
        status: number of rows per status name; absent ones have none.
    """

    generation: str
    unit: UnitRange
    plan_sha256: str
    files: Mapping[str, FileSeal]
    status: Mapping[str, int]

    def to_dict(self) -> dict[str, Json]:
        """Return the sealed document."""
        return seal(self._body())

    def _body(self) -> dict[str, Json]:
        return {
            "schema_version": SCHEMA_VERSION,
            "generation": self.generation,
            "unit": self.unit.index,
            "rows": [self.unit.start, self.unit.stop],
            "plan_sha256": self.plan_sha256,
            "files": {
                name: {"bytes": each.bytes, "crc32c": each.crc32c, "sha256": each.sha256}
                for name, each in self.files.items()
            },
            "status": self.status,
        }

    @property
    def chunk_bytes(self) -> int:
        """Bytes of all its chunks."""
        return sum(each.bytes for each in self.files.values())

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[UnitRecord, str]:
        """Read a record and its seal; raise ValueError when the bytes are not exactly one."""
        try:
            document = json.loads(data)
            record = cls(
                generation=document["generation"],
                unit=UnitRange(document["unit"], *document["rows"]),
                plan_sha256=document["plan_sha256"],
                files={name: FileSeal(**each) for name, each in document["files"].items()},
                status=document["status"],
            )
            expected, found = sealed(record._body())
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            unseal(data)
            raise ValueError(f"not a unit record: {error!r}") from error
        if expected != data:
            unseal(data)
            raise ValueError("not a unit record of this schema")
        record._check_types()
        return record, found

    def _check_types(self) -> None:
        """Raise ValueError where a value is not of its type, whoever has sealed it."""
        text(self.generation, "generation")
        whole(self.unit.index, "unit")
        whole(self.unit.stop, "the end of rows", least=whole(self.unit.start, "the first row") + 1)
        sha256(self.plan_sha256, "plan_sha256")
        for name, each in self.files.items():
            whole(each.bytes, f"bytes of {name}", least=CRC_BYTES + 1)
            whole(each.crc32c, f"crc32c of {name}", most=_CRC_MOST)
            sha256(each.sha256, f"sha256 of {name}")
        for status, count in mapping(self.status, "status").items():
            whole(count, f"rows of status {status}")
            if status not in _STATUSES:
                raise ValueError(f"{status!r} is no status of a row")
