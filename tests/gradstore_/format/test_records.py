"""Rows by their hashes: what makes two rows the same."""

from __future__ import annotations

from gradstore.format.records import RowSet, row_hash


def test_a_rows_hash_depends_on_ids_labels_and_where_the_ids_end() -> None:
    rows = [([1, 2], [2, 3]), ([1, 2], [2, 4]), ([1, 3], [2, 3]), ([1, 2, 2], [3]), ([], [])]
    assert len({row_hash(ids, labels) for ids, labels in rows}) == len(rows)
    assert row_hash([1, 2], [-100, 2]) == row_hash((1, 2), (-100, 2))


def test_a_row_sets_hash_depends_on_the_order_not_on_the_sources() -> None:
    one, two = row_hash([1], [1]), row_hash([2], [2])
    here = RowSet.from_hashes([one, two])
    assert here.sha256 != RowSet.from_hashes([two, one]).sha256
    assert here.sha256 == RowSet.from_hashes([one, two], [("a", 0), ("b", 1)]).sha256
