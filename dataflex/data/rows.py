"""The rows a run works on: the training set and the target sets, as LlamaFactory processed them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradstore.errors import BadInput
from gradstore.format.records import RowSet, row_hash

if TYPE_CHECKING:
    from datasets import Dataset

    from dataflex.data.texts import RowsText

IGNORED = -100

#: Columns that carry a row's origin; removed again before a collator can see them.
SOURCE_SET = "_source_set"
SOURCE_ROW = "_source_row"


@dataclass(frozen=True)
class Rows:
    """One processed data set.

    Attributes:
        name: the user's name for it.
        dataset: n rows with `input_ids` and (except in stage pt) `labels`.
        sources: (data set name, index in its file) of each row, or None where unknown.
        packed: the same of the rows that were packed into these n, in no order; else None.
    """

    name: str
    dataset: Dataset
    sources: Sequence[tuple[str, int]] | None = None
    packed: tuple[tuple[str, int], ...] | None = None

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self.dataset)

    @cached_property
    def _scan(self) -> tuple[tuple[npt.NDArray[np.int64], ...], RowSet]:
        """One pass over the rows: (n,) lengths, target tokens, largest ids; hashes (n, 16)."""
        numbers, hashes = [], []
        has_labels = "labels" in self.dataset.column_names
        columns = ["input_ids", "labels"] if has_labels else ["input_ids"]
        for row in self.dataset.select_columns(columns):
            ids = row["input_ids"]
            labels = row["labels"] if has_labels else ids
            # The first token is never predicted: its label does not count.
            targets = sum(1 for label in labels[1:] if label != IGNORED)
            numbers.append((len(ids), targets, max(ids, default=-1)))
            hashes.append(row_hash(ids, labels))
        flat = np.frombuffer(b"".join(hashes), dtype=np.uint8).reshape(-1, 16)
        found = np.array(numbers, np.int64).reshape(-1, 3).T
        return tuple(np.ascontiguousarray(column) for column in found), RowSet(flat, self.sources)

    @cached_property
    def contents(self) -> npt.NDArray[np.void]:
        """(n,) keys of 16 bytes, equal where rows are copies: the same tokens, labels and media."""
        keys = self.row_set.hashes
        for column in ("images", "videos", "audios"):
            if column in self.dataset.column_names and any(held := self.dataset[column][:]):
                parts = [key.tobytes() + repr(media).encode()
                         for key, media in zip(keys, held, strict=True)]  # fmt: skip
                digests = b"".join(hashlib.sha256(part).digest()[:16] for part in parts)
                keys = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
        return np.ascontiguousarray(keys).view("V16").ravel()

    def first_of_copies(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return, rising, the first of `rows` (m,) of each content."""
        kept = np.unique(rows)
        return kept[np.sort(np.unique(self.contents[kept], return_index=True)[1])]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) tokens of each row."""
        return self._scan[0][0]

    @property
    def target_tokens(self) -> npt.NDArray[np.int64]:
        """(n,) tokens with a label."""
        return self._scan[0][1]

    @property
    def largest_ids(self) -> npt.NDArray[np.int64]:
        """(n,) largest token id of each row; -1 for a row without a token."""
        return self._scan[0][2]

    @property
    def row_set(self) -> RowSet:
        """Hashes and sources, in dataset order."""
        return self._scan[1]


@dataclass(frozen=True)
class RawRows:
    """Rows as their files hold them, before anything was made of them.

    Attributes:
        sources: (n,) (data set name, index in its file) of each row.
        files: data set name -> its rows with every column they have.
    """

    sources: Sequence[tuple[str, int]]
    files: Mapping[str, Dataset]

    def __len__(self) -> int:
        """Return the number of rows, n."""
        return len(self.sources)

    def numbers(self, column: str) -> npt.NDArray[np.float64]:
        """Read a column as (n,) float64 values; NaN where a row has none.

        Raises:
            BadInput: a data set has no such column, or a value that is no number.
        """
        found: dict[str, dict[int, float]] = {}
        for name in {name for name, _ in self.sources}:
            rows = self.files[name]
            if column not in rows.column_names:
                have = sorted(c for c in rows.column_names if c != SOURCE_ROW)
                raise BadInput(
                    f"data set {name!r} has no column {column!r}; its columns are "
                    f"{', '.join(have)}. Name one of them in score_params.score_field."
                )
            where = f"data set {name!r}, column {column!r}"
            found[name] = dict(
                zip(rows[SOURCE_ROW][:], as_numbers(rows[column][:], where), strict=True)
            )
        return np.array([found[name][row] for name, row in self.sources], dtype=np.float64)


def as_numbers(values: Sequence[Any], where: str) -> list[float]:
    """Convert values of a file to floats; null becomes NaN.

    Raises:
        BadInput: a value is no number; names the place.
    """
    try:
        return [np.nan if value is None else float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise BadInput(
            f"{where}: expected numbers: {error}. Give every row a number, or null for none."
        ) from error


@dataclass(frozen=True)
class Domains:
    """Assignment of each training row to one of k domains.

    Attributes:
        names: (k,) the data sets of `dataset`, in the user's order.
        of_row: (n,) int64, domain of each training row.
        held_out: held-out rows of each domain, where there are any.
    """

    names: tuple[str, ...]
    of_row: npt.NDArray[np.int64]
    held_out: Mapping[str, Rows] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """(k,) rows of each domain."""
        return np.bincount(self.of_row, minlength=len(self.names)).astype(np.int64)


@dataclass(frozen=True)
class RunData:
    """Everything the data side of a run knows before its model is loaded.

    Attributes:
        train: the training rows.
        targets: one entry per target set, in the order the user named them.
        tokenizer: LlamaFactory's, template applied.
        template: name of the chat template.
        data_args: LlamaFactory's DataArguments.
        stage: "sft" or "pt".
        domains: of the training rows, where the run mixes them.
        files: data set name -> its rows before preprocessing, with every column they have; empty
            where the rows come from `tokenized_path`.
        dropped: rows of the training sets that LlamaFactory left out, by reason.
        messages: data set name -> its rows as prompt and response, before they were tokenised;
            empty where the rows come from `tokenized_path`.
        formats: data set name -> form of its rows, as an entry of LlamaFactory's dataset_info.json.
    """

    train: Rows
    targets: tuple[Rows, ...]
    tokenizer: Any
    template: str
    data_args: Any
    stage: str
    domains: Domains | None = None
    files: Mapping[str, Dataset] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    messages: Mapping[str, Dataset] = field(default_factory=dict)
    formats: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def raw(self) -> RawRows | None:
        """The training rows as their files hold them; None where their origin is unknown."""
        sources = self.train.sources
        return None if sources is None else RawRows(sources, self.files)

    def texts(self, rows: Rows) -> RowsText:
        """Return prompt and response of each row of a set of this run; read when asked for."""
        from dataflex.data.texts import RowsText

        return RowsText(rows, self.files, self.messages, self.tokenizer)


def check_rows(data: RunData, *, needs_targets: bool, subtask_sizes: Sequence[int] | None) -> None:
    """Refuse, before a model is loaded, what could only fail later.

    Raises:
        BadInput: an empty or fully masked set, or sub-task sizes that do not add up.
    """
    if len(data.train) == 0 or not data.train.target_tokens.any():
        raise BadInput(
            f"the training set has {len(data.train)} rows and none with a target token. "
            "Check `dataset`, `template` and `cutoff_len`."
        )
    if not needs_targets:
        return
    if not data.targets:
        raise BadInput("no target rows: set target_dataset, eval_dataset or val_size.")
    for rows in data.targets:
        if len(rows) == 0:
            raise BadInput(
                f"target set {rows.name!r} is empty: give it rows, or remove it from "
                "target_dataset."
            )
        if not rows.target_tokens.any():
            raise BadInput(
                f"target set {rows.name!r}: all {len(rows)} rows are masked (no label other than "
                f"{IGNORED}). Give its rows a response, or raise cutoff_len if prompts fill it."
            )
    if subtask_sizes is not None and sum(subtask_sizes) != len(data.targets[0]):
        raise BadInput(
            f"target_subtasks adds up to {sum(subtask_sizes)}, but target set "
            f"{data.targets[0].name!r} has {len(data.targets[0])} rows: make the sizes add up to "
            "them."
        )


def check_intervals(rows: int, warmup_step: int, update_step: int, global_batch: int) -> None:
    """Raise BadInput unless W * B and U * B rows exist (ALGORITHMS 0.4).

    Raises:
        BadInput: names the key, what it asks for, and the largest value that fits.
    """
    for key, steps in (("warmup_step", warmup_step), ("update_step", update_step)):
        if steps * global_batch > rows:
            most = rows // global_batch
            raise BadInput(
                f"{key} is {steps}: at {global_batch} rows a step it asks for "
                f"{steps * global_batch} rows, the training set has {rows}. "
                + (f"Set {key} to at most {most}, or use" if most else "Use")
                + " a smaller batch."
            )


#: DataArguments fields that change which tokens a row has or which of them are targets.
ROW_FIELDS = ("cutoff_len", "train_on_prompt", "mask_history")
