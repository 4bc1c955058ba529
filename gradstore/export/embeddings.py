"""Rows as unit vectors of a model's hidden states: generations of a space of their own.

The way of one batch: token ids (b, t) -> `embed` (gradstore.export.pooling) -> (b, d) of any length
-> unit rows float32 -> the same units, commits and index as gradient features have. There is no
projection: d is the model's hidden size.

Letters: n rows, b batch, t tokens, d hidden size, m rows of a chunk.

```
space = writer.with_space("minilm", {"model": model_hash, "pooling": "mean", ...})
name = GenerationName("train", 0)
record = embedding_record(name, space="minilm", run_id=run_id, model_hash=model_hash)
generation = space.begin(record, rows, dim=384)
export_embeddings(HiddenStates(model), dataset, collate, generation, lengths=lengths)
generation.commit()
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput
from gradstore.export.pooling import Embed, attention_tokens, to_unit
from gradstore.export.units import (
    Batch,
    Collate,
    FeatureRows,
    Lengths,
    UnitFeatures,
    join_unit,
    row_status,
    unit_batches,
)
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange


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
