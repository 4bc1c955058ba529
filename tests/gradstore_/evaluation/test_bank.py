"""The bank: measured once, resumed after a kill, refused for another configuration."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch
from gradstore.evaluation import draw_subsets
from gradstore.evaluation.bank import Bank, Progress

SUBSETS = draw_subsets(10, 4, 0.5)
SETTINGS = {"model": "tiny", "learning_rate": 1e-3}


class Training:
    """Stands for a training run: losses are a function of rows and seed; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, rows: np.ndarray, seed: int) -> np.ndarray:
        self.calls += 1
        return np.array([rows.sum() + seed, rows.max()], dtype=float)


class Killed(BaseException):
    """What ends a process between two steps."""


def bank(folder: Path, **changed: object) -> Bank:
    return Bank(folder, SETTINGS | changed, rows=10, queries=2)


def test_losses_are_those_of_the_subsets_and_measured_once(tmp_path: Path) -> None:
    training, told = Training(), []
    found = bank(tmp_path).fill(SUBSETS, training, budget=4, tell=told.append)
    expected = [[np.flatnonzero(mask).sum(), np.flatnonzero(mask).max()] for mask in SUBSETS]
    assert found.tolist() == expected
    assert [(each.done, each.total) for each in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    again = bank(tmp_path).fill(SUBSETS[::-1], training, budget=0)
    assert again.tolist() == expected[::-1]
    assert training.calls == 4


def test_more_subsets_and_other_seeds_cost_only_what_is_new(tmp_path: Path) -> None:
    training = Training()
    bank(tmp_path).fill(SUBSETS[:3], training, budget=3)
    bank(tmp_path).fill(SUBSETS, training, budget=1)
    other = bank(tmp_path).fill(SUBSETS[:1], training, budget=1, seed=7)
    assert training.calls == 5
    assert other[0, 0] == np.flatnonzero(SUBSETS[0]).sum() + 7


def test_losses_of_several_seeds_are_means_and_each_model_is_trained_once(tmp_path: Path) -> None:
    training = Training()
    bank(tmp_path).fill(SUBSETS, training, budget=4, seed=3)
    with pytest.raises(BadInput, match="8 retrainings are missing"):
        bank(tmp_path).fill(SUBSETS, training, budget=7, seed=range(3, 6))
    found = bank(tmp_path).fill(SUBSETS, training, budget=8, seed=range(3, 6))
    assert training.calls == 12
    assert found[:, 0] == pytest.approx([np.flatnonzero(mask).sum() + 4 for mask in SUBSETS])
    with pytest.raises(BadInput, match="seed is empty"):
        bank(tmp_path).fill(SUBSETS, training, budget=8, seed=())


@pytest.mark.parametrize("step", range(4))
@pytest.mark.parametrize("point", ["fsync", "replace"])
def test_a_kill_at_any_step_loses_at_most_the_retraining_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, point: str
) -> None:
    bank(tmp_path)
    training, count, original = Training(), 0, getattr(os, point)

    def killing(*args: object) -> object:
        nonlocal count
        # An entry is two fsyncs (file, folder) and one replace.
        count += 1
        if count == (2 * step + 1 if point == "fsync" else step + 1):
            raise Killed
        return original(*args)

    with monkeypatch.context() as patched:
        patched.setattr(os, point, killing)
        with pytest.raises(Killed):
            bank(tmp_path).fill(SUBSETS, training, budget=4)
    assert training.calls == step + 1
    found = bank(tmp_path).fill(SUBSETS, training, budget=4 - step)
    assert training.calls == 5
    assert found[:, 1].tolist() == [np.flatnonzero(mask).max() for mask in SUBSETS]


def test_an_empty_bank_asks_for_a_forecast_only_where_the_budget_is_short(tmp_path: Path) -> None:
    training, asked = Training(), []

    def forecast(mask: np.ndarray) -> float:
        asked.append(mask)
        return 90.0

    with pytest.raises(BadInput, match=r"4 retrainings are missing .*about 6 min"):
        bank(tmp_path).fill(SUBSETS, training, budget=3, forecast=forecast)
    assert training.calls == 0
    assert len(asked) == 1
    np.testing.assert_array_equal(asked[0], SUBSETS[0])
    bank(tmp_path).fill(SUBSETS[:1], training, budget=1, forecast=forecast)
    with pytest.raises(BadInput, match="3 retrainings are missing"):
        bank(tmp_path).fill(SUBSETS, training, budget=0, forecast=forecast)
    assert len(asked) == 1


def test_without_a_budget_nothing_starts_and_the_cost_is_said(tmp_path: Path) -> None:
    training = Training()
    with pytest.raises(BadInput, match=r"4 retrainings are missing .*\(0 are there\); the budget"):
        bank(tmp_path).fill(SUBSETS, training, budget=3)
    assert training.calls == 0
    bank(tmp_path).fill(SUBSETS[:1], training, budget=1)
    with pytest.raises(BadInput, match=r"3 retrainings .*\(1 are there\), about .* s; the budget"):
        bank(tmp_path).fill(SUBSETS, training, budget=0)
    assert training.calls == 1


def test_a_bank_of_another_configuration_is_refused_by_the_key_that_differs(
    tmp_path: Path,
) -> None:
    bank(tmp_path)
    with pytest.raises(ProvenanceMismatch, match=r"learning_rate: 0.001 in the bank, 0.1 now"):
        bank(tmp_path, learning_rate=0.1)
    with pytest.raises(ProvenanceMismatch, match="bank_queries: 2 in the bank, 3 now"):
        Bank(tmp_path, SETTINGS, rows=10, queries=3)


def test_an_entry_from_another_bank_is_refused(tmp_path: Path) -> None:
    for folder, settings in (("one", {}), ("two", {"model": "large"})):
        bank(tmp_path / folder, **settings).fill(SUBSETS[:1], Training(), budget=1)
    (entry,) = (tmp_path / "two" / "entries").iterdir()
    (tmp_path / "one" / "entries" / entry.name).write_bytes(entry.read_bytes())
    with pytest.raises(ProvenanceMismatch, match="another training configuration"):
        bank(tmp_path / "one").fill(SUBSETS[:1], Training(), budget=1)


def test_a_changed_byte_is_damage(tmp_path: Path) -> None:
    bank(tmp_path).fill(SUBSETS[:1], Training(), budget=1)
    (entry,) = (tmp_path / "entries").iterdir()
    entry.write_bytes(entry.read_bytes().replace(b'"seed":0', b'"seed":1'))
    with pytest.raises(DamagedData, match="is not as it was written"):
        bank(tmp_path).fill(SUBSETS[:1], Training(), budget=1)


@pytest.mark.parametrize(
    ("losses", "said"), [([1.0], "gave 1 losses"), ([1.0, np.nan], r"losses\[1\] is nan")]
)
def test_losses_that_do_not_fit_are_not_kept(
    tmp_path: Path, losses: list[float], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        bank(tmp_path).fill(SUBSETS[:1], lambda rows, seed: losses, budget=1)
    assert not (tmp_path / "entries").exists()


def test_subsets_that_do_not_fit_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="subset 0 holds no row"):
        bank(tmp_path).fill(np.zeros((1, 10), dtype=bool), Training(), budget=1)
    with pytest.raises(BadInput, match="subsets has shape"):
        bank(tmp_path).fill(SUBSETS[:, :5], Training(), budget=1)


def test_progress_tells_the_time_left() -> None:
    assert str(Progress(38, 100, 7500)) == "retrained 38 of 100, about 2.1 h left"
    assert str(Progress(100, 100, 0)) == "retrained 100 of 100"
