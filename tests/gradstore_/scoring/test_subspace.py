"""The target rows' subspace against numpy's singular value decomposition of explicit matrices."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradstore.errors import BadInput
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores, subtask_influence
from gradstore.scoring.metric import Normalize
from gradstore.scoring.plain_rows import PlainRows
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.subspace import Subspace, subspace_told

Floats = np.ndarray[Any, np.dtype[np.float64]]
SUBSPACE = InnerProduct("cosine", "subspace")


def rows(seed: int, n: int, d: int) -> Floats:
    """Rows of very different lengths that share some directions more than others."""
    rng = np.random.default_rng(seed)
    mixed = (rng.normal(size=(n, d)) / np.arange(1, d + 1)) @ rng.normal(size=(d, d))
    return np.asarray(mixed * rng.lognormal(0, 1, size=(n, 1)), dtype=np.float64)


def unit(given: Floats) -> Floats:
    return np.asarray(given / np.linalg.norm(given, axis=1, keepdims=True))


def projection(targets: Floats) -> tuple[Floats, int]:
    """(d, d) onto the least right singular vectors with 90% of the squares, and how many."""
    _, values, vectors = np.linalg.svd(unit(targets))
    squares = values**2
    k = next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= 0.9 * squares.sum())
    return vectors[:k].T @ vectors[:k], k


def of(*sets: Floats, kept: float = 0.9) -> Subspace:
    sources = [PlainRows(one, "dev") for one in sets]
    return Subspace.of(sources, [source.usable for source in sources], kept=kept)


@pytest.mark.parametrize("normalize", get_args(Normalize))
@pytest.mark.parametrize(("t", "d"), [(7, 30), (40, 12)])  # 40 rows are folded to 12
def test_every_product_is_that_of_both_rows_projected(normalize: Any, t: int, d: int) -> None:
    train, target = [rows(1, 50, d), rows(2, 50, d)], [rows(3, t, d), rows(4, t, d)]
    checkpoints = [
        CheckpointFeatures(x, [each[:3], each[3:]], weight)
        for x, each, weight in zip(train, target, (0.25, 0.75), strict=True)
    ]

    found = subtask_influence(checkpoints, product=InnerProduct(normalize, "subspace")).values

    expected, dims = np.zeros((50, 2)), []
    for x, each, weight in zip(train, target, (0.25, 0.75), strict=True):
        onto, k = projection(each)
        left = unit(x) if normalize == "cosine" else x
        right = each if normalize == "none" else unit(each)
        products = (left @ onto) @ (right @ onto).T
        means = [products[:, :3].mean(axis=1), products[:, 3:].mean(axis=1)]
        expected += weight * np.stack(means, axis=1)
        dims.append(k)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5 * np.abs(expected).max())
    assert subspace_told(checkpoints) == {"kept": 0.9, "rows": t, "dims": dims}


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.integers(2, 30), d=st.integers(2, 20))
def test_all_that_the_target_rows_span_changes_no_product_with_one(
    seed: int, t: int, d: int
) -> None:
    target = rows(seed, t, d)
    whole = of(target, kept=1.0)
    assert whole.dims <= min(t, d)
    # Rows are read as float32.
    np.testing.assert_allclose(whole.project(target), target, atol=1e-6 * np.abs(target).max())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), t=st.integers(3, 12), d=st.integers(2, 12))
def test_neither_a_rotation_nor_the_order_nor_the_sets_of_rows_count(
    seed: int, t: int, d: int
) -> None:
    """From three rows on: of two that disagree the mean may lie outside, which is refused."""
    rng = np.random.default_rng(seed)
    train, target, queries = rows(seed, 9, d), rows(seed + 1, t, d), rows(seed + 2, 3, d)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    first = influence_scores([CheckpointFeatures(train, target)], product=SUBSPACE).values

    turned = CheckpointFeatures(train @ rotation, target @ rotation)

    again = influence_scores([turned], product=SUBSPACE).values
    np.testing.assert_allclose(again, first, atol=1e-5)
    shuffled = target[rng.permutation(t)]
    np.testing.assert_allclose(
        of(shuffled[:1], shuffled[1:]).project(queries), of(target).project(queries),
        atol=1e-8 * np.abs(queries).max(),
    )  # fmt: skip


def test_directions_of_equal_weight_are_kept_together() -> None:
    both = of(np.eye(6)[:5])  # 5 of .2 each: no 4 of them are the first
    assert (both.dims, both.rows) == (5, 5)
    assert of(np.eye(20)[:10]).dims == 10  # 9 of 10 are enough, and no 9 are the first


def test_a_target_row_alone_is_projected_as_all_of_them_are() -> None:
    checkpoint = CheckpointFeatures(rows(1, 20, 9), rows(2, 6, 9))
    alone = subtask_influence([checkpoint], subtask_sizes=[1] * 6, product=SUBSPACE).values
    whole = influence_scores([checkpoint], product=SUBSPACE).values
    np.testing.assert_allclose(alone.mean(axis=1), whole, atol=1e-6)


def test_rows_that_one_checkpoint_cannot_use_are_in_no_subspace() -> None:
    train, first, second = rows(1, 20, 8), rows(2, 6, 8), rows(3, 6, 8)
    broken = first.copy()
    broken[[1, 4]] = np.nan
    pairs = [CheckpointFeatures(train, broken, 0.5), CheckpointFeatures(train, second, 0.5)]
    left = [0, 2, 3, 5]
    expected = [CheckpointFeatures(train, each[left], 0.5) for each in (first, second)]
    np.testing.assert_allclose(
        influence_scores(pairs, product=SUBSPACE).values,
        influence_scores(expected, product=SUBSPACE).values,
        atol=1e-7,
    )


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (np.ones((1, 4)), "1 of 1 target rows can be used, and .* needs 2 or more"),
        (np.zeros((3, 4)), "0 of 3 target rows can be used"),
        (np.diag([1.0, 0, 0, np.nan]), "1 of 4 target rows can be used"),
    ],
)
def test_too_few_target_rows_are_refused_before_a_feature_is_read(
    target: Floats, said: str
) -> None:
    class Unread(PlainRows):
        def read(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            raise AssertionError

    checkpoint = CheckpointFeatures(Unread(rows(1, 5, 4), "train"), [Unread(target, "dev")])
    for ask in (SUBSPACE.check, subspace_told):
        with pytest.raises(BadInput, match=said):
            ask([checkpoint])


def test_train_and_target_features_may_be_of_two_kinds() -> None:
    train, target = PlainRows(rows(1, 9, 4), "train"), PlainRows(rows(2, 3, 4), "dev")
    expected = influence_scores([CheckpointFeatures(train, [target])], product=SUBSPACE).values
    for source, kind in ((train, "adam_marginal"), (target, "sgd")):
        source.record = type("Record", (), {"feature": kind})()  # type: ignore[attr-defined]
    found = influence_scores([CheckpointFeatures(train, [target])], product=SUBSPACE).values
    np.testing.assert_array_equal(found, expected)
