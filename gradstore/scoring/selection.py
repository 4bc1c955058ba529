"""Scores -> rows: the one place that decides ties, counts and what is left out.

Letters: n rows, k chosen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gradstore.errors import BadInput, expect, expect_path
from gradstore.format.records import HASH_BYTES
from gradstore.format.sources import check_sources
from gradstore.scoring.plain_rows import as_numbers
from gradstore.storage.replace import replace_file
from gradstore.storage.tables import check_suffix, write_table
from gradstore.store.texts import RowTexts


def select_top(
    scores: npt.NDArray[np.floating] | torch.Tensor | Sequence[float],
    k: int,
    *,
    usable: npt.NDArray[np.bool_] | torch.Tensor | None = None,
) -> npt.NDArray[np.int64]:
    """Select the k rows with the highest scores, best first; ties go to the lower row.

    The choice is made on the CPU from the exact values, so it is the same for tensors on any
    device. 0.0 and -0.0 tie. A nan score is never chosen.

    Args:
        scores: (n,) float.
        k: how many rows; any number from 1 to the usable rows.
        usable: (n,) bool; None means every row whose score is not nan.

    Returns:
        (k,) int64 rows.

    Raises:
        BadInput: k is no whole number, below 1, or above the usable rows; shapes that do not fit.

    Examples:
        >>> select_top([0.1, 0.7, float("nan"), 0.7], 2).tolist()
        [1, 3]
    """
    values = _vector(scores)
    allowed = ~np.isnan(values)
    if usable is not None:
        mask = usable.detach().cpu().numpy() if isinstance(usable, torch.Tensor) else usable
        mask = np.asarray(mask)
        if mask.shape != values.shape or mask.dtype != bool:
            raise BadInput(
                f"usable is {mask.dtype} of shape {mask.shape}; give True or False for each of the "
                f"{values.size} rows"
            )
        allowed &= mask
    rows = np.flatnonzero(allowed)
    count = check_k(k, rows.size, values.size)
    kept = values[rows]
    # Everything at or above the k-th value, then one stable sort of the few that are left: rows
    # stay ascending among equals, and n rows are never sorted.
    threshold = np.partition(kept, rows.size - count)[rows.size - count]
    rows = rows[kept >= threshold]
    order = np.argsort(-values[rows], kind="stable")[:count]
    return np.asarray(rows[order], dtype=np.int64)


def check_k(k: object, usable_rows: int, rows: int) -> int:
    """Check the number of rows to choose and return it.

    Args:
        k: what the user asked for.
        usable_rows: how many can be chosen.
        rows: how many there are.

    Raises:
        BadInput: k is no whole number (True and 5.0 are not), below 1, or above `usable_rows`.
    """
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise BadInput(f"asked {k!r} rows; k must be a whole number from 1 to {usable_rows}")
    if k < 1:
        raise BadInput(f"asked {k} rows; k must be from 1 to {usable_rows}")
    if k > usable_rows:
        raise BadInput(
            f"asked {k}, {usable_rows} usable, {rows - usable_rows} skipped; "
            f"ask for at most {usable_rows}"
        )
    return int(k)


def rows_for_fraction(fraction: float, usable: int) -> int:
    """Compute the number of rows in a fraction of the usable rows: rounded down, but at least 1.

    Args:
        fraction: above 0, at most 1.
        usable: number of usable rows.

    Raises:
        BadInput: a fraction outside (0, 1], or no usable row.

    Examples:
        >>> rows_for_fraction(0.05, 270_679), rows_for_fraction(0.29, 100)
        (13533, 29)
    """
    if isinstance(fraction, bool) or not 0 < fraction <= 1:
        raise BadInput(f"fraction is {fraction}; choose one above 0 and at most 1")
    if usable < 1:
        raise BadInput(
            "no usable row to choose a fraction of; see why rows were skipped, and export again"
        )
    # As written in decimal: 0.29 * 100 is 28.999999999999996 in binary.
    return max(1, int(Decimal(repr(float(fraction))) * usable))


def write_selected(
    path: str | os.PathLike[str],
    rows: npt.NDArray[np.integer],
    scores: npt.NDArray[np.floating],
    *,
    sources: Sequence[tuple[str, int]] | None = None,
    row_hashes: npt.NDArray[np.uint8] | None = None,
    texts: RowTexts | None = None,
) -> None:
    """Write the selected rows, atomically: JSON lines, CSV or Parquet as the name ends.

    One line per row, best first: `{"rank": 1, "row": 17, "score": 0.41, "source": ["alpaca", 23],
    "row_hash": "9f..."}`, and `prompt` and `response` with `texts`. `row` is the position in the
    processed dataset, `source` the data set's name and the index in its file; in CSV and Parquet
    these are columns `source_set` and `source_row`. An existing file is replaced only once the new
    one is complete.

    Args:
        path: the file.
        rows: (k,) int, in the order of choice.
        scores: (n,) float, one per row of the dataset.
        sources: n pairs, or None (written as null).
        row_hashes: (n, 16) uint8, or None (written as null).
        texts: of the n rows, or None.

    Raises:
        BadInput: a row that there is not, a chosen row without a finite score, sources or hashes
            for other rows, or a file name of no known format.
        StoreIOError: the file cannot be written.
    """
    expect_path(path, "path")
    check_suffix(Path(path))
    scores = _vector(scores)
    _check_per_row(scores.size, sources, row_hashes)
    lines = _lines(_positions(rows, scores.size), scores, sources, row_hashes)
    if texts is not None:
        for line, text in zip(lines, texts.read([line["row"] for line in lines]), strict=True):
            line |= {"prompt": text.prompt, "response": text.response}
    if Path(path).suffix == ".jsonl":
        content = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        replace_file(Path(path), content.encode())
        return
    import pyarrow as pa

    for line in lines:
        line["source_set"], line["source_row"] = line.pop("source") or (None, None)
    columns = {
        "rank": pa.int64(),
        "row": pa.int64(),
        "score": pa.float64(),
        "source_set": pa.string(),
        "source_row": pa.int64(),
        "row_hash": pa.string(),
    }
    if texts is not None:
        columns |= {"prompt": pa.string(), "response": pa.string()}
    schema = pa.schema(list(columns.items()))
    write_table(Path(path), pa.Table.from_pylist(lines, schema=schema))


def _lines(
    rows: Sequence[int],
    scores: npt.NDArray[np.floating],
    sources: Sequence[tuple[str, int]] | None,
    row_hashes: npt.NDArray[np.uint8] | None,
) -> list[dict[str, Any]]:
    """Describe each chosen row, best first; raise BadInput if one has no finite score."""
    lines: list[dict[str, Any]] = []
    for rank, row in enumerate(rows, start=1):
        score = float(scores[row])
        if not np.isfinite(score):
            raise BadInput(f"row {row} is chosen but its score is {score}; choose others")
        line = {
            "rank": rank,
            "row": row,
            "score": score,
            "source": None if sources is None else list(sources[row]),
            "row_hash": None if row_hashes is None else bytes(row_hashes[row]).hex(),
        }
        lines.append(line)
    return lines


def _positions(rows: object, count: int) -> list[int]:
    """Return the positions of chosen rows; raise BadInput unless each is one of 0..count-1."""
    wanted = f"positions (k,) from 0 to {count - 1}, such as select_top returns"
    found = as_numbers(rows, "rows", wanted)
    fits = found.ndim == 1 and (found.dtype.kind in "iu" or found.size == 0)
    if not fits or not ((found >= 0) & (found < count)).all():
        raise BadInput(f"rows are {found.dtype} of shape {found.shape}; give {wanted}.")
    return [int(row) for row in found]


def _check_per_row(count: int, sources: object, row_hashes: object) -> None:
    """Raise BadInput unless there is a source and a hash for each of `count` rows, or none."""
    if sources is not None:
        check_sources(sources, count)
    if row_hashes is not None:
        kind = getattr(row_hashes, "dtype", None), getattr(row_hashes, "shape", None)
        fits = kind == (np.uint8, (count, HASH_BYTES))
        expect(fits, "row_hashes", row_hashes, f"uint8 ({count}, {HASH_BYTES})")


def _vector(
    scores: npt.NDArray[np.floating] | torch.Tensor | Sequence[float],
) -> npt.NDArray[np.floating]:
    """Convert (n,) scores to a NumPy array; bfloat16, absent from NumPy, becomes exact float32."""
    values = as_numbers(scores, "scores", "one number per row")
    if values.ndim != 1:
        raise BadInput(f"scores have shape {values.shape}; one score per row is needed")
    if not np.issubdtype(values.dtype, np.floating):
        values = values.astype(np.float64)
    return values
