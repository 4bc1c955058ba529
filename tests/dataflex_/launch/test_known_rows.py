"""Scores against a replay's table, and against planted rows: worked by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from dataflex.data.rows import IGNORED, SOURCE_ROW, Rows, RunData
from dataflex.launch.evaluated import Evaluation
from dataflex.launch.known_rows import (
    against_exact,
    against_planted,
    planted_rows,
    read_truth,
)
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.replay.table import ReplayTable, Target

N = 5


def rows(name: str, count: int, masked: tuple[int, ...] = ()) -> Rows:
    labels = [[IGNORED, IGNORED if i in masked else i] for i in range(count)]
    ids = [[len(name), i] for i in range(count)]
    sources = tuple((name, i) for i in range(count))
    return Rows(name, Dataset.from_dict({"input_ids": ids, "labels": labels}), sources)


@pytest.fixture
def data() -> RunData:
    """5 training rows, 3 target rows of "aa" (the second without a token) and 2 of "bbb"."""
    nothing: Any = None
    held: dict[str, dict[str, list[Any]]] = {
        "t": {"planted": [0.0, 1.0, None, 1.0, 0.0], "true": [False, True, None, False, True],
              "fact": ["x", "y", None, "x", "z"], "here": list("abcde"),
              "written": ["0", "1", "0", "1.0", "0"]},
        "aa": {"fact": ["z", "no query", "x"]},
        "bbb": {"fact": ["y", "x"]},
    }  # fmt: skip
    files = {}
    for name, columns in held.items():
        numbers = range(len(next(iter(columns.values()))))
        files[name] = Dataset.from_dict({SOURCE_ROW: numbers, **columns})
    return RunData(
        rows("t", N), (rows("aa", 3, (1,)), rows("bbb", 2)), nothing, "default", nothing, "sft",
        files=files,
    )  # fmt: skip


QUERIES = np.array([True, False, True, True, True])


def written(folder: Path, data: RunData, *targets: Target, hashes: Any = None) -> Path:
    """A table in which row 4 was never trained on, of scores 0, 1, 2, 3, .. by target."""
    derivatives = -np.arange(float(len(targets) * N)).reshape(len(targets), N)
    derivatives[:, 4] = 0
    zeros = np.zeros(len(targets))
    table = ReplayTable(
        targets, derivatives, np.array([1, 1, 2, 1, 0]),
        data.train.row_set.hashes if hashes is None else hashes, zeros, zeros, 3,
    )  # fmt: skip
    path = folder / "replay.parquet"
    pq.write_table(table.to_arrow(), path)
    return path


def test_a_table_is_read_by_the_rows_that_were_trained_on_and_its_targets_queries(
    tmp_path: Path, data: RunData
) -> None:
    path = written(tmp_path, data, Target("aa"), Target("aa", 2), Target("bbb", 0))
    truth = read_truth(path, data, QUERIES)
    assert truth.rows.tolist() == [0, 1, 2, 3]
    assert truth.scores.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    assert [members.tolist() for members in truth.members] == [[0, 1], [1], [2]]


def test_a_set_takes_the_mean_of_its_queries_scores(tmp_path: Path, data: RunData) -> None:
    truth = read_truth(written(tmp_path, data, Target("aa"), Target("bbb")), data, QUERIES)
    scores = np.array([
        [0.0, 8.0, 0.0, 4.0, 99.0],
        [0.0, -7.0, 2.0, 0.0, -9.0],  # mean with the first: 0, .5, 1, 2
        [3.0, 2.0, 1.0, 0.0, 50.0],
    ])  # fmt: skip
    found = against_exact("spearman", truth, scores, np.array([0, 1, 3]), k=2, share=0.25)
    assert found.values == pytest.approx((1.0, -1.0))
    top = against_exact("overlap", truth, scores, np.array([0, 1, 3]), k=2, share=0.25)
    assert top.values == (1.0, 0.0)
    gain = against_exact("ndcg", truth, scores, np.array([0, 1, 3]), k=2, share=0.25)
    assert gain.values[0] == pytest.approx(1.0)
    some = against_exact("spearman", truth, scores[2:], np.array([3]), k=2, share=0.25)
    assert some.values == pytest.approx((-1.0,))
    nobody = read_truth(written(tmp_path, data, Target("aa")), data, QUERIES)
    with pytest.raises(BadInput, match="no target of the replay was scored"):
        against_exact("spearman", nobody, scores[2:], np.array([3]), k=2, share=0.25)


def test_a_table_of_other_rows_or_targets_is_refused(tmp_path: Path, data: RunData) -> None:
    other = np.zeros((N, 16), np.uint8)
    with pytest.raises(ProvenanceMismatch, match="other training rows"):
        read_truth(written(tmp_path, data, Target("aa"), hashes=other), data, QUERIES)
    for target, named in ((Target("c"), "'c'"), (Target("aa", 1), "'aa' row 1"),
                          (Target("bbb", 2), "'bbb' row 2")):  # fmt: skip
        with pytest.raises(BadInput, match=f"target {named}, which"):
            read_truth(written(tmp_path, data, target), data, QUERIES)
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"row": [0], "score": [1.0]}), path)
    for each in (path, tmp_path / "none.parquet"):
        with pytest.raises(BadInput, match="cannot be read as a table of `gradstore replay -o`"):
            read_truth(each, data, QUERIES)


@pytest.mark.parametrize(
    ("column", "marked"),
    [("planted", [False, True, False, True, False]), ("true", [False, True, False, False, True])],
)
def test_a_column_of_numbers_marks_the_same_rows_for_every_query(
    data: RunData, column: str, marked: list[bool]
) -> None:
    assert planted_rows(data, column, QUERIES).tolist() == [marked] * 4
    with pytest.raises(BadInput, match="'t' of the training rows has no column 'poison'"):
        planted_rows(data, "poison", QUERIES)


def test_a_column_of_text_plants_the_rows_of_a_querys_own_text(data: RunData) -> None:
    x, y, z = [True, False, False, True, False], [False, True, *[False] * 3], [*[False] * 4, True]
    marks = planted_rows(data, "fact", QUERIES)
    assert marks.tolist() == [z, x, y, x]
    scored = np.array([3, 0])
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 5.0, 3.0, 4.0]])
    for metric, expected in (
        ("recall", (0.5, 1.0)),  # of x, the first of two is among the best 2; z is second
        ("mrr", (1.0, 0.5)),
        ("auprc", ((1 + 2 / 4) / 2, 0.5)),
    ):
        found = against_planted(metric, marks[scored], scores, k=2)
        assert found.values == pytest.approx(expected), metric


def test_numbers_that_are_written_as_text_mark_rows(data: RunData) -> None:
    assert (
        planted_rows(data, "written", QUERIES).tolist() == [[False, True, False, True, False]] * 4
    )


def test_text_that_is_not_on_both_sides_is_refused_by_its_place(data: RunData) -> None:
    with pytest.raises(BadInput, match="'aa' of target set 'aa' has no column 'here'"):
        planted_rows(data, "here", QUERIES)
    files = dict(data.files)
    files["bbb"] = Dataset.from_dict({SOURCE_ROW: [0, 1], "fact": ["y", "w"]})
    with pytest.raises(
        BadInput, match=r"target row 1 of data set 'bbb' has 'w' in column 'fact', which"
    ):
        planted_rows(replace(data, files=files), "fact", QUERIES)
    files["bbb"] = Dataset.from_dict({SOURCE_ROW: [0, 1], "fact": ["y", None]})
    with pytest.raises(BadInput, match=r"target row 1 of data set 'bbb' has None"):
        planted_rows(replace(data, files=files), "fact", QUERIES)
    nowhere = replace(data, train=Rows("t", data.train.dataset))
    with pytest.raises(BadInput, match="remove tokenized_path"):
        planted_rows(nowhere, "fact", QUERIES)


@pytest.mark.parametrize(
    ("metric", "named"),
    [("lds", "--bank"), ("qld", "--bank"), ("spearman", "--truth"), ("overlap", "--truth"),
     ("ndcg", "--truth"), ("recall", "--planted"), ("mrr", "--planted"), ("auprc", "--planted")],
)  # fmt: skip
def test_a_metric_says_what_it_needs(metric: str, named: str) -> None:
    with pytest.raises(BadInput, match=f"--metric {metric} needs {named}"):
        Evaluation(store=Path("store"), metric=metric)
