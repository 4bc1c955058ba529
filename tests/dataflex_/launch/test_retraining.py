"""The order of a retraining's rows: the run's own, epoch by epoch, with the others left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from dataflex.launch.retraining import Remaining

N, KEPT = 23, np.array([1, 2, 3, 7, 11, 12, 20])


def loader(sampler: type) -> DataLoader:
    """A loader of the rows' numbers, prepared as transformers' Trainer prepares its own."""
    torch.manual_seed(42)  # `seed` of the run, which the Trainer sets first
    rows = list(range(N))
    accelerator = Accelerator(
        cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)
    )
    made: DataLoader = accelerator.prepare(DataLoader(rows, batch_size=3, sampler=sampler(rows)))
    return made


def epochs(made: DataLoader) -> list[list[int]]:
    found = []
    for epoch in (0, 3, 1):  # a run that goes on begins at any
        made.set_epoch(epoch)  # type: ignore[attr-defined]
        found.append([int(row) for batch in made for row in batch])
    return found


@pytest.mark.parametrize("sampler", [RandomSampler, SequentialSampler])
def test_rows_that_are_left_come_as_in_the_run_of_all_rows(sampler: type) -> None:
    whole, left = epochs(loader(sampler)), loader(sampler)
    left.batch_sampler.sampler = Remaining(left.batch_sampler.sampler, KEPT)  # type: ignore[attr-defined]
    assert len(left) == 3  # seven rows in batches of three, filled up
    found = epochs(left)
    assert found == [[row for row in epoch if row in KEPT] for epoch in whole]
    assert all(sorted(epoch) == KEPT.tolist() for epoch in found)
    assert (found[0] != found[1]) == (sampler is RandomSampler)
