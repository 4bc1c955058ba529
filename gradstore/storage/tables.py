"""Tables for people and other programs: Parquet, CSV or JSON lines, as the file's name says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from gradstore.errors import BadInput
from gradstore.storage.replace import replace_file

if TYPE_CHECKING:
    import pyarrow as pa

SUFFIXES = (".parquet", ".csv", ".jsonl")


def check_suffix(path: Path) -> None:
    """Refuse a file name whose ending names no format, before anything is computed for it."""
    if path.suffix not in SUFFIXES:
        raise BadInput(
            f"output is {str(path)!r}; its name must end in one of {', '.join(SUFFIXES)}, which "
            "says how it is written."
        )


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table, whole or not at all.

    Args:
        path: its suffix says how, one of `SUFFIXES`.
        table: columns of numbers, booleans and text.

    Raises:
        BadInput: another suffix.
        StoreIOError: the file cannot be written.
    """
    check_suffix(path)
    buffer = io.BytesIO()
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, buffer)
    elif path.suffix == ".csv":
        from pyarrow import csv

        csv.write_csv(table, buffer)
    else:
        for batch in table.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                buffer.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
    replace_file(path, buffer.getvalue())
