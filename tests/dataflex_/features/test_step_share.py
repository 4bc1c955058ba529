"""The share of a row in a step: whose feature needs one, what a run tells, what is said of it."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.data.order import BatchShape
from dataflex.features import step_share
from dataflex.features.settings import FeatureSettings
from dataflex.features.step_share import (
    features_again,
    step_of,
    tell_clipping,
    train_features,
)
from dataflex.run.ranks import Ranks
from dataflex.selectors import by_influence
from dataflex.selectors.less import LessSelector
from gradstore.errors import BadInput
from gradstore.export.room import Room
from gradstore.export.share import OptimizerStep, StepShare


def run(step: OptimizerStep | None) -> Any:
    rows = SimpleNamespace(dataset=[{}] * 4, lengths=np.full(4, 3))
    return SimpleNamespace(
        step=step, data=SimpleNamespace(train=rows), collate=list, model=None, ranks=Ranks(),
        whole_room=Room(),
    )  # fmt: skip


def shares(monkeypatch: pytest.MonkeyPatch, norm: float) -> list[OptimizerStep]:
    """Put an estimate in the place of one from gradients; return the steps it was asked for."""
    asked: list[OptimizerStep] = []

    def estimated(model: Any, batches: Any, step: OptimizerStep, modules: str) -> StepShare:
        assert modules == "linear"  # those of the features
        asked.append(step)
        return StepShare(step.rows, step.max_grad_norm, 5.0, norm)

    monkeypatch.setattr(step_share, "expected_share", estimated)
    monkeypatch.setattr(step_share, "longest_row", lambda model, rows: None)
    return asked


def settings(kind: str) -> FeatureSettings:
    return FeatureSettings(gradient_type=kind, tokens_per_batch=16)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["adam_marginal", "adam", "sgd", "sign"])
def test_other_features_ask_nothing_of_a_run(kind: str) -> None:
    asked = settings(kind)
    assert train_features(run(None), asked) == asked.train_features


def test_a_run_that_does_not_tell_its_steps_is_refused_by_the_name_of_the_feature() -> None:
    with pytest.raises(BadInput, match="adam_share needs the rows of an optimizer step"):
        train_features(run(None), settings("adam_share"))


@pytest.mark.parametrize(("norm", "said"), [(1.0, False), (0.5, False), (20.0, True)])
def test_hard_clipping_is_said_in_one_line(
    norm: float, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step = OptimizerStep(8, 1.0)
    asked = shares(monkeypatch, norm)
    with caplog.at_level(logging.INFO):
        found = train_features(run(step), settings("adam_share"))
    assert asked == [step]
    assert found.share == StepShare(8, 1.0, 5.0, norm)
    assert [("5%" in line and "normalize: cosine" in line) for line in caplog.messages] == (
        [True] if said else []
    )


def clipping_told(caplog: pytest.LogCaptureFixture, kind: str, norms: Any, limit: float) -> bool:
    given: Any = SimpleNamespace(run=run(OptimizerStep(8, limit)), grad_norms=norms)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        tell_clipping(given, settings(kind))
    return bool(caplog.messages)


@pytest.mark.parametrize("kind", ["adam_marginal", "sgd"])
def test_products_with_norms_are_told_of_hard_clipping_by_the_logged_norms(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert clipping_told(caplog, kind, (3.0, 5.0), 1.0)
    assert "clipped to 24% of its length" in caplog.text  # 1 / sqrt((9 + 25) / 2)
    assert "normalize: cosine" in caplog.text
    assert not clipping_told(caplog, kind, (1.5, 1.6), 1.0)
    assert not clipping_told(caplog, kind, (3.0, 5.0), 0.0), "nothing is clipped"
    assert not clipping_told(caplog, kind, (), 1.0), "nothing is logged yet"


@pytest.mark.parametrize("kind", ["adam_share", "adam", "sign"])
def test_features_that_estimate_the_clipping_or_go_by_something_else_are_not_told_by_the_log(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert not clipping_told(caplog, kind, (30.0,), 1.0)


@pytest.mark.parametrize(("normalize", "told"), [("none", 1), ("target", 1), ("cosine", 0)])
def test_a_selection_asks_whether_its_norms_are_of_use(
    normalize: Any, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(step_share, "tell_clipping", lambda *given: asked.append(given))
    monkeypatch.setattr(by_influence, "select_directly", lambda *given: "chosen")
    selector, context = LessSelector(normalize=normalize, scoring="direct"), object()
    assert selector.select(3, context) == "chosen"  # type: ignore[arg-type, comparison-overlap]
    assert asked == [(context, selector.settings)] * told


@pytest.mark.parametrize(("given", "norm"), [(0.5, 0.5), (0.0, 0.0), (-1.0, 0.0), (None, 0.0)])
def test_a_step_has_the_rows_of_all_micro_batches_and_the_trainers_clipping(
    given: float | None, norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SimpleNamespace(rows=24)
    monkeypatch.setattr(BatchShape, "of", lambda args: shape)
    assert step_of(SimpleNamespace(max_grad_norm=given)) == OptimizerStep(24, norm)


def test_rows_that_were_removed_from_the_store_are_not_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = np.array([False, True, False, True])
    drawn: list[list[int]] = []

    def estimated(model: Any, batches: Any, step: OptimizerStep, modules: str) -> StepShare:
        drawn.append(sorted(i for rows, _ in batches for i in rows.tolist()))
        return StepShare(step.rows, step.max_grad_norm, 5.0, 1.0)

    monkeypatch.setattr(step_share, "expected_share", estimated)
    monkeypatch.setattr(step_share, "longest_row", lambda model, rows: None)
    given = run(OptimizerStep(8, 1.0))
    given.data.train.row_set = "the rows"
    asked: list[tuple[Any, Any]] = []

    def without_forgotten(rows: Any, *, of: str) -> Any:
        asked.append((rows, of))
        return SimpleNamespace(forgotten=gone)

    store = SimpleNamespace(without_forgotten=without_forgotten)
    train_features(given, settings("adam_share"), lambda: store)  # type: ignore[arg-type, return-value]
    train_features(given, settings("adam_share"))
    assert asked == [("the rows", "")]
    assert drawn == [[0, 2], [0, 1, 2, 3]]


def test_rows_made_again_have_the_share_they_were_made_with_at_the_steps_of_today() -> None:
    """The estimates are the record's; what is compared with it is the run's."""
    told = {"rows": 6, "max_grad_norm": 1.0, "tokens": 5.0, "norm": 2.5}
    record: Any = SimpleNamespace(role="train", feature_options={"share": told})
    again = features_again(run(OptimizerStep(8, 0.5)), settings("adam_share"), record)
    assert again.share == StepShare(8, 0.5, 5.0, 2.5)
    asked = settings("adam_share")
    target: Any = SimpleNamespace(role="target", feature_options={})
    assert features_again(run(None), asked, target) == asked.target_features
