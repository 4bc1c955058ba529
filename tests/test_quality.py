"""What benchmarks/quality re-implements of selectors chooses as the selectors do."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from dataflex.data.rows import Rows, RunData
from dataflex.features import direct
from dataflex.run.context import UpdateContext
from dataflex.selectors.base import Selection
from dataflex.selectors.icons import IconsSelector
from dataflex.selectors.landmarks import LandmarksSelector
from dataflex.selectors.less import LessSelector
from dataflex.selectors.mirror import MirrorSelector
from dataflex.selectors.ranked_again import rank_again
from dataflex.selectors.row_scores import RowScores
from gradstore.format.layout import RowStatus
from gradstore.scoring.comparable import CheckpointFeatures

N, D, K, RNG = 60, 8, 6, np.random.default_rng(4)
GRADIENTS, TARGET = RNG.normal(size=(N, D)), RNG.normal(size=(5, D))
EMBEDDED = GRADIENTS + RNG.normal(size=(N, D)) / 2
WHOLE = GRADIENTS @ TARGET.mean(axis=0) + RNG.normal(size=N)


def rows_of(name: str, n: int) -> Rows:
    ids = [[1, row] for row in range(n)]
    labels = [[-100, row] for row in range(n)]
    return Rows(name, datasets.Dataset.from_dict({"input_ids": ids, "labels": labels}))


class Features:
    """Rows in memory as scores and embeddings are read."""

    def __init__(self, values: Any) -> None:
        self.features = np.asarray(values, dtype=np.float32)
        self.rows, self.dim = self.features.shape
        self.usable = np.ones(self.rows, dtype=bool)
        self.norm = np.ones(self.rows, dtype=np.float32)
        self.status = np.full(self.rows, RowStatus.OK)
        self.units = [(0, self.rows)]

    def read(self, start: int, stop: int) -> Any:
        return self.features[start:stop]

    def units_range(self, unit: int) -> tuple[int, int]:
        return self.units[unit]


@pytest.fixture
def data() -> RunData:
    nothing: Any = None
    return RunData(rows_of("train", N), (rows_of("rule", 5),), nothing, "default", nothing, "sft",
                   nothing)  # fmt: skip


def world_of(data: RunData, **more: Any) -> Any:
    """Features by the rows' numbers, which their tokens are."""

    def numbers(rows: Rows) -> list[int]:
        return [row["input_ids"][1] for row in rows.dataset]

    def features(kind: str, rows: Rows) -> Features:
        return Features((TARGET if rows.name == "rule" else GRADIENTS)[numbers(rows)])

    run = SimpleNamespace(data=data, learning_rate=0.01, seed=3, step=7, **more)
    unit = (EMBEDDED / np.linalg.norm(EMBEDDED, axis=1, keepdims=True)).astype(np.float32)

    def embeddings(pooling: str, rows: Rows) -> Any:
        return embedded_target if rows.name == "rule" else unit[numbers(rows)]

    embedded_target = (TARGET / np.linalg.norm(TARGET, axis=1, keepdims=True)).astype(np.float32)
    return SimpleNamespace(
        run=run, k=K, features=features, embeddings=embeddings,
        output_gradients=lambda rows: unit[numbers(rows)],
        whole_products=lambda rows, queries, by: WHOLE[numbers(rows), None],
        once=lambda name, make: make(),
    )  # fmt: skip


def context_of(data: RunData) -> UpdateContext:
    asked: Any = SimpleNamespace(
        config=SimpleNamespace(dataflex=SimpleNamespace(target_subtasks=None)), data=data,
        ranks=SimpleNamespace(decide=lambda work: work()), shows_progress=False,
    )  # fmt: skip
    return UpdateContext(asked, 7, 1, 2, 0.01, None, None)


def test_landmarks_choose_as_the_selector(script: Any, data: RunData) -> None:
    found = script("rules").landmarks(20)(world_of(data), 0)

    selector = LandmarksSelector(landmarks=20)
    selector._chosen = at = selector.drawn(data)
    selector._embedder = SimpleNamespace(generation=lambda _: Features(EMBEDDED))  # type: ignore[assignment]
    pair = CheckpointFeatures(Features(GRADIENTS[at]), (Features(TARGET),))
    context = context_of(data)
    scores = selector.score([pair], K, context)
    expected = selector.take(scores.values, K, context.among_candidates(scores.usable))

    assert found.tolist() == expected.tolist()


def test_a_second_ranking_chooses_as_the_selector(
    script: Any, data: RunData, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = script("rules").rerank("exact", 0.2)(world_of(data), 0)

    asked: list[Any] = []

    def whole(*_: Any, among: Any, **more: Any) -> Any:
        asked.append(among)
        values = np.full((N, 1), np.nan)
        values[among, 0] = WHOLE[among]
        return direct.DirectInfluence(values, {}, 5, 0)

    monkeypatch.setattr(direct, "direct_influence", whole)
    selector, context = LessSelector(rerank={"top": 0.2}), context_of(data)
    pair = CheckpointFeatures(Features(GRADIENTS), (Features(TARGET),))
    stored = selector.score([pair], K, context)
    first: Any = selector.take(stored.values, K, stored.usable)
    assert selector.rerank is not None
    kept = [RowScores(stored.values, stored.usable, {})]
    chosen = rank_again(selector, selector.rerank, Selection(first, stored.values[first]), kept,
                        context)  # fmt: skip

    assert len(asked[0]) == 12, "0.2 of 60"
    assert found.tolist() == chosen.indices.tolist()
    assert set(found.tolist()) != set(first.tolist()), "or nothing was ranked again"


def test_icons_choose_as_the_selector_that_makes_every_target_row_a_task(
    script: Any, data: RunData
) -> None:
    found = script("more_methods").icons(world_of(data), 0)

    selector, context = IconsSelector(task_boundaries=[1] * len(TARGET)), context_of(data)
    scores = selector.score(
        [CheckpointFeatures(Features(GRADIENTS), (Features(TARGET),))], K, context
    )
    expected = selector.take(scores.values, K, context.among_candidates(scores.usable))
    assert found.tolist() == expected.tolist()


def test_tsds_draws_from_the_rows_that_its_transport_reaches(script: Any, data: RunData) -> None:
    tsds = script("more_methods").tsds
    world = world_of(data)
    found = tsds(world, 0)
    assert len(set(found.tolist())) == K
    assert tsds(world_of(data), 0).tolist() == found.tolist()
    world.run.step += 1
    assert tsds(world, 0).tolist() != found.tolist(), "a draw for each step"
    near = world.embeddings("mean", data.train) @ world.embeddings("mean", data.targets[0]).T
    assert near[found].max(axis=1).mean() > near.max(axis=1).mean()


@pytest.mark.parametrize("relative", [True, False])
def test_mirror_chooses_as_the_selector(
    script: Any, data: RunData, monkeypatch: pytest.MonkeyPatch, relative: bool
) -> None:
    rules = script("rules")
    before, after = RNG.uniform(1, 9, N), RNG.uniform(0, 1, N)
    trained: list[Any] = []

    @contextmanager
    def training(context: Any, rows: Rows, positions: Any, settings: Any, seed: Any) -> Any:
        trained.append((rows.name, positions.tolist(), settings))
        yield 1.0, 0.5

    monkeypatch.setattr(rules, "trained_on", training)
    world = world_of(data, losses=lambda rows: after if trained else before, model=None,
                     collate=None)  # fmt: skip
    found = rules.mirror(relative)(world, 0)

    selector, context = MirrorSelector(relative=relative), context_of(data)
    ((name, positions, settings),) = trained
    assert (name, positions) == ("rule", list(range(5)))
    assert settings == selector._training(0.01), "at the run's own rate"
    assert script("flops").EPOCHS == selector.target_epochs
    monkeypatch.setattr(
        selector, "_subtasks", lambda run: [("rule", data.targets[0], np.arange(5))]
    )
    monkeypatch.setattr(selector, "_losses_before", lambda context: (before, 0))
    monkeypatch.setattr(selector, "_losses_after", lambda *_: (after[:, None], {}))
    assert found.tolist() == selector.select(K, context).indices.tolist()
