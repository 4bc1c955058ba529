"""Rows as unit vectors of a model's hidden states: generations of a space of their own.

The way of one batch: token ids (b, t) -> `embed` (gradstore.pooling) -> (b, d) of any length ->
unit rows float32 -> the same units, commits and index as gradient features have. There is no
projection: d is the model's hidden size.

Letters: n rows, b batch, t tokens, d hidden size, m rows of a chunk.

```
space = writer.with_space("minilm", {"model": model_hash, "pooling": "mean", ...})
record = embedding_record("train", 0, space="minilm", run_id=run_id, model_hash=model_hash)
generation = space.begin(record, rows, dim=384)
export_embeddings(HiddenStates(model), dataset, collate, generation, lengths=lengths)
generation.commit()
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.disk.generation_writer import GenerationWriter
from gradstore.disk.plans import UnitRange
from gradstore.errors import BadInput
from gradstore.generation import Generation
from gradstore.layout import EMBEDDING, GenerationName, Role, RowStatus, space_run
from gradstore.pooling import Embed, attention_tokens, to_unit
from gradstore.records import GenerationRecord
from gradstore.scoring.scan import unit_rows
from gradstore.units import (
    Batch,
    Collate,
    ExportSummary,
    FeatureRows,
    Lengths,
    UnitFeatures,
    UnitSink,
    join_unit,
    row_status,
    unit_batches,
)


def embedding_record(
    role: Role,
    step: int,
    *,
    space: str,
    run_id: str,
    model_hash: str,
    set: str = "",
    run: str = "",
    options: Mapping[str, Any] | None = None,
    autocast: str = "off",
    attention: str = "eager",
    libraries: Mapping[str, Any] | None = None,
) -> GenerationRecord:
    """What makes a generation of embeddings.

    Args:
        role: train or target.
        step: optimizer step of the training model; 0 for a model that is not trained.
        space: name of the space.
        run_id: id of the training run. Of a model that is not trained, the model's hash does, so
            that other runs find its embeddings again.
        model_hash: the training model's adapter hash, or the hash of the model that is not trained.
        set: name of the target set.
        run: the run's prefix (`gradstore_run`).
        options: pooling, layer and the like; other values are another generation.
        autocast: dtype of autocast, or "off".
        attention: attention implementation.
        libraries: versions, which only warn.
    """
    return GenerationRecord(
        name=str(GenerationName(role, step, set, space_run(space, run))),
        role=role,
        step=step,
        set=set,
        run_id=run_id,
        adapter_hash=model_hash,
        effective_seed=0,
        projection={},
        feature=EMBEDDING,
        feature_options=options or {},
        autocast=autocast,
        attention=attention,
        libraries=libraries or {},
    )


def compute_embedding_unit(
    embed: Embed,
    dataset: Sequence[Any],
    collate: Collate,
    unit: UnitRange,
    *,
    dim: int,
    lengths: Lengths,
    token_budget: int = 2048,
    max_rows: int = 1024,
    longest: int | None = None,
    tokens_of: Callable[[Batch], Tensor] = attention_tokens,
    on_rows: Callable[[int], None] | None = None,
) -> UnitFeatures:
    """Embeddings of one unit: a function of its rows and the model, whoever computes it.

    Args:
        embed: batch -> (b, d) vectors; they are brought to length 1.
        dataset: n rows; `dataset[i]` is what `collate` takes a list of.
        collate: rows -> padded batch.
        unit: which rows.
        dim: d.
        lengths: (n,) tokens of each row; an array, where many units are asked for.
        token_budget: tokens of a padded batch.
        max_rows: rows of a batch, at most.
        longest: rows with more tokens get status `TOO_LONG`; None where `collate` cuts them.
        tokens_of: batch -> (b,) usable tokens; a row with none is `MASKED`.
        on_rows: called with the number of rows each time some are done.

    Raises:
        BadInput: `embed` gives another shape than (b, d).
    """

    def parts() -> Iterator[FeatureRows]:
        for rows, batch in unit_batches(
            dataset, collate, unit, lengths, token_budget, longest, max_rows
        ):
            yield _embedded(rows, embed(batch), tokens_of(batch), dim)

    return join_unit(unit, dim, parts(), lengths, longest, on_rows)


def export_embeddings(
    embed: Embed,
    dataset: Sequence[Any],
    collate: Collate,
    writer: GenerationWriter,
    *,
    lengths: Lengths,
    token_budget: int = 2048,
    longest: int | None = None,
    tokens_of: Callable[[Batch], Tensor] = attention_tokens,
    max_bad_fraction: float = 0.01,
    on_rows: Callable[[int], None] | None = None,
) -> ExportSummary:
    """Write the units of a generation of embeddings that are not done yet; does not commit.

    Args:
        embed: batch -> (b, d) vectors; they are brought to length 1.
        dataset: n rows; `dataset[i]` is what `collate` takes a list of.
        collate: rows -> padded batch.
        writer: from `SpaceWriter.begin` or `StoreWriter.begin`.
        lengths: (n,) tokens of each row.
        token_budget: tokens of a padded batch.
        longest: rows with more tokens get status `TOO_LONG`; None where `collate` cuts them.
        tokens_of: batch -> (b,) usable tokens; a row with none is `MASKED`.
        max_bad_fraction: share of non-finite rows above which the export stops.
        on_rows: called with the number of rows each time some are done.

    Raises:
        BadInput: more than `max_bad_fraction` of the rows have a non-finite embedding, or `embed`
            gives another shape than (b, d).
    """
    sink = UnitSink(writer, max_bad_fraction=max_bad_fraction)
    sizes = np.asarray(lengths, dtype=np.int64)
    for unit in list(writer.pending):
        sink.write(
            compute_embedding_unit(
                embed,
                dataset,
                collate,
                unit,
                dim=writer.plan.dim,
                lengths=sizes,
                token_budget=token_budget,
                longest=longest,
                tokens_of=tokens_of,
                on_rows=on_rows,
            )
        )
    return sink.summary


@dataclass(frozen=True)
class UnitRows:
    """Some rows of a generation, each of length 1.

    Attributes:
        start: first row.
        stop: one past the last row.
        rows: (m, d) float32 unit rows; NaN where the row cannot be used.
        status: (m,) uint8, `RowStatus`.
    """

    start: int
    stop: int
    rows: npt.NDArray[np.float32]
    status: npt.NDArray[np.uint8]


def read_unit_rows(generation: Generation, chunk_rows: int = 4096) -> Iterator[UnitRows]:
    """All rows of a generation, in order, scaled to length 1 again after their storage in 16 bit.

    Args:
        generation: of embeddings, or of gradient features.
        chunk_rows: rows at a time; memory is one chunk, whatever n is.

    Raises:
        BadInput: `chunk_rows` is below 1.
        DamagedData: a chunk is not the committed one.
    """
    if chunk_rows < 1:
        raise BadInput(f"chunk_rows is {chunk_rows}; at least 1 is needed")
    for start in range(0, generation.rows, chunk_rows):
        stop = min(start + chunk_rows, generation.rows)
        status = generation.status[start:stop]
        rows = unit_rows(generation.read(start, stop))[0].astype(np.float32)
        rows[status != RowStatus.OK] = np.nan
        yield UnitRows(start, stop, rows, status)


class UsableRows:
    """Usable rows of a generation as an (m, d) float32 matrix that is read when it is indexed.

    Takes the place of an array where one reads chunks and single rows, as clustering does.
    """

    ndim = 2

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        #: (m,) int64, positions in the data set.
        self.rows = np.flatnonzero(generation.usable).astype(np.int64)
        self.shape = (len(self.rows), generation.dim)

    def __len__(self) -> int:
        """M."""
        return len(self.rows)

    def __getitem__(self, key: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(k, d) float32 unit rows, those at positions `key` of `rows`."""
        wanted = self.rows[key]
        found = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        bounds = np.array([start for start, _ in self._generation.units])
        unit_of = np.searchsorted(bounds, wanted, side="right") - 1
        for unit in np.unique(unit_of):
            start, stop = self._generation.units_range(int(unit))
            here = unit_of == unit
            rows = self._generation.read(start, stop)[wanted[here] - start]
            found[here] = unit_rows(rows)[0]
        return found


def _embedded(
    rows: npt.NDArray[np.int64], vectors: Tensor, tokens: Tensor, dim: int
) -> FeatureRows:
    if vectors.shape != (len(rows), dim):
        raise BadInput(
            f"embed gives {tuple(vectors.shape)} for {len(rows)} rows; the generation holds "
            f"({len(rows)}, {dim})"
        )
    unit, length = to_unit(vectors.detach())
    norm = length.float()  # as it is stored: beyond float32 a row is zero or not finite
    status = row_status(norm, tokens.to(norm.device))
    unit[status != RowStatus.OK] = torch.nan
    return FeatureRows(
        rows=rows,
        features=unit.cpu().numpy(),
        norm=norm.cpu().numpy(),
        status=status.cpu().numpy(),
        tokens=tokens.to(torch.int32).cpu().numpy(),
    )
