"""The text of a row set, read by position; never a byte before its file's sha256 is checked."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradstore.errors import BadInput, DamagedFile, Fault
from gradstore.format.foreign import read_object
from gradstore.format.text_table import (
    FORMATS,
    GROUP_ROWS,
    Formats,
    RowText,
    TextTable,
    part_path,
    rows_of,
    schema,
    sha256_of_rows,
)
from gradstore.storage.reading import ReadFiles

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


class RowTexts:
    """Prompts and responses of n rows, as one commit published them.

    A file's sha256 is checked before its first use, once per process; reading a row decompresses
    the 256 rows around it. Threads may read at once: each has readers of its own over the checked
    bytes, since a reader of Parquet is for one.
    """

    def __init__(self, files: ReadFiles, table: TextTable) -> None:
        """Take what a commit says; nothing is read yet."""
        self._files = files
        self._table = table
        self._starts = np.cumsum([0, *(part.rows for part in table.parts)])
        self._checked: dict[int, memoryview] = {}
        self._checking = threading.Lock()
        self._mine = threading.local()

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self._table)

    def __repr__(self) -> str:
        return f"<RowTexts: {len(self):,} rows>"

    @property
    def bytes(self) -> int:
        """Bytes of its files."""
        return sum(part.bytes for part in self._table.parts)

    @property
    def formats(self) -> Formats:
        """Data set name -> the form of its rows' `original`, as LlamaFactory's dataset_info.json.

        Raises:
            DamagedData: the first file is not the committed one.
        """
        metadata = self._file(0).schema_arrow.metadata or {}
        with _damage_told(self._files, part_path(self._table.rows_sha256, 0)):
            found: Formats = read_object(metadata.get(FORMATS, b"{}"))
        return found

    def read(self, rows: Sequence[int] | np.ndarray) -> list[RowText]:
        """Read rows, in the order asked for.

        Args:
            rows: positions from 0 to n - 1; one may be asked for twice.

        Raises:
            BadInput: a position that there is not.
            DamagedData: a file is not the committed one.
        """
        wanted = [int(row) for row in rows]
        outside = [row for row in wanted if not 0 <= row < len(self)]
        if outside:
            raise BadInput(f"row {outside[0]} has no text: rows are 0 to {len(self) - 1}")
        groups: dict[tuple[int, int], list[int]] = {}
        for row in sorted(set(wanted)):
            part = int(np.searchsorted(self._starts, row, side="right")) - 1
            within = row - int(self._starts[part])
            groups.setdefault((part, within // GROUP_ROWS), []).append(within % GROUP_ROWS)
        found: dict[int, RowText] = {}
        for (part, group), places in groups.items():
            with_rows = self._group(part, group).take(places)
            found.update((text.row, text) for text in rows_of(with_rows))
        return [found[row] for row in wanted]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Read all rows.

        Args:
            columns: of those of `text_table.schema`; None takes all.

        Raises:
            BadInput: a column that there is not.
            DamagedData: a file is not the committed one.
        """
        import pyarrow as pa

        names = schema().names
        if unknown := [name for name in columns or () if name not in names]:
            raise BadInput(f"texts have no column {unknown[0]!r}; choose of {', '.join(names)}")
        return pa.concat_tables(self.parts(columns))

    def parts(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Read all rows, one file at a time; see `table`."""
        for part in range(len(self._table.parts)):
            file = self._file(part)
            with _damage_told(self._files, part_path(self._table.rows_sha256, part)):
                yield file.read(columns=None if columns is None else list(columns))

    def check(self) -> Iterator[Fault]:
        """Read every file anew and give each fault, without relying on earlier checks."""
        hashes = []
        for part in range(len(self._table.parts)):
            self._forget_checks()  # so that one file is held at a time
            try:
                file = self._file(part)
                with _damage_told(self._files, part_path(self._table.rows_sha256, part)):
                    hashes.append(file.read(columns=["row_hash"])["row_hash"])
            except DamagedFile as error:
                yield error.fault
        self._forget_checks()
        if len(hashes) == len(self._table.parts):
            import pyarrow as pa

            chunks = [chunk for column in hashes for chunk in column.chunks]
            found = sha256_of_rows(pa.chunked_array(chunks))
            if found != self._table.rows_sha256:
                path = part_path(self._table.rows_sha256, 0)
                yield Fault(path, f"rows of sha256 {self._table.rows_sha256}", found)

    def _forget_checks(self) -> None:
        self._checked.clear()
        self._mine = threading.local()

    def _group(self, part: int, group: int) -> pa.Table:
        file = self._file(part)
        with _damage_told(self._files, part_path(self._table.rows_sha256, part)):
            return file.read_row_group(group)

    def _file(self, part: int) -> pq.ParquetFile:
        """Return this thread's reader of a file, whose bytes were compared with the commit."""
        readers: dict[int, pq.ParquetFile] = self._mine.__dict__.setdefault("readers", {})
        if part not in readers:
            with self._checking:
                if part not in self._checked:
                    self._checked[part] = self._check_bytes(part)
            readers[part] = self._reader(part, self._checked[part])
        return readers[part]

    def _check_bytes(self, part: int) -> memoryview:
        """Map a file, and compare its bytes with the commit."""
        expected = self._table.parts[part]
        path = part_path(self._table.rows_sha256, part)
        mapped = self._files.map(path, expected.bytes)
        found = hashlib.sha256(mapped).hexdigest()
        if found != expected.sha256:
            fault = Fault(path, f"sha256 {expected.sha256}", f"sha256 {found}")
            raise DamagedFile(fault, str(self._files.root))
        return mapped

    def _reader(self, part: int, checked: memoryview) -> pq.ParquetFile:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with _damage_told(self._files, part_path(self._table.rows_sha256, part)):
            file = pq.ParquetFile(pa.BufferReader(pa.py_buffer(checked)))
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            whole = groups[:-1] == [GROUP_ROWS] * (len(groups) - 1)
            rows = self._table.parts[part].rows
            if file.schema_arrow != schema() or sum(groups) != rows or not whole:
                raise ValueError("other columns or rows than a table of text has")
        return file


class _damage_told:
    """Context in which what pyarrow cannot read is a damaged file."""

    def __init__(self, files: ReadFiles, path: str) -> None:
        self._files, self._path = files, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Of the kinds that pyarrow's errors are among.
        if isinstance(error, OSError | ValueError | KeyError | NotImplementedError):
            fault = Fault(self._path, "a table of text", str(error))
            raise DamagedFile(fault, str(self._files.root)) from error
