"""From rows to micro-batches: every row once a lap, the same whatever the ranks."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dataflex.data.order import BatchShape, RowOrder, loader


@given(st.integers(1, 40), st.integers(0, 90), st.integers(1, 30), st.booleans())
def test_a_lap_reads_every_row_once(k: int, first: int, count: int, shuffled: bool) -> None:
    order = RowOrder(np.arange(100, 100 + k), (7, 3) if shuffled else None)
    whole = order.window(0, first + count)
    assert whole[first:].tolist() == order.window(first, count).tolist()
    full = len(whole) // k * k
    for lap in whole[:full].reshape(-1, k):
        assert sorted(lap.tolist()) == list(range(100, 100 + k))


def test_without_a_seed_the_given_order_is_kept() -> None:
    assert RowOrder(np.array([5, 2, 9]), None).window(0, 7).tolist() == [5, 2, 9, 5, 2, 9, 5]


def test_laps_are_shuffled_differently_and_reproducibly() -> None:
    order = RowOrder(np.arange(20), (1, 10))
    first, second = order.window(0, 40).reshape(2, 20).tolist()
    assert first != second
    assert order.window(0, 20).tolist() == first
    assert RowOrder(np.arange(20), (2, 10)).window(0, 20).tolist() != first


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 3))
def test_the_ranks_of_a_step_share_its_rows(
    per_device: int, accumulation: int, world: int, step: int
) -> None:
    shape = BatchShape(per_device, accumulation, world)
    order = RowOrder(np.arange(shape.rows * 5), (0,))
    seen = [
        row
        for rank in range(world)
        for micro in order.micro_batches(step, rank, shape)
        for row in micro
    ]
    assert sorted(seen) == sorted(order.window(step * shape.rows, shape.rows).tolist())
    micros = order.micro_batches(step, 0, shape)
    assert [len(m) for m in micros] == [per_device] * accumulation


def test_a_loader_opened_in_mid_interval_goes_on_where_the_whole_one_is() -> None:
    order, shape = RowOrder(np.arange(24), (4,)), BatchShape(2, 2, 1)
    data = list(range(24))
    whole = list(loader(data, order, range(6), 0, shape, list))
    assert list(loader(data, order, range(4, 6), 0, shape, list)) == whole[8:]
