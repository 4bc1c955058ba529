"""The plan of a generation: its rows, in order, cut into fixed units before any gradient is taken.

n never changes after the plan is written, units do not depend on who works on them, and the
exactly-once key is (generation, row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradstore.errors import BadInput
from gradstore.format.canonical import Json, canonical_json, seal, unseal
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
    "units",
    "sha256",
}


@dataclass(frozen=True, order=True)
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

    @property
    def arrays(self) -> tuple[ArraySpec, ...]:
        """The arrays of the generation, features first."""
        return arrays(self.dim, self.dtype, self.losses)

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
        names = sorted({name for name, _ in self.rows.sources or ()})
        return canonical_json(
            seal(
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
                    "source_names": None if self.rows.sources is None else names,
                    "units": [self._unit(unit, names) for unit in self.units],
                    **({"losses": True} if self.losses else {}),
                }
            )
        )

    def _unit(self, unit: UnitRange, names: Sequence[str]) -> dict[str, Json]:
        hashes = np.ascontiguousarray(self.rows.hashes[unit.start : unit.stop]).tobytes().hex()
        document: dict[str, Json] = {"rows": [unit.start, unit.stop], "row_hash": hashes}
        if self.rows.sources is not None:
            number = {name: i for i, name in enumerate(names)}
            sources = self.rows.sources[unit.start : unit.stop]
            document["sources"] = [[number[name], index] for name, index in sources]
        return document

    @classmethod
    def from_bytes(cls, data: bytes) -> tuple[Plan, str]:
        """Read a plan and its seal.

        Raises:
            BadInput: a position is planned twice (or the units leave a gap).
            ValueError: the bytes are not a plan.
        """
        document = unseal(data)
        losses = document.get("losses", False)
        if losses is not ("losses" in document) or set(document) - {"losses"} != _KEYS:
            raise ValueError("missing or unknown fields")
        try:
            rows = _read_rows(document)
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
            if document["schema_version"] != plan.schema_version:
                raise ValueError("another schema")
            ranges = [[unit.start, unit.stop] for unit in plan.units]
            if [unit["rows"] for unit in document["units"]] != ranges:
                raise BadInput(
                    f"the plan of {plan.name} does not hold each of its {len(rows):,} positions "
                    "exactly once; start another store with gradstore=PATH"
                )
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not a plan: {error!r}") from error
        return plan, document["sha256"]


def _read_rows(document: dict[str, Json]) -> RowSet:
    units, names = document["units"], document["source_names"]
    data = bytes.fromhex("".join(unit["row_hash"] for unit in units))
    if len(data) != document["row_count"] * HASH_BYTES:
        raise ValueError("row_count does not fit the row hashes")
    sources = None
    if names is not None:
        sources = tuple((str(names[i]), int(at)) for unit in units for i, at in unit["sources"])
    return RowSet(np.frombuffer(data, dtype=np.uint8).reshape(-1, HASH_BYTES), sources)
