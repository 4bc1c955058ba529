"""Frames of a store: the same numbers as the functions they stand for, joined by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.scoring.frames import AskedStore, open_store
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.query import query_influence


@pytest.fixture
def store(kit: Any, tmp_path: Path) -> AskedStore:
    """Two checkpoints of 40 rows, of which two are not usable, and two target sets."""
    path = tmp_path / "s"
    with kit.writer(path) as writer:
        for step in (1, 2):
            kit.add(writer, f"train/{step}")
            for name, rows in {"a": 9, "b": 5}.items():
                kit.add(writer, f"target/{name}/{step}", rows)
    return open_store(path)


def test_a_column_of_the_influence_frame_is_the_score_against_that_target_alone(
    store: AskedStore,
) -> None:
    frame = store.influence_frame("all")
    assert list(frame.columns) == ["a", "b"]
    assert frame.index.name == "row"
    for name in frame:
        alone = influence_scores(checkpoint_features(store, "all", targets=[name]))
        expected = np.where(alone.usable, alone.values, np.nan)
        np.testing.assert_allclose(frame[name], expected, atol=1e-6)
    assert frame["a"].isna().sum() == 2
    assert list(store.influence_frame(targets=["b"]).columns) == ["b"]


def test_frames_go_back_to_an_earlier_checkpoint(store: AskedStore) -> None:
    earlier = store.scores_frame(until=1)
    expected = influence_scores(checkpoint_features(store, until=1))
    np.testing.assert_array_equal(
        earlier.sort_index()["score"], np.where(expected.usable, expected.values, np.nan)
    )
    assert not earlier["score"].equals(store.scores_frame()["score"])
    assert store.influence_frame(until=1).max(axis=1).equals(earlier["score"].sort_index())


def test_a_query_frame_holds_helpers_from_the_highest_then_the_others_from_the_lowest(
    store: AskedStore,
) -> None:
    frame = store.query_frame(4, "b", top=6)
    expected = query_influence(checkpoint_features(store, targets=["b"]), 4, top=6)
    assert frame["side"].tolist() == ["helped"] * 6 + ["hurt"] * 6
    assert frame.index.tolist() == [*expected.helped, *expected.hurt]
    np.testing.assert_array_equal(frame["score"], expected.values[frame.index])
    assert frame["source_row"].tolist() == frame.index.tolist()
    assert "prompt" not in store.query_frame(4, "b", text=False)


def test_frames_rank_by_another_product_as_the_functions_do(store: AskedStore) -> None:
    product = InnerProduct("target", "fisher", 0.2)
    pairs = checkpoint_features(store, "all")
    scores = influence_scores(pairs, aggregation="mean", product=product)
    frame = store.scores_frame("all", aggregation="mean", product=product).sort_index()
    np.testing.assert_array_equal(frame["score"], np.where(scores.usable, scores.values, np.nan))
    assert not frame["score"].equals(store.scores_frame("all").sort_index()["score"])
    each = store.influence_frame("all", product=product)
    np.testing.assert_allclose(each.mean(axis=1), frame["score"], rtol=1e-5, atol=1e-7)
    asked = store.query_frame(4, "b", checkpoints=2, top=6, product=product)
    alone = checkpoint_features(store, "all", targets=["b"])
    expected = query_influence(alone, 4, top=6, product=product)
    np.testing.assert_array_equal(asked["score"], expected.values[asked.index])
    assert not np.array_equal(expected.values, query_influence(alone, 4, top=6).values)


def test_a_query_frame_wants_one_target_set(store: AskedStore) -> None:
    with pytest.raises(BadInput, match="target sets a, b; name one"):
        store.query_frame(0)
