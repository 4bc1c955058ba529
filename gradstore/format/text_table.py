"""Form of the table that keeps the text of a row set, in Parquet files that any reader opens.

A table is cut into parts, so that one is held in memory at a time: `texts/<sha256>/<part>.parquet`,
where sha256 is that of the ordered row hashes. Letters: n rows.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from gradstore.format.canonical import Json, canonical_json
from gradstore.format.records import HASH_BYTES, RowSet
from gradstore.format.typed import sha256, whole

if TYPE_CHECKING:
    import pyarrow as pa

TEXTS = "texts"

#: Data set name -> what a reader needs to know of the columns of its rows: LlamaFactory's entry in
#: dataset_info.json (formatting, columns, tags).
Formats = Mapping[str, Mapping[str, Json]]
#: Key of a file's metadata that keeps them.
FORMATS = b"dataset_info"

#: A part ends with the row that brings its text to so many bytes, or with so many rows.
PART_BYTES = 64 << 20
PART_ROWS = 1 << 16
#: Rows that are decompressed together; as many as a unit of features has.
GROUP_ROWS = 256


class Text(NamedTuple):
    """Prompt and answer of a row, for people.

    Attributes:
        prompt: what is not learned: system text, earlier turns, the request.
        response: the answer.
        tokens: tokens of the whole row as the model reads it.
        original: the row as its file has it, as JSON; None where that is unknown or has no JSON.
    """

    prompt: str
    response: str
    tokens: int
    original: str | None = None


@dataclass(frozen=True)
class RowText:
    """A row of the table.

    Attributes:
        row: position in the processed data set.
        data_set: name of the data set it comes from; None where that is unknown.
        source_row: index in that data set's file.
        prompt: as in `Text`.
        response: as in `Text`.
        tokens: as in `Text`.
        row_hash: hash of its token ids and labels, in hex.
        original: as in `Text`.
    """

    row: int
    data_set: str | None
    source_row: int | None
    prompt: str
    response: str
    tokens: int
    row_hash: str
    original: str | None = None


@dataclass(frozen=True)
class TextPart:
    """One file of a table, as a commit names it.

    Attributes:
        rows: rows in it.
        bytes: size of the file.
        sha256: of its bytes, in hex.
    """

    rows: int
    bytes: int
    sha256: str

    def to_list(self) -> list[Json]:
        """Return the values that stand in a commit."""
        return [self.rows, self.bytes, self.sha256]


@dataclass(frozen=True)
class TextTable:
    """The table of one row set, as a commit names it.

    Attributes:
        rows_sha256: `RowSet.sha256` of its rows.
        parts: its files, in the order of the rows; none where a commit retires it.
    """

    rows_sha256: str
    parts: tuple[TextPart, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return sum(part.rows for part in self.parts)

    def to_dict(self) -> dict[str, Json]:
        """Return what a commit keeps."""
        return {"rows_sha256": self.rows_sha256, "parts": [part.to_list() for part in self.parts]}

    @classmethod
    def from_dict(cls, document: Json) -> TextTable:
        """Read what `to_dict` gave; raise ValueError, KeyError or TypeError for anything else."""
        sha = sha256(document["rows_sha256"], "rows_sha256")
        parts = tuple(TextPart(*part) for part in document["parts"])
        for part in parts:
            whole(part.rows, "rows of a part", least=1)
            whole(part.bytes, "bytes of a part", least=1)
            sha256(part.sha256, "sha256 of a part")
        return cls(sha, parts)


def texts_path(rows_sha256: str) -> str:
    """Return the path of the folder of a table."""
    return f"{TEXTS}/{rows_sha256}"


def part_path(rows_sha256: str, part: int) -> str:
    """Return the path of one file of a table."""
    return f"{texts_path(rows_sha256)}/{part}.parquet"


def schema() -> pa.Schema:
    """Return the columns of a table."""
    import pyarrow as pa

    columns = (
        ("row", pa.int64()),
        ("data_set", pa.string()),
        ("source_row", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("tokens", pa.int32()),
        ("row_hash", pa.binary(HASH_BYTES)),
        ("original", pa.string()),
    )
    return pa.schema([pa.field(name, kind) for name, kind in columns])


def part_bytes(rows: RowSet, first: int, texts: Sequence[Text], formats: Formats) -> bytes:
    """Build the file of the rows from `first` on, one for each text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = range(first, first + len(texts))
    origins: Sequence[tuple[str | None, int | None]] = (
        [(None, None)] * len(texts) if rows.sources is None else rows.sources[first : numbers.stop]
    )
    table = pa.table(
        [
            pa.array(numbers),
            [name for name, _ in origins],
            [row for _, row in origins],
            [sound(text.prompt) for text in texts],
            [sound(text.response) for text in texts],
            [text.tokens for text in texts],
            [rows.hashes[i].tobytes() for i in numbers],
            [None if text.original is None else sound(text.original) for text in texts],
        ],
        schema=schema().with_metadata({FORMATS: canonical_json(formats)}),
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", row_group_size=GROUP_ROWS)
    return buffer.getvalue()


def same_rows(one: bytes, other: bytes) -> bool:
    """Tell whether two files hold the same rows, whatever release of the library wrote each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        left, right = (pq.read_table(pa.BufferReader(data)) for data in (one, other))
    except (pa.ArrowException, OSError):
        return False
    return bool(left.equals(right, check_metadata=True))


def sound(text: str) -> str:
    r"""Return text that UTF-8 can spell: half a surrogate pair, which JSON lets through, is marked.

    >>> sound("a\ud800b")
    'a?b'
    """
    return text.encode("utf-8", "replace").decode("utf-8")


def rows_of(found: pa.Table) -> list[RowText]:
    """Convert rows of a table."""
    given: list[dict[str, Any]] = found.to_pylist()
    return [RowText(**{**row, "row_hash": row["row_hash"].hex()}) for row in given]


def sha256_of_rows(hashes: pa.ChunkedArray) -> str:
    """Compute `RowSet.sha256` of a table's column `row_hash`."""
    digest = hashlib.sha256()
    for one in hashes.to_pylist():
        digest.update(one)
    return digest.hexdigest()
