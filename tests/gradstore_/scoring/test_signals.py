"""Signals of training rows, against the formulas on the stored rows; losses where kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput
from gradstore.format.layout import RowStatus
from gradstore.scoring.pairing import checkpoint_features, shared_sets
from gradstore.scoring.signals import RowSignals, row_signals
from gradstore.store.reader import Store, open_store

N, M, D = 40, 6, 4
RATES = {1: 3e-4, 2: 1e-4}


def values(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, D)).astype(np.float32)


def norms(step: int) -> np.ndarray:
    return np.random.default_rng(90 + step).uniform(0.1, 5, N).astype(np.float32)


def losses(step: int) -> np.ndarray:
    return np.random.default_rng(70 + step).uniform(0, 9, N).astype(np.float32)


def build(
    kit: Any, path: Path, sets: Sequence[str] = ("a", "b"), keep: Sequence[int] = (1, 2)
) -> Store:
    """Steps 1 and 2 of 40 rows, row 3 masked and row 7 not finite at step 2; losses at `keep`."""
    with kit.writer(path) as writer:
        for step, rate in RATES.items():
            status = np.full(N, RowStatus.OK, np.uint8)
            status[3] = RowStatus.MASKED
            status[7] = RowStatus.NON_FINITE if step == 2 else RowStatus.OK
            record = kit.record(f"train/{step}", learning_rate=rate)
            generation = writer.begin(record, kit.rows(N), dim=D, losses=step in keep)
            given = losses(step) if step in keep else None
            generation.write_unit(0, values(step, N), norms(step), status, np.arange(N), given)
            generation.commit()
            for number, name in enumerate(sets, 1):
                goal = writer.begin(kit.record(f"target/{name}/{step}"), kit.rows(M), dim=D)
                ones = np.ones(M, np.float32)
                goal.write_unit(0, values(10 * number + step, M), ones, ones * 0, ones)
                goal.commit()
    return open_store(path)


def signals(store: Store, which: Any = "all") -> RowSignals:
    pairs = checkpoint_features(store, which, targets=shared_sets(store, which))
    return row_signals(pairs, chunk_rows=256)


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float64)


def test_every_signal_is_the_weighted_mean_of_its_formula(kit: Any, tmp_path: Path) -> None:
    found = signals(build(kit, tmp_path / "s"))
    usable = np.ones(N, bool)
    usable[[3, 7]] = False
    weights = {1: 0.75, 2: 0.25}
    np.testing.assert_array_equal(found.usable, usable)
    assert found.codes[[3, 7]].tolist() == [RowStatus.MASKED, RowStatus.NON_FINITE]
    np.testing.assert_array_equal(found.tokens, np.arange(N))

    def mean(of: Any) -> np.ndarray:
        return np.asarray(sum(weights[step] * of(step) for step in weights))

    trains = {step: unit(values(step, N).astype(np.float16).astype(np.float64)) for step in (1, 2)}
    agreement = mean(
        lambda step: (trains[step] @ trains[step][usable].sum(axis=0) - 1) / (usable.sum() - 1)
    )
    goals = np.stack(
        [mean(lambda step, n=n: trains[step] @ unit(values(10 * n + step, M)).mean(axis=0))
         for n in (1, 2)], axis=1,
    )  # fmt: skip
    for name, expected in (
        ("loss", mean(losses)),
        ("gradient_norm", mean(norms)),
        ("self_influence", mean(lambda step: norms(step).astype(np.float64) ** 2)),
        ("agreement", agreement),
        ("targets", goals),
    ):
        got = getattr(found, name)
        np.testing.assert_allclose(got[usable], expected[usable], atol=2e-3, err_msg=name)
        assert np.isnan(got[~usable]).all()


def test_the_newest_checkpoint_alone_is_its_own_mean(kit: Any, tmp_path: Path) -> None:
    found = signals(build(kit, tmp_path / "s"), "last")
    np.testing.assert_allclose(found.loss[found.usable], losses(2)[found.usable])


def test_a_checkpoint_without_losses_leaves_the_mean_empty(kit: Any, tmp_path: Path) -> None:
    store = build(kit, tmp_path / "s", keep=(2,))
    assert np.isnan(signals(store).loss).all()
    assert np.isfinite(signals(store, "last").loss).any()


def test_no_target_set_is_needed(kit: Any, tmp_path: Path) -> None:
    assert signals(build(kit, tmp_path / "s", sets=())).targets.shape == (N, 0)


def test_target_sets_are_those_that_all_chosen_checkpoints_have(kit: Any, tmp_path: Path) -> None:
    store = kit.build(
        tmp_path / "s", "train/1", "train/2", "target/a/1", "target/a/2", "target/b/2"
    )
    assert shared_sets(store, "all") == ["a"]
    assert shared_sets(store, "last") == ["a", "b"]
    with pytest.raises(BadInput, match="3 checkpoints requested"):
        shared_sets(store, 3)
