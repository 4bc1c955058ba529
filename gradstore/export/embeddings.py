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
batches = Batches(dataset, collate, lengths)
fill(generation, partial(compute_embedding_unit, HiddenStates(model), batches, dim=384))
generation.commit()
```
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradstore.errors import BadInput, expect
from gradstore.export.pooling import Embed, attention_tokens, to_unit
from gradstore.export.smaller import computed_parts
from gradstore.export.units import (
    Batch,
    Batches,
    FeatureRows,
    OnRows,
    RowBatch,
    UnitFeatures,
    join_unit,
    row_status,
)
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange


def compute_embedding_unit(
    embed: Embed,
    batches: Batches,
    unit: UnitRange,
    on_rows: OnRows | None = None,
    *,
    dim: int,
    tokens_of: Callable[[Batch], Tensor] = attention_tokens,
) -> UnitFeatures:
    """Compute the embeddings of one unit: a function of its rows and the model, on whatever rank.

    Args:
        embed: batch -> (b, d) vectors; they are brought to length 1.
        batches: the rows.
        unit: which rows.
        on_rows: called with the number of rows each time some are done.
        dim: d.
        tokens_of: batch -> (b,) usable tokens; a row with none is `MASKED`.

    Raises:
        BadInput: `embed` gives another shape than (b, d).
    """
    expect(callable(embed), "embed", embed, "a function: batch -> (b, d) vectors")
    expect(isinstance(batches, Batches), "batches", batches, "Batches(rows, collate, lengths)")

    def embedded(pairs: Iterator[RowBatch]) -> Generator[FeatureRows, None, None]:
        for rows, batch in pairs:
            yield _embedded(rows, embed(batch), tokens_of(batch), dim)

    with closing(computed_parts(batches, unit, embedded)) as parts:
        return join_unit(unit, dim, parts, batches.tokens(unit), on_rows)


def _embedded(
    rows: npt.NDArray[np.int64], vectors: Tensor, tokens: Tensor, dim: int
) -> FeatureRows:
    if vectors.shape != (len(rows), dim):
        raise BadInput(
            f"embed gives {tuple(vectors.shape)} for {len(rows)} rows; the generation holds "
            f"({len(rows)}, {dim}); "
            "begin it with dim=the width of the vectors"
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
