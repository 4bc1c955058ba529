"""Rows by their hashes: what makes two rows the same."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from gradstore.format.records import NO_HASH, NO_SOURCE, RowSet, row_hash


def test_a_rows_hash_depends_on_ids_labels_and_where_the_ids_end() -> None:
    rows = [([1, 2], [2, 3]), ([1, 2], [2, 4]), ([1, 3], [2, 3]), ([1, 2, 2], [3]), ([], [])]
    assert len({row_hash(ids, labels) for ids, labels in rows}) == len(rows)
    assert row_hash([1, 2], [-100, 2]) == row_hash((1, 2), (-100, 2))


def test_a_row_sets_hash_depends_on_the_order_not_on_the_sources() -> None:
    one, two = row_hash([1], [1]), row_hash([2], [2])
    here = RowSet.from_hashes([one, two])
    assert here.sha256 != RowSet.from_hashes([two, one]).sha256
    assert here.sha256 == RowSet.from_hashes([one, two], [("a", 0), ("b", 1)]).sha256


@pytest.mark.parametrize("gone", [(), (0,), (1, 4), (0, 2, 3), tuple(range(6))])
def test_rows_without_some_have_the_pairs_of_the_others_and_the_names_that_are_left(
    gone: tuple[int, ...],
) -> None:
    pairs = [("b", 1), ("a", 7), ("b", 2), ("b", 2), ("zoo", 0), ("a", -3)]
    rows = RowSet.from_hashes([row_hash([i], [i]) for i in range(6)], pairs)
    mask = np.isin(np.arange(6), gone)
    found = rows.without(mask)
    wanted = [NO_SOURCE if i in gone else pair for i, pair in enumerate(pairs)]
    assert list(found.sources or ()) == wanted
    assert found.sources is not None
    assert found.sources.names == tuple(sorted({name for name, _ in wanted}))
    assert (found.sources.code.dtype, found.sources.row.dtype) == (np.int32, np.int64)
    assert [bytes(one) == NO_HASH for one in found.hashes] == mask.tolist()
    assert np.array_equal(found.forgotten, mask)


def test_rows_without_some_take_the_memory_of_arrays() -> None:
    n = 200_000
    hashes = np.random.default_rng(0).integers(0, 256, (n, 16), np.uint8)
    rows = RowSet(hashes, [(("poems", "sums")[i % 2], i) for i in range(n)])
    mask = np.arange(n) % 1000 == 0
    tracemalloc.start()
    try:
        assert rows.without(mask).forgotten.sum() == n // 1000
        assert tracemalloc.get_traced_memory()[1] < 70 * n
    finally:
        tracemalloc.stop()
