"""The rows of a curvature: drawn by seed, and each on one rank alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from dataflex.data.rows import Rows
from dataflex.features.newton import Curvature, row_batches
from dataflex.run.ranks import Ranks

CURVATURE = Curvature(rows=6, damping=0.1, iterations=9, tolerance=1e-3)


def test_rows_are_drawn_by_seed_from_usable_ones() -> None:
    usable = np.arange(20) % 3 != 0
    drawn = CURVATURE.drawn(usable, 4)
    assert usable[drawn].all()
    assert len(set(drawn.tolist())) == 6
    assert drawn.tolist() == sorted(drawn.tolist()) == CURVATURE.drawn(usable, 4).tolist()
    assert drawn.tolist() != CURVATURE.drawn(usable, 5).tolist()
    assert CURVATURE.drawn(np.arange(20) < 3, 4).tolist() == [0, 1, 2], "all there are"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_goes_to_one_rank_once_however_the_batches_fall(world: int) -> None:
    """Other passes repeat a batch, so that ranks make equally many: a sum would count it twice."""
    lengths = [5, 5, 3, 3, 3, 2, 9]
    table = {"input_ids": [[row] * n for row, n in enumerate(lengths)],
             "labels": [[row] * n for row, n in enumerate(lengths)]}  # fmt: skip
    train = Rows("train", Dataset.from_dict(table))
    seen: list[int] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen.extend(row["input_ids"][0] for row in rows)
        return {"input_ids": torch.zeros(len(rows), 1)}

    for rank in range(world):
        data, model = SimpleNamespace(train=train), torch.nn.Linear(1, 1)
        run: Any = SimpleNamespace(
            data=data, collate=collate, model=model, ranks=Ranks(rank, world)
        )
        list(row_batches(run, np.array([0, 1, 3, 4, 6]), 10))
    assert sorted(seen) == [0, 1, 3, 4, 6]
