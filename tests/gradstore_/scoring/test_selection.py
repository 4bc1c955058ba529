"""Promises of the choice of rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradstore.errors import BadInput, StoreIOError
from gradstore.scoring.selection import rows_for_fraction, select_top, write_selected

NAN = float("nan")


def by_hand(scores: list[float], k: int) -> list[int]:
    rows = [i for i, score in enumerate(scores) if score == score]
    return sorted(rows, key=lambda i: (-scores[i], i))[:k]


@given(
    scores=st.lists(
        st.one_of(st.sampled_from([0.0, -0.0, 0.5, NAN, -1.0]), st.floats(-1, 1, width=32)),
        min_size=1,
        max_size=60,
    ),
    data=st.data(),
)
def test_fault_08_any_k_gives_the_best_with_ties_to_the_lower_row(
    scores: list[float], data: Any
) -> None:
    usable = sum(score == score for score in scores)
    if usable == 0:
        with pytest.raises(BadInput):
            select_top(np.array(scores), 1)
        return
    k = data.draw(st.integers(1, usable))
    chosen = select_top(np.array(scores, dtype=np.float32), k)
    assert chosen.dtype == np.int64
    assert chosen.tolist() == by_hand(np.float32(scores).tolist(), k)


def test_fault_08_tensors_and_arrays_agree() -> None:
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    expected = select_top(scores.numpy(), 100).tolist()
    for device in devices:
        assert select_top(scores.to(device), 100).tolist() == expected
    assert (
        select_top(scores.bfloat16(), 3).tolist()
        == select_top(scores.bfloat16().float(), 3).tolist()
    )
    assert select_top([0, 2, 1], 2).tolist() == [1, 2]


def test_zero_and_minus_zero_tie() -> None:
    assert select_top([-0.0, 0.0, -0.0, 0.0], 3).tolist() == [0, 1, 2]


def test_fault_02_rows_not_usable_or_nan_are_never_chosen() -> None:
    scores = np.array([9.0, NAN, 1.0, 5.0])
    usable = np.array([False, True, True, True])
    assert select_top(scores, 2, usable=usable).tolist() == [3, 2]
    assert select_top(torch.tensor(scores), 2, usable=torch.tensor(usable)).tolist() == [3, 2]
    with pytest.raises(BadInput, match=r"asked 3, 2 usable, 2 skipped"):
        select_top(scores, 3, usable=usable)


def test_fault_06_more_than_usable_says_how_many() -> None:
    scores = np.zeros(5000)
    scores[:188] = NAN
    with pytest.raises(BadInput, match=r"asked 5000, 4812 usable, 188 skipped") as caught:
        select_top(scores, 5000)
    assert caught.value.exit_code == 2
    assert select_top(scores, 4812).tolist() == list(range(188, 5000))


@pytest.mark.parametrize("k", [0, -3, NAN, 2.0, "2", None, True])
def test_fault_06_k_that_is_no_count_is_refused(k: Any) -> None:
    with pytest.raises(BadInput, match="asked"):
        select_top([1.0, 2.0, 3.0], k)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadInput, match="shape"):
        select_top(np.zeros((2, 2)), 1)
    with pytest.raises(BadInput, match="shape"):
        select_top(np.zeros(3), 1, usable=np.ones(2, dtype=bool))


def test_a_fraction_is_taken_as_written() -> None:
    assert rows_for_fraction(0.05, 270_679) == 13_533
    assert rows_for_fraction(0.29, 100) == 29
    assert rows_for_fraction(1.0, 7) == 7
    assert rows_for_fraction(1e-9, 7) == 1


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, NAN, True])
def test_a_fraction_outside_the_unit_interval_is_refused(fraction: float) -> None:
    with pytest.raises(BadInput, match="fraction"):
        rows_for_fraction(fraction, 100)
    with pytest.raises(BadInput, match="usable"):
        rows_for_fraction(0.5, 0)


def test_selected_rows_are_written_with_their_origin(tmp_path: Path) -> None:
    scores = np.array([0.25, 0.5, 0.75], dtype=np.float32)
    hashes = np.arange(48, dtype=np.uint8).reshape(3, 16)
    path = tmp_path / "selected.jsonl"
    path.write_text("old")
    sources = [("alpaca", 0), ("größe", 4), ("alpaca", 9)]
    write_selected(path, select_top(scores, 2), scores, sources=sources, row_hashes=hashes)
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == [
        {
            "rank": 1,
            "row": 2,
            "score": 0.75,
            "source": ["alpaca", 9],
            "row_hash": hashes[2].tobytes().hex(),
        },
        {
            "rank": 2,
            "row": 1,
            "score": 0.5,
            "source": ["größe", 4],
            "row_hash": hashes[1].tobytes().hex(),
        },
    ]
    write_selected(path, np.array([0]), scores)
    assert json.loads(path.read_text())["source"] is None
    assert os.listdir(tmp_path) == ["selected.jsonl"]


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "selected.jsonl"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreIOError, match="No space left"):
        write_selected(path, np.array([0]), np.array([1.0]))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["selected.jsonl"]


def test_the_folder_is_made_and_one_that_cannot_be_is_an_io_error(tmp_path: Path) -> None:
    path = tmp_path / "new" / "selected.jsonl"
    write_selected(path, np.array([0]), np.array([1.0]))
    with pytest.raises(StoreIOError, match="cannot write"):
        write_selected(path / "selected.jsonl", np.array([0]), np.array([1.0]))
    assert json.loads(path.read_text())["row"] == 0


def test_a_chosen_row_without_a_score_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="row 0"):
        write_selected(tmp_path / "s.jsonl", np.array([0]), np.array([NAN]))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_the_files_name_says_how_it_is_written(tmp_path: Path, suffix: str) -> None:
    import pyarrow.csv
    import pyarrow.parquet

    path = tmp_path / f"selected{suffix}"
    scores = np.array([0.5, 0.25, 0.75])
    write_selected(path, np.array([2, 0]), scores, sources=[("a", 4), ("a", 5), ("b", 0)])
    read = pyarrow.csv.read_csv if suffix == ".csv" else pyarrow.parquet.read_table
    table = read(path).to_pydict()
    assert table["row"] == [2, 0]
    assert table["score"] == [0.75, 0.5]
    assert (table["source_set"], table["source_row"]) == (["b", "a"], [0, 4])


@pytest.mark.parametrize("name", ["selected", "selected.txt", "selected.json"])
def test_a_name_that_says_no_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"must end in one of \.parquet, \.csv, \.jsonl"):
        write_selected(tmp_path / name, np.array([0]), np.array([1.0]))
    assert not (tmp_path / name).exists()
