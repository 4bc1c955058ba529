"""Chosen rows as a data set: files that LlamaFactory and `datasets` take as they are."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.foreign import read_object
from gradstore.format.names import quote
from gradstore.format.records import LOADED_FROM, GenerationRecord
from gradstore.format.text_table import RowText
from gradstore.store.texts import RowTexts

#: Columns that are added to a row's own.
SCORE, RANK = "dataflex_score", "dataflex_rank"
#: What LlamaFactory looks for in a folder of data sets.
INFO = "dataset_info.json"
#: Columns of a row that name files beside its own.
MEDIA = ("images", "videos", "audios")


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something already, before anything is computed for it."""
    if folder.name in ("", ".."):
        raise BadInput(f'"{folder}" cannot be made anew: name a new folder with --as-dataset.')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadInput(f'"{folder}" is not empty: name a new folder with --as-dataset.')


def write_dataset(
    folder: Path,
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.floating],
    texts: RowTexts | None,
) -> list[str]:
    """Write chosen rows as a folder that is a LlamaFactory `dataset_dir`, whole or not at all.

    For each data set that rows come from: `<name>.jsonl` in the data set's own format and columns,
    best row first, with `dataflex_score` and `dataflex_rank` (1 for the best of all), an entry in
    dataset_info.json, and a split for `datasets.load_from_disk(folder)`.

    Args:
        folder: must not exist yet, or be empty.
        rows: (k,) int, in the order of choice.
        scores: (n,) float, one for each row of the training set.
        texts: of the training rows.

    Returns:
        Names of the data sets written, most rows first.

    Raises:
        BadInput: the folder holds something, or a row's original is unknown.
        StoreIOError: the folder cannot be written.
    """
    if texts is None:
        raise BadInput(
            "this store keeps no text, so its rows cannot be written as a data set: run "
            "`dataflex-cli gradstore build` again with store_text: true."
        )
    check_folder(folder)
    by_set: dict[str, list[dict[str, Any]]] = {}
    for rank, (row, text) in enumerate(zip(rows, texts.read(rows), strict=True), start=1):
        name, original = _original(text)
        extra = {SCORE: float(scores[row]), RANK: rank}
        by_set.setdefault(name, []).append({**original, **extra})
    names = sorted(by_set, key=lambda name: -len(by_set[name]))
    partial = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        _write(partial, {name: by_set[name] for name in names}, texts.formats)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise StoreIOError(
            f'cannot write "{folder}": {error.strerror or error}; choose a folder that may be '
            "written and has room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return names


def training_keys(
    folder: Path, names: Sequence[str], texts: RowTexts, record: GenerationRecord
) -> str:
    """Give the keys of LlamaFactory that train on the data sets written.

    Pictures keep the names that rows give them, which LlamaFactory looks for below `media_dir`; it
    is `dataset_dir` unless it is set, so the folder they lie in is named.
    """
    keys = f"dataset_dir={folder} dataset={','.join(names)}"
    columns = {key for name in names for key in _columns(texts.formats.get(name, {}))}
    if not columns & set(MEDIA):
        return keys
    held: Any = record.libraries.get(LOADED_FROM) or {}
    given = held.get("arguments", {})
    place = given.get("media_dir") or given.get("dataset_dir")
    return f"{keys} media_dir={place or 'FOLDER_OF_THE_PICTURES'}"


def _columns(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = entry.get("columns") or {}
    return found


def _original(text: RowText) -> tuple[str, dict[str, Any]]:
    """Give data set and content of a row as its file has it."""
    if text.data_set is None or text.original is None:
        raise BadInput(
            f"row {text.row} cannot be written in its own format: its file is unknown (packed "
            "rows, rows of tokenized_path), or it holds what JSON cannot spell. Use -o instead."
        )
    original = read_object(text.original)
    if taken := {SCORE, RANK} & set(original):
        raise BadInput(
            f"data set {text.data_set!r} has a column {taken.pop()!r} already: rename it, and "
            "build the store again."
        )
    return text.data_set, original


def _write(
    folder: Path, by_set: Mapping[str, Sequence[dict[str, Any]]], formats: Mapping[str, Any]
) -> None:
    from datasets import DatasetDict

    info = {}
    for name, rows in by_set.items():
        file = folder / f"{quote(name)}.jsonl"
        # Half a surrogate pair is no UTF-8; with a backslash it is the JSON of itself.
        with file.open("w", encoding="utf-8", errors="backslashreplace") as lines:
            lines.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        info[name] = {"file_name": file.name, **formats.get(name, {})}
    files = {INFO, "dataset_dict.json", *(entry["file_name"] for entry in info.values())}
    splits: dict[str, Any] = {}
    for name, rows in by_set.items():
        split = quote(name)
        while split in files:  # a split is a folder beside them
            split += "_"
        splits[split] = _as_table(name, rows)
    with _without_bars():
        DatasetDict(splits).save_to_disk(folder)
    text = json.dumps(info, indent=2, ensure_ascii=False)
    (folder / INFO).write_text(f"{text}\n", encoding="utf-8")


def _as_table(name: str, rows: Sequence[dict[str, Any]]) -> Any:  # noqa: ANN401 - a Dataset
    """Make a `datasets.Dataset` of rows, with every column that one of them has."""
    from datasets import Dataset
    from pyarrow import ArrowException

    columns = dict.fromkeys(column for row in rows for column in row)
    try:
        return Dataset.from_list([{key: row.get(key) for key in columns} for row in rows])
    except (ArrowException, OverflowError, TypeError, UnicodeError) as error:
        raise BadInput(
            f"the rows chosen of data set {name!r} do not go into one table ({error}): a column "
            "holds values of several types, or one beyond 64 bits. Write them with -o instead."
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep `datasets` from a bar for each split."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
