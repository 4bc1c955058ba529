"""The landmarks selector: exact with every row a landmark, and what it refuses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import datasets
import numpy as np
import pytest

from dataflex.data.rows import Rows, RunData
from dataflex.selectors.landmarks import LandmarksSelector, similarities
from dataflex.selectors.less import LessSelector
from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.choose import select_subset
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.rules import PerTarget

N, RNG = 30, np.random.default_rng(2)
GRADIENTS = RNG.normal(size=(N, 8)).astype(np.float32)
TARGETS = RNG.normal(size=(2, 5, 8)).astype(np.float32)


class Held:
    """Features or embeddings as rows of an array, read as a generation is."""

    def __init__(self, features: Any, usable: Any = None) -> None:
        self.features = np.asarray(features, dtype=np.float32)
        self.rows, self.dim = self.features.shape
        self.usable = np.ones(self.rows, bool) if usable is None else np.asarray(usable)
        self.status = np.where(self.usable, RowStatus.OK, RowStatus.MASKED)
        self.units = [(0, self.rows)]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.features[start:stop]

    def units_range(self, unit: int) -> tuple[int, int]:
        return self.units[unit]


def data(masked: tuple[int, ...] = (), n: int = N) -> RunData:
    labels = [[-100, -100 if row in masked else row] for row in range(n)]
    ids = [[1, row] for row in range(n)]
    nothing: Any = None
    return RunData(Rows("train", datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})),
                   (), nothing, "default", nothing, "sft")  # fmt: skip


def boundary() -> Any:
    config = SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=None))
    return SimpleNamespace(run=SimpleNamespace(config=config), step=3)


def scored(
    embeddings: Held, chosen: np.ndarray, features: Held, **params: Any
) -> tuple[Any, LandmarksSelector]:
    made = LandmarksSelector(**params)
    made._chosen = chosen
    made._embedder = SimpleNamespace(generation=lambda name: embeddings)  # type: ignore[assignment]
    checkpoint = CheckpointFeatures(features, tuple(Held(rows) for rows in TARGETS))  # type: ignore[arg-type]
    return made.score([checkpoint], 4, boundary()), made


@pytest.mark.parametrize("aggregation", ["max", "mean"])
def test_with_every_row_a_landmark_and_a_vanishing_ridge_the_scores_are_those_of_less(
    aggregation: str,
) -> None:
    embeddings = Held(RNG.normal(size=(N, 4)))
    found, _ = scored(embeddings, np.arange(N), Held(GRADIENTS), ridge=1e-10,
                      aggregation=aggregation)  # fmt: skip
    less = LessSelector(aggregation=aggregation).score(  # type: ignore[arg-type]
        [CheckpointFeatures(Held(GRADIENTS), tuple(Held(t) for t in TARGETS))],
        4,
        boundary(),  # type: ignore[arg-type]
    )
    np.testing.assert_allclose(found.values, less.values, atol=1e-5)
    if aggregation == "max":
        assert found.best.tolist() == less.best.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("subset", get_args(PerTarget))
def test_a_rule_by_target_rows_reads_the_estimate_of_each(subset: Any) -> None:
    every, target = np.arange(N), TARGETS.reshape(-1, 8)
    found, made = scored(Held(GRADIENTS), every, Held(GRADIENTS), ridge=1e-10, subset=subset)
    run: Any = SimpleNamespace(data=SimpleNamespace(), shows_progress=False)
    context: Any = SimpleNamespace(run=run, step=3)
    rows = made.rule.stored_rows(12, found, found.usable, [], context)
    exact = select_subset([CheckpointFeatures(GRADIENTS, target)], 12, subset)
    assert rows.tolist() == exact.tolist(), "every row is a landmark"
    assert scored(Held(GRADIENTS), every, Held(GRADIENTS))[0].table is None, "top needs none"


def test_rows_without_an_embedding_are_in_no_target_rows_list() -> None:
    chosen, usable = np.arange(0, N, 2), np.arange(N) != 4
    found, made = scored(Held(GRADIENTS, usable), chosen, Held(GRADIENTS[chosen]),
                         subset="round_robin")  # fmt: skip
    assert found.table is not None
    assert found.table.targets == 10
    held = similarities(found.table, N)
    assert np.flatnonzero(np.isnan(held).any(axis=1)).tolist() == [4]
    means = [held[:, :5].mean(axis=1), held[:, 5:].mean(axis=1)]
    np.testing.assert_allclose(
        np.max(means, axis=0), found.values, atol=1e-5,
        err_msg="a sub-task's estimate is the mean of its rows'",
    )  # fmt: skip
    assert made._explained < 1


def test_a_few_landmarks_order_all_rows_where_embeddings_follow_gradients() -> None:
    chosen = np.arange(0, N, 2)
    found, made = scored(Held(GRADIENTS), chosen, Held(GRADIENTS[chosen]), aggregation="mean")
    less = LessSelector(aggregation="mean").score(
        [CheckpointFeatures(Held(GRADIENTS), tuple(Held(t) for t in TARGETS))],
        4,
        boundary(),  # type: ignore[arg-type]
    )
    assert np.corrcoef(found.values, less.values)[0, 1] > 0.95
    assert made._explained > 0.5


def test_rows_without_an_embedding_and_landmarks_without_a_gradient_are_left_out() -> None:
    chosen, usable = np.arange(0, N, 2), np.ones(N, bool)
    usable[[4, 5]] = False
    with_gradient = np.ones(len(chosen), bool)
    with_gradient[0] = False
    gradients = GRADIENTS[chosen].copy()
    gradients[0] = np.nan
    found, _ = scored(Held(GRADIENTS, usable), chosen, Held(gradients, with_gradient))
    assert np.flatnonzero(~found.usable).tolist() == [4, 5]
    assert np.isnan(found.values[[4, 5]]).all()
    assert np.isfinite(found.values[0])  # a landmark without a gradient has an estimate
    assert found.skipped == {"without_embedding": 2, "landmark_without_gradient": 1}


def test_landmarks_are_drawn_by_the_seed_from_rows_with_a_target_token() -> None:
    made = LandmarksSelector(landmarks=6, seed=7)
    drawn = made.drawn(data(masked=(0, 3)))
    assert len(set(drawn)) == 6
    assert not {0, 3} & set(drawn.tolist())
    assert drawn.tolist() == sorted(drawn.tolist()) == made.drawn(data(masked=(0, 3))).tolist()
    assert drawn.tolist() != LandmarksSelector(landmarks=6, seed=8).drawn(data((0, 3))).tolist()
    assert len(LandmarksSelector().drawn(data(masked=(0, 3)))) == N - 2  # all there are
    with pytest.raises(BadInput, match="1 training rows have a target token"):
        made.drawn(data(masked=(1, 2), n=3))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"landmarks": 1}, "needs at least 2"),
        ({"scoring": "direct"}, "projected features"),
    ],
)
def test_what_an_estimate_cannot_do_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LandmarksSelector(**given)
