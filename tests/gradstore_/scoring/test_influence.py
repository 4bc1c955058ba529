"""Promises of the exact streamed scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.scoring.comparable import CheckpointFeatures, check_comparable
from gradstore.scoring.influence import (
    aggregate,
    checkpoint_weights,
    influence_scores,
    subtask_influence,
)
from gradstore.scoring.query import query_influence
from gradstore.scoring.scan import unit_rows


@dataclass
class Plain:
    """The smallest source: decoded float32 rows."""

    features: np.ndarray
    usable: np.ndarray = field(default=None)  # type: ignore[assignment]
    name: str = "plain"

    def __post_init__(self) -> None:
        self.features = np.asarray(self.features, dtype=np.float32)
        if self.usable is None:
            self.usable = np.ones(len(self.features), dtype=bool)

    @property
    def rows(self) -> int:
        return self.features.shape[0]

    @property
    def dim(self) -> int:
        return self.features.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.rows
        return self.features[start:stop]


class Packed(Plain):
    """Stored like a generation: float16 with a scale per row, in units, read-only."""

    unit_rows = 100
    dtype = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.features)
        self.status = np.where(self.usable, 0, 2).astype(np.uint8)
        largest = np.abs(np.nan_to_num(self.features)).max(axis=1)
        self.scale = np.where(largest > 0, largest, 1).astype(np.float32)
        self.stored = (self.features / self.scale[:, None]).astype(np.float16)
        self.stored.setflags(write=False)
        self.units = [(a, min(a + self.unit_rows, n)) for a in range(0, n, self.unit_rows)]

    def raw_reader(self) -> Any:
        return lambda unit, low, high: self.stored[slice(*self.units[unit])][low:high]

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.stored[start:stop].astype(np.float32) * self.scale[start:stop, None]


def reference(
    checkpoints: Sequence[CheckpointFeatures], sizes: Sequence[int] | None, mode: str
) -> np.ndarray:
    """Letter by letter in float64: every cosine, then checkpoints, rows, sub-tasks."""
    total: Any = 0.0
    good = np.ones(checkpoints[0].train.rows, dtype=bool)
    good_targets = np.ones(sum(t.rows for t in checkpoints[0].targets), dtype=bool)
    for c in checkpoints:
        train = c.train.read(0, c.train.rows).astype(np.float64)
        target = np.concatenate([t.read(0, t.rows) for t in c.targets]).astype(np.float64)
        good &= c.train.usable
        good_targets &= np.concatenate([t.usable for t in c.targets])
        train = train / np.linalg.norm(train, axis=1, keepdims=True)
        target = target / np.linalg.norm(target, axis=1, keepdims=True)
        total = total + c.weight * (train @ target.T)
    sizes = [t.rows for t in checkpoints[0].targets] if sizes is None else sizes
    stops = np.cumsum(sizes)
    means = np.stack(
        [
            np.stack([total[:, j] for j in range(b - s, b) if good_targets[j]]).mean(axis=0)
            for s, b in zip(sizes, stops, strict=True)
        ],
        axis=1,
    )
    scores = means.max(axis=1) if mode == "max" else means.mean(axis=1)
    return np.where(good, scores, np.nan)


def random_checkpoints(
    seed: int,
    n: int = 700,
    d: int = 48,
    targets: Sequence[int] = (7, 5),
    count: int = 3,
    kind: type[Plain] = Packed,
    bad: float = 0.05,
) -> list[CheckpointFeatures]:
    rng = np.random.default_rng(seed)
    weights = checkpoint_weights(rng.uniform(0.1, 1, count).tolist())

    def source(rows: int, always: int | None = None) -> Plain:
        usable = rng.random(rows) > bad
        if always is not None:
            usable[always] = True
        features = rng.standard_normal((rows, d)) * 10.0 ** rng.integers(-6, 7, (rows, 1))
        features[~usable] = np.nan
        return kind(features.astype(np.float32), usable)

    return [
        CheckpointFeatures(source(n), tuple(source(t, 0) for t in targets), float(w))
        for w in weights
    ]


E11_FIRST = [(0.9, 0.1, 0, 0.2), (0.3, 0.3, 0.4, 0.4), (0, 0.2, 0.6, 0.8)]
E11_SECOND = [(0.3, 0.1, 0.2, 0), (0.6, 0.6, 0.1, 0.1), (0.1, 0.1, 0.5, 0.3)]


def with_cosines(cosines: Sequence[Sequence[float]]) -> tuple[Plain, Plain]:
    """Train and target rows that have exactly these cosines (targets 2 and 3 at 60 degrees)."""
    table = np.array(cosines)
    gram = np.eye(4)
    gram[2, 3] = gram[3, 2] = 0.5
    targets = np.zeros((4, 8))
    targets[:, :4] = np.linalg.cholesky(gram)
    span = table @ np.linalg.inv(gram) @ targets
    span[:, 5] = np.sqrt(1 - (span**2).sum(axis=1))
    return Plain(span * [[3.0], [0.01], [700.0]]), Plain(targets * [[1], [2], [3], [4]])


def e11() -> list[CheckpointFeatures]:
    weights = checkpoint_weights([2e-5, 1e-5])
    pairs = (with_cosines(E11_FIRST), with_cosines(E11_SECOND))
    return [
        CheckpointFeatures(train, (target,), float(w))
        for (train, target), w in zip(pairs, weights, strict=True)
    ]


def test_e11_max_over_subtasks() -> None:
    scores = influence_scores(e11(), subtask_sizes=[2, 2])
    np.testing.assert_allclose(scores.values, [0.4, 0.4, 0.6], atol=1e-5)
    assert scores.best_subtask[2] == 1
    assert scores.best_subtask[0] == 0
    assert scores.skipped == {}


def test_e11_subtask_means_and_mean_over_all() -> None:
    total = (2 * np.array(E11_FIRST) + np.array(E11_SECOND)) / 3
    means = [aggregate(total[:, columns], [2])[0] for columns in (slice(0, 2), slice(2, 4))]
    np.testing.assert_allclose(np.stack(means, 1), [[0.4, 0.1], [0.4, 0.3], [0.1, 0.6]], atol=1e-5)
    values, best = aggregate(total, [2, 2])
    np.testing.assert_allclose(values, [0.4, 0.4, 0.6], atol=1e-5)
    assert best.tolist() == [0, 0, 1]
    scores = influence_scores(e11(), subtask_sizes=[2, 2], aggregation="mean")
    np.testing.assert_allclose(scores.values, [0.25, 0.35, 0.35], atol=1e-5)


@pytest.mark.parametrize("mode", ["max", "mean"])
@pytest.mark.parametrize("kind", [Plain, Packed])
def test_scores_equal_brute_force_float64(mode: Any, kind: type[Plain]) -> None:
    checkpoints = random_checkpoints(1, kind=kind)
    scores = influence_scores(checkpoints, aggregation=mode)
    expected = reference(checkpoints, None, mode)
    np.testing.assert_allclose(scores.values, expected, atol=2e-6)
    assert (scores.usable == ~np.isnan(expected)).all()
    assert (scores.usable == ~np.isnan(scores.values)).all()
    assert (scores.best_subtask == -1).tolist() == (~scores.usable).tolist()


def test_subtask_sizes_cut_a_single_target_set() -> None:
    checkpoints = random_checkpoints(2, targets=(12,), bad=0.0)
    scores = influence_scores(checkpoints, subtask_sizes=[5, 3, 4])
    np.testing.assert_allclose(scores.values, reference(checkpoints, [5, 3, 4], "max"), atol=2e-6)


@pytest.mark.parametrize("mode", ["max", "mean"])
def test_the_influence_on_each_subtask_is_what_scores_are_made_of(mode: Any) -> None:
    checkpoints = random_checkpoints(7, targets=(7, 5, 3))
    found, scores = subtask_influence(checkpoints), influence_scores(checkpoints, aggregation=mode)
    assert found.values.shape == (700, 3)
    folded = found.values.max(axis=1) if mode == "max" else found.values.mean(axis=1)
    np.testing.assert_array_equal(folded, scores.values)
    np.testing.assert_array_equal(found.usable, scores.usable)
    assert found.skipped == scores.skipped != {}
    for index, target in enumerate(checkpoints[0].targets):
        alone = [CheckpointFeatures(c.train, (c.targets[index],), c.weight) for c in checkpoints]
        assert target.rows == (7, 5, 3)[index]
        # Another width of the product rounds otherwise.
        np.testing.assert_allclose(
            influence_scores(alone).values, found.values[:, index], atol=1e-6
        )


def test_aggregate_of_a_cosine_matrix_equals_the_stream() -> None:
    checkpoints = random_checkpoints(3, targets=(6, 9), count=1)
    checkpoints = [CheckpointFeatures(c.train, c.targets, 1.0) for c in checkpoints]
    train, _ = unit_rows(checkpoints[0].train.read(0, 700))
    targets = np.concatenate([t.read(0, t.rows) for t in checkpoints[0].targets])
    columns = np.concatenate([t.usable for t in checkpoints[0].targets])
    values, best = aggregate(train @ unit_rows(targets)[0].T, [6, 9], usable_targets=columns)
    scores = influence_scores(checkpoints)
    np.testing.assert_allclose(scores.values[scores.usable], values[scores.usable], atol=2e-6)
    assert (scores.best_subtask[scores.usable] == best[scores.usable]).all()


def test_a_subtask_direction_is_not_normalised_again() -> None:
    train = Plain([[1.0, 0.0]])
    opposed = Plain([[0.6, 0.8], [0.6, -0.8]])
    scores = influence_scores([CheckpointFeatures(train, (opposed,), 1.0)])
    np.testing.assert_allclose(scores.values, [0.6], atol=1e-6)


def test_a_row_bad_in_one_generation_is_skipped_with_its_reason() -> None:
    first = Packed(np.eye(4), np.array([True, False, True, True]))
    second = Packed(np.eye(4), np.array([True, True, True, False]))
    second.status = np.array([0, 0, 0, 1], dtype=np.uint8)
    target = Packed(np.ones((1, 4)))
    scores = influence_scores([CheckpointFeatures(s, (target,), 0.5) for s in (first, second)])
    assert scores.usable.tolist() == [True, False, True, False]
    assert scores.skipped == {"non_finite": 1, "masked": 1}


def test_a_target_row_bad_at_one_checkpoint_is_left_out_at_all() -> None:
    train = Plain([[1.0, 0.0], [0.0, 1.0]])
    rows = [[1.0, 0.0], [0.0, 1.0]]
    one = CheckpointFeatures(train, (Plain(rows),), 0.5)
    two = CheckpointFeatures(train, (Plain(rows, np.array([True, False])),), 0.5)
    np.testing.assert_allclose(influence_scores([one, two]).values, [1.0, 0.0], atol=1e-6)


def test_rows_that_turn_out_without_direction_are_reported_not_spread() -> None:
    features = np.ones((300, 5))
    features[7] = 0
    features[290, 2] = np.inf
    features[291, 3] = np.nan
    scores = influence_scores([CheckpointFeatures(Plain(features), (Plain(np.ones((1, 5))),))])
    assert scores.skipped == {"non_finite": 2, "zero_norm": 1}
    assert np.flatnonzero(~scores.usable).tolist() == [7, 290, 291]
    assert (scores.values[scores.usable] == scores.values[0]).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e37])
def test_scaling_a_row_does_not_change_its_score(scale: float) -> None:
    rng = np.random.default_rng(4)
    features = rng.uniform(0.5, 1.0, (10, 33)).astype(np.float32)
    target = Plain(rng.standard_normal((3, 33)))
    before = influence_scores([CheckpointFeatures(Plain(features), (target,))]).values
    features[4] *= np.float32(scale)
    after = influence_scores([CheckpointFeatures(Plain(features), (target,))]).values
    np.testing.assert_allclose(after, before, atol=2e-6)


@pytest.mark.parametrize("kind", [Plain, Packed])
@pytest.mark.parametrize("d", [7, 33, 64])
def test_chunk_size_does_not_change_a_bit(kind: type[Plain], d: int) -> None:
    checkpoints = random_checkpoints(5, n=1300, d=d, count=2, kind=kind)
    small, large = (
        influence_scores(checkpoints, chunk_rows=rows).values.tobytes() for rows in (1, 1 << 20)
    )
    assert small == large


def test_equal_rows_get_equal_bits_wherever_they_stand() -> None:
    for d, targets in ((7, (3,)), (100, (2, 2, 2, 2, 2)), (64, (4, 4))):
        checkpoints = random_checkpoints(6, n=1, d=d, targets=targets, count=1, bad=0)
        copies = Packed(np.repeat(checkpoints[0].train.read(0, 1), 555, axis=0))
        scores = influence_scores([CheckpointFeatures(copies, checkpoints[0].targets, 1.0)])
        assert len(set(scores.values.tolist())) == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 600))
def test_permuting_the_train_rows_permutes_the_scores(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, 20))
    targets = (Packed(rng.standard_normal((3, 20))), Packed(rng.standard_normal((2, 20))))
    order = rng.permutation(n)
    here = influence_scores([CheckpointFeatures(Packed(features), targets)]).values
    there = influence_scores([CheckpointFeatures(Packed(features[order]), targets)]).values
    assert (here[order] == there).all()


def test_progress_counts_every_row_once() -> None:
    seen: list[int] = []
    influence_scores(random_checkpoints(7), chunk_rows=256, on_rows=seen.append)
    assert seen == [256, 256, 188]


def test_reduced_precision_and_autocast_around_us_do_not_reach_the_scores() -> None:
    checkpoints = random_checkpoints(8)
    expected = influence_scores(checkpoints).values
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = influence_scores(checkpoints).values
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(scores, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_scores() -> None:
    checkpoints = random_checkpoints(9)
    torch.set_float32_matmul_precision("high")
    try:
        gpu = influence_scores(checkpoints, device="cuda").values
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_allclose(gpu, influence_scores(checkpoints).values, atol=2e-6)


def test_weights_are_shares_of_the_learning_rate() -> None:
    np.testing.assert_allclose(checkpoint_weights([2e-5, 1e-5]), [2 / 3, 1 / 3])
    assert checkpoint_weights([0.0, 0.0, 0.0]).tolist() == [1 / 3] * 3
    assert checkpoint_weights([5e-324]).tolist() == [1.0]
    assert checkpoint_weights([1e308, 1e308]).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("rates", [[], [1e-5, float("nan")], [-1e-5], [float("inf")]])
def test_weights_that_are_no_weights_are_refused(rates: list[float]) -> None:
    with pytest.raises(BadInput):
        checkpoint_weights(rates)


def test_a_subtask_with_no_usable_row_is_named() -> None:
    bad = Plain(np.ones((3, 2)), np.zeros(3, dtype=bool), name="target/gsm/16")
    good = Plain(np.ones((3, 2)))
    with pytest.raises(BadInput, match=r"sub-task 1 \(target/gsm/16\): none of its 3 rows"):
        influence_scores([CheckpointFeatures(good, (good, bad))])
    half = Plain(np.ones((4, 2)), np.array([True, True, False, False]), name="dev")
    with pytest.raises(BadInput, match=r"sub-task 1 \(rows 2-3 of dev\)"):
        influence_scores([CheckpointFeatures(good, (half,))], subtask_sizes=[2, 2])
    with pytest.raises(BadInput, match="sub-task 1"):
        aggregate(np.ones((2, 2)), [1, 1], usable_targets=np.array([True, False]))


def test_bad_arguments_are_refused_before_the_pass() -> None:
    good = Plain(np.ones((3, 2)))
    one = CheckpointFeatures(good, (good,))
    cases: list[tuple[list[CheckpointFeatures], dict[str, Any], str]] = [
        ([], {}, "no checkpoint"),
        ([CheckpointFeatures(good, ())], {}, "no target set"),
        ([CheckpointFeatures(good, (good,), -1.0)], {}, "weights"),
        ([CheckpointFeatures(good, (good,), float("nan"))], {}, "weights"),
        ([CheckpointFeatures(good, (good,), 0.0)], {}, "weights"),
        ([one, CheckpointFeatures(good, (good, good))], {}, "2 target sets"),
        ([CheckpointFeatures(good, (good, good))], {"subtask_sizes": [3]}, "2 target sets"),
        ([one], {"subtask_sizes": [1, 1]}, "add up to 2"),
        ([one], {"subtask_sizes": [3, 0]}, "whole numbers"),
        ([one], {"subtask_sizes": [1.5, 1.5]}, "whole numbers"),
        ([one], {"aggregation": "sum"}, "'max' or 'mean'"),
        ([one], {"chunk_rows": 0}, "chunk_rows"),
        ([CheckpointFeatures(Plain(np.ones((3, 2)), np.zeros(3, bool)), (good,))], {}, "none of"),
        ([CheckpointFeatures(Plain(np.ones((0, 2))), (good,))], {}, "no rows"),
        ([CheckpointFeatures(good, (Plain(np.zeros((1, 2))),))], {}, "marked usable"),
    ]
    for checkpoints, options, message in cases:
        with pytest.raises(BadInput, match=message):
            influence_scores(checkpoints, **options)


def test_checkpoints_of_other_rows_are_refused() -> None:
    good = Plain(np.ones((3, 2)))
    one = CheckpointFeatures(good, (good,))
    with pytest.raises(ProvenanceMismatch, match="rows differ"):
        influence_scores([one, CheckpointFeatures(Plain(np.ones((4, 2))), (good,))])
    with pytest.raises(ProvenanceMismatch, match="dim differs"):
        influence_scores([CheckpointFeatures(good, (Plain(np.ones((3, 4))),))])
    hashed, other = Plain(np.ones((3, 2))), Plain(np.ones((3, 2)))
    hashed.row_hash = np.zeros((3, 16), np.uint8)  # type: ignore[attr-defined]
    other.row_hash = np.eye(3, 16, k=-1, dtype=np.uint8)  # type: ignore[attr-defined]
    pair = [CheckpointFeatures(hashed, (good,)), CheckpointFeatures(other, (good,))]
    with pytest.raises(ProvenanceMismatch, match=r"2 of 3 rows differ .* first row 1"):
        influence_scores(pair)


def test_query_names_who_helped_and_who_hurt() -> None:
    angles = np.radians([0, 10, 170, 90, 10, 180])
    train = Plain(np.stack([np.cos(angles), np.sin(angles)], 1) * 5)
    usable = np.array([True] * 6)
    usable[0] = False
    train.usable = usable
    targets = (Plain([[0.0, 1.0]]), Plain([[0.0, 3.0], [2.0, 0.0]]))
    result = query_influence([CheckpointFeatures(train, targets)], 1, target=1, top=2)
    assert result.helped.tolist() == [1, 4]
    assert result.hurt.tolist() == [5, 2]
    np.testing.assert_allclose(result.values[1:], np.cos(angles)[1:], atol=1e-6)
    assert np.isnan(result.values[0])
    everything = query_influence([CheckpointFeatures(train, targets)], 1, target=1, top=99)
    assert everything.helped.tolist() == [1, 4, 3, 2, 5]
    assert everything.hurt.tolist() == [5, 2, 3, 1, 4]


def test_query_weighs_checkpoints() -> None:
    checkpoints = random_checkpoints(10, targets=(4,), bad=0)
    sums = sum(
        c.weight * (unit_rows(c.train.read(0, 700))[0] @ unit_rows(c.targets[0].read(2, 3))[0][0])
        for c in checkpoints
    )
    np.testing.assert_allclose(query_influence(checkpoints, 2).values, sums, atol=2e-6)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (3, {}, "rows 0-2"),
        (-1, {}, "rows 0-2"),
        (0, {"target": 1}, "target set 1"),
        (0, {"top": 0}, "top is 0"),
        (1, {}, "target row 1: none"),
    ],
)
def test_query_refuses_rows_that_are_not_there(row: int, options: Any, message: str) -> None:
    train = Plain(np.ones((3, 2)))
    target = Plain(np.ones((3, 2)), np.array([True, False, True]))
    with pytest.raises(BadInput, match=message):
        query_influence([CheckpointFeatures(train, (target,))], row, **options)


def generation(name: str, **changes: Any) -> Any:
    record = {
        "adapter_hash": "a1",
        "effective_seed": 7,
        "autocast": "bf16",
        "attention": "sdpa",
        "projection": {"method": "sjlt", "d": 64, "seed": 7},
    }
    dim = changes.pop("dim", 64)
    return SimpleNamespace(name=name, dim=dim, record=SimpleNamespace(**(record | changes)))


def test_generations_of_one_checkpoint_are_comparable() -> None:
    check_comparable(generation("train/16"), [generation("target/a/16"), generation("target/b/16")])


def test_every_difference_is_listed() -> None:
    other = generation(
        "target/b/32",
        adapter_hash="b2",
        effective_seed=8,
        autocast="no",
        attention="eager",
        dim=32,
        projection={"method": "sjlt", "d": 32, "seed": 8, "s": 4},
    )
    with pytest.raises(ProvenanceMismatch) as caught:
        check_comparable(generation("train/16"), [generation("target/a/16"), other])
    fields = [line.split(" ")[0] for line in caught.value.differences]
    assert fields == [
        *("adapter_hash", "effective_seed", "autocast", "attention", "dim"),
        *("projection.d", "projection.seed", "projection.s"),
    ]
    assert "adapter_hash differs: train/16 has 'a1', target/b/32 has 'b2'" in str(caught.value)
    assert caught.value.exit_code == 3
