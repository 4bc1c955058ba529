"""The record of one unit: what each of its chunk files must be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import google_crc32c
import numpy as np

from gradstore.format.canonical import Json, seal, sealed, unseal
from gradstore.format.layout import SCHEMA_VERSION
from gradstore.format.plans import UnitRange


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
        return record, found
