"""Batches of a unit: a function of the unit alone, made one at a time."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from gradstore.capture.limits import ran_out_of_memory
from gradstore.export.smaller import computed_parts
from gradstore.export.units import Batches, FeatureRows, join_unit
from gradstore.format.layout import RowStatus
from gradstore.format.plans import UnitRange

LENGTHS = [5, 3, 9, 1, 4, 4, 7, 2, 6, 3]


def batches(collate: Any = list, **changes: Any) -> Batches:
    """Rows are their own positions."""
    return Batches(range(10), collate, LENGTHS, **changes)


def test_a_batch_holds_rows_of_its_unit_within_the_budget_longest_first() -> None:
    found = list(batches(token_budget=8).of(UnitRange(1, 4, 10)))
    assert [rows.tolist() for rows, _ in found] == [[6], [8], [4, 5], [9], [7]]
    assert all(rows.tolist() == batch for rows, batch in found)


def test_a_batch_holds_at_most_max_rows() -> None:
    found = batches(token_budget=100, max_rows=2).of(UnitRange(0, 0, 5))
    assert [rows.tolist() for rows, _ in found] == [[2], [0, 4], [1, 3]]


def test_rows_longer_than_the_limit_are_in_no_batch_and_not_counted() -> None:
    limited = batches(longest=5)
    rows = np.concatenate([rows for rows, _ in limited.of(UnitRange(0, 0, 10))])
    assert sorted(rows) == [0, 1, 3, 4, 5, 7, 9]
    assert limited.tokens(UnitRange(0, 0, 10)) == 22
    assert batches().tokens(UnitRange(0, 0, 10)) == sum(LENGTHS)


def test_a_batch_is_made_when_it_is_asked_for() -> None:
    made: list[list[int]] = []

    def collate(rows: list[int]) -> dict[str, Any]:
        made.append(rows)
        return {}

    found = batches(collate, token_budget=1).of(UnitRange(0, 0, 3))
    assert made == []
    next(found)
    assert made == [[2]]


def test_a_description_of_batches_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        batches().token_budget = 1  # type: ignore[misc]


def test_a_row_in_no_part_is_too_long() -> None:
    part = FeatureRows(
        rows=np.array([6, 4]),
        features=np.array([[6.0], [4.0]], np.float32),
        norm=np.ones(2, np.float32),
        status=np.full(2, RowStatus.OK, np.uint8),
        tokens=np.array([60, 40], np.int32),
    )
    told: list[int] = []
    unit = join_unit(UnitRange(1, 4, 7), 1, [part], 11, told.append)
    assert unit.status.tolist() == [RowStatus.OK, RowStatus.TOO_LONG, RowStatus.OK]
    np.testing.assert_array_equal(unit.features[:, 0], [4, np.nan, 6])
    assert unit.tokens.tolist() == [40, 0, 60]
    assert (unit.model_tokens, told) == (11, [2])


# ---- when memory runs out ----------------------------------------------------------------------


class Small:
    """A device with room for so many padded tokens; rows are their own positions."""

    def __init__(self, room: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        self.room, self.error = room, error
        self.sizes: list[int] = []

    def __call__(self, pairs: Any) -> Any:
        for rows, batch in pairs:
            assert rows.tolist() == batch
            self.sizes.append(len(rows) * max(LENGTHS[i] for i in rows))
            if self.sizes[-1] > self.room:
                raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield FeatureRows(
                rows=rows,
                features=rows[:, None].astype(np.float32),
                norm=np.ones(len(rows), np.float32),
                status=np.zeros(len(rows), np.uint8),
                tokens=np.ones(len(rows), np.int32),
            )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_rows_of_a_batch_too_large_for_memory_come_in_smaller_ones(
    error: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    rows, device = batches(token_budget=100), Small(12, error)
    parts = list(computed_parts(rows, UnitRange(0, 0, 10), device))
    assert sorted(int(i) for part in parts for i in part.rows) == list(range(10))
    assert caplog.messages
    assert all("no row is lost" in message for message in caplog.messages)

    # What memory has room for is remembered: the next unit does not run into it.
    failures = sum(size > device.room for size in device.sizes)
    assert failures == len(caplog.messages)
    list(computed_parts(rows, UnitRange(1, 2, 9), device))
    assert sum(size > device.room for size in device.sizes) == failures


def test_a_row_too_large_for_memory_by_itself_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(computed_parts(batches(token_budget=100), UnitRange(0, 0, 10), Small(8)))


def test_rows_computed_before_memory_ran_out_are_not_computed_again() -> None:
    device, seen = Small(30), []
    for part in computed_parts(batches(token_budget=9), UnitRange(0, 0, 10), device):
        seen += part.rows.tolist()
        device.room = 7 if len(seen) == 1 else device.room
    assert sorted(seen) == list(range(10))
    assert len(seen) == 10


@pytest.mark.parametrize(
    ("said", "of_memory"),
    [
        ("CUDA error: out of memory", True),
        ("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: device-side assert triggered", False),
    ],
)
def test_what_allocators_say_is_told_from_other_errors(said: str, of_memory: bool) -> None:
    assert ran_out_of_memory(RuntimeError(said)) is of_memory
    assert not ran_out_of_memory(ValueError(said))


def test_an_error_that_is_not_of_memory_is_raised_at_once() -> None:
    def broken(pairs: Any) -> Any:
        yield from ()
        raise RuntimeError("shapes do not fit")

    rows = batches()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(computed_parts(rows, UnitRange(0, 0, 10), broken))
    assert rows.tokens_at_once == rows.token_budget
