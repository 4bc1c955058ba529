"""The kind of each training row, where a column of its file names one."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dataflex.data.rows import SOURCE_ROW, RawRows

#: Columns that say what kind of row it is, the first one that there is counts.
COLUMNS = ("kind", "category", "domain", "skill", "task", "topic", "subject", "type")

#: A column with more values than this names rows, not kinds of them.
MOST = 200

#: Stands for a row whose file has no such column, or no value in it.
NONE = "(none)"


@dataclass(frozen=True)
class Kinds:
    """Assignment of each of n training rows to a kind.

    Attributes:
        column: that names it.
        names: of the kinds.
        of_row: (n,) int64 positions in `names`.
    """

    column: str
    names: tuple[str, ...]
    of_row: npt.NDArray[np.int64]

    def count(self, rows: npt.NDArray[np.int64]) -> dict[str, int]:
        """Count rows (m,) by kind, the largest count first."""
        found = Counter(self.of_row[rows].tolist()).most_common()
        return {self.names[kind]: count for kind, count in found}


def kinds_of(raw: RawRows | None) -> Kinds | None:
    """Find the column that tells the kinds of training rows apart; None where there is none.

    Args:
        raw: the rows as their files hold them; None where their origin is unknown.
    """
    if raw is None:
        return None
    for column in COLUMNS:
        found = _read(raw, column)
        if found is not None and 1 < len(names := tuple(sorted(set(found)))) <= MOST:
            places = {name: i for i, name in enumerate(names)}
            return Kinds(column, names, np.array([places[name] for name in found], np.int64))
    return None


def _read(raw: RawRows, column: str) -> list[str] | None:
    """Read a column of text, of all rows; None where it is no column of text."""
    tables: dict[str, dict[int, str]] = {}
    for name, rows in raw.files.items():
        if column not in rows.column_names:
            continue
        values = rows[column][:]
        if not all(value is None or isinstance(value, str) for value in values):
            return None
        numbered = zip(rows[SOURCE_ROW][:], values, strict=True)
        tables[name] = {row: value for row, value in numbered if value}
    if not tables:
        return None
    return [tables.get(name, {}).get(row, NONE) for name, row in raw.sources]
