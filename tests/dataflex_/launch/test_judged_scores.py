"""Scores that `gradstore eval` judges: a store's, against products taken by hand, and a file's."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.launch import judged_scores
from dataflex.launch.judged_scores import component_of, influence, read_scores
from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.plain_rows import PlainRows
from gradstore.scoring.products import COSINE, InnerProduct

RNG = np.random.default_rng(7)
TRAIN = RNG.normal(size=(6, 4)).astype(np.float32)
#: Two target sets, of 3 and of 4 rows.
TARGETS = [RNG.normal(size=(rows, 4)).astype(np.float32) for rows in (3, 4)]
#: Not all target rows are queries: the second of each set has no target token.
QUERIES = np.array([True, False, True, True, False, True, True])


class Held(PlainRows):
    """Features as a store has them: with the hashes of their rows."""

    def __init__(self, values: np.ndarray, name: str) -> None:
        super().__init__(values, name)
        self.row_hash = hashes(name, len(values))


def hashes(name: str, rows: int) -> np.ndarray:
    return np.array([[len(name), row] for row in range(rows)], np.uint8)


class Named:
    """Rows of the configuration, as far as they are compared with a store's."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self._count = name, count
        self.row_set = SimpleNamespace(hashes=hashes(name, count))

    def __len__(self) -> int:
        return self._count


DATA: Any = SimpleNamespace(train=Named("train", 6), targets=(Named("a", 3), Named("bb", 4)))


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Features of the training rows and of two sets; a test may spoil some."""
    held = [TRAIN.copy(), *(values.copy() for values in TARGETS)]

    def pairs(*_: Any, targets: list[str], **__: Any) -> list[CheckpointFeatures]:
        assert targets == ["a", "bb"]
        train, *asked = (
            Held(values, name) for values, name in zip(held, ("train", *targets), strict=True)
        )
        return [CheckpointFeatures(train, asked)]

    monkeypatch.setattr(judged_scores, "open_store", lambda path: None)
    monkeypatch.setattr(judged_scores, "checkpoint_features", pairs)
    return held


def judged(product: InnerProduct = COSINE) -> Any:
    return influence(Path("store"), "last", "", DATA, QUERIES, product)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_scores_are_of_the_queries_of_all_sets_in_a_row(stored: list[np.ndarray]) -> None:
    asked = [TARGETS[0][0], TARGETS[0][2], TARGETS[1][0], TARGETS[1][2], TARGETS[1][3]]
    found = judged()
    assert found.queries.tolist() == [0, 1, 2, 3, 4]
    expected = [[cosine(row, query) for row in TRAIN] for query in asked]
    assert found.values == pytest.approx(np.array(expected), abs=1e-6)
    dots = judged(InnerProduct("none")).values
    assert dots == pytest.approx(np.stack(asked) @ TRAIN.T, abs=1e-5)


def test_a_query_without_a_feature_is_left_out_and_the_others_keep_their_places(
    stored: list[np.ndarray],
) -> None:
    stored[1][2] = 0  # the second query
    stored[2][2] = np.nan  # the fourth
    found = judged()
    assert found.queries.tolist() == [0, 2, 4]
    asked = [TARGETS[0][0], TARGETS[1][0], TARGETS[1][3]]
    expected = [[cosine(row, query) for row in TRAIN] for query in asked]
    assert found.values == pytest.approx(np.array(expected), abs=1e-6)


def test_a_training_row_without_a_feature_scores_0(stored: list[np.ndarray]) -> None:
    stored[0][[1, 4]] = [[0], [np.inf]]
    found = judged().values
    assert (found[:, [1, 4]] == 0).all()
    assert found[0, 5] == pytest.approx(cosine(TRAIN[5], TARGETS[0][0]), abs=1e-6)


def test_no_usable_query_and_rows_of_another_configuration_are_refused(
    stored: list[np.ndarray],
) -> None:
    nobody = np.zeros(7, dtype=bool)
    with pytest.raises(BadInput, match="no usable target row"):
        influence(Path("store"), "last", "", DATA, nobody, COSINE)
    other: Any = SimpleNamespace(train=Named("trains", 6), targets=DATA.targets)
    with pytest.raises(ProvenanceMismatch, match="rows for 'trains' that are not the 6"):
        influence(Path("store"), "last", "", other, QUERIES, COSINE)


def component(name: str, train_type: str = "dynamic_select", **params: Any) -> Any:
    ours = DataFlexConfig(train_type=train_type, component_name=name, component_params=params)
    return component_of(RunConfig(ours, {}, Path("run.yaml")))


def test_a_component_is_judged_by_the_product_it_selects_by() -> None:
    found = component("less", gradient_type="sgd", preconditioner="fisher", normalize="none")
    assert found.product == InnerProduct("none", "fisher", 1.0)
    assert not found.left_out
    assert component("less").product == COSINE
    assert component("", "static") == component_of(RunConfig(DataFlexConfig(), {}, Path("x.yaml")))


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("less", {"rerank": {"top": 0.25, "by": "cg"}}, r"rerank: .* best 0.25 of rows .*by: cg"),
        ("less", {"scoring": "direct"}, "scoring: direct: .* --scores"),
        ("less", {"subset": "round_robin"}, "subset: round_robin: .* that rule"),
        ("less", {"quotas": {"a": 3}}, "quotas: {'a': 3}: .* that rule"),
        ("landmarks", {"landmarks": 64}, "landmarks: .* 64 rows' gradients, .* --scores"),
        ("near", {}, "near does not select by a store's influence"),
    ],
)
def test_what_a_component_does_beside_is_named_in_one_line(
    name: str, params: dict[str, Any], said: str
) -> None:
    (line,) = component(name, **params).left_out
    assert re.search(said, line)
    assert "\n" not in line


def test_each_thing_left_out_has_a_line_of_its_own() -> None:
    found = component("landmarks", rerank={"by": "exact"}).left_out
    assert [line.split(":")[0] for line in found] == ["rerank", "landmarks"]


def test_a_pipelines_selector_is_the_one_that_is_judged() -> None:
    stages = [
        {"family": "selector", "component": "less", "params": {"normalize": "none"}},
        {"family": "reorder", "component": "dynamic_zigzag"},
    ]
    assert component("pipeline", "dynamic_lego", stages=stages).product == InnerProduct("none")


def test_scores_of_a_file_hold_for_every_query_whatever_its_order(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"row": [2, 0, 1], "score": [0.5, None, -1.0]}), path)
    found = read_scores(path, 3, 2)
    assert found.values.tolist() == [[0, -1, 0.5]] * 2
    assert found.queries.tolist() == [0, 1]


def test_scores_of_other_rows_are_refused(tmp_path: Path) -> None:
    path, matrix = tmp_path / "scores.parquet", tmp_path / "scores.npy"
    pq.write_table(pa.table({"row": [0, 1, 1], "score": [0.5, 1.0, 2.0]}), path)
    with pytest.raises(BadInput, match="each of the 3 training rows once"):
        read_scores(path, 3, 2)
    np.save(matrix, np.zeros((3, 2)))
    with pytest.raises(BadInput, match=r"give \(2, 3\)"):
        read_scores(matrix, 3, 2)
    np.save(matrix, np.full((2, 3), np.nan))
    with pytest.raises(BadInput, match="finite"):
        read_scores(matrix, 3, 2)
    pq.write_table(pa.table({"number": [0, 1, 2]}), path)
    with pytest.raises(BadInput, match="no column 'row'"):
        read_scores(path, 3, 2)
    with pytest.raises(BadInput, match="cannot be read"):
        read_scores(tmp_path / "none.npy", 3, 2)
