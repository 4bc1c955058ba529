"""Inner products of scores against their formulas in float64, with matrices formed and inverted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from dataflex.selectors.product import AnyPreconditioner
from gradstore.cli import options
from gradstore.errors import BadInput
from gradstore.export.kronecker import Kind
from gradstore.scoring import curvature
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.curvature import Fisher
from gradstore.scoring.influence import influence_scores, subtask_influence
from gradstore.scoring.plain_rows import PlainRows
from gradstore.scoring.preconditioners import PRECONDITIONERS, Preconditioner
from gradstore.scoring.products import InnerProduct

Floats = np.ndarray[Any, np.dtype[np.float64]]


def rows(seed: int, n: int, d: int) -> Floats:
    """Correlated rows of very different lengths."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    return np.asarray(mixed * rng.lognormal(0, 1, size=(n, 1)), dtype=np.float64)


def by_formula(train: Floats, target: Floats, product: InnerProduct) -> Floats:
    """(n, m) products as the table of `InnerProduct` has them, C formed and inverted."""
    unit_x = train / np.linalg.norm(train, axis=1, keepdims=True)
    unit_t = target / np.linalg.norm(target, axis=1, keepdims=True)
    x = unit_x if product.normalize == "cosine" else train
    if product.preconditioner == "none":
        return x @ (target if product.normalize == "none" else unit_t).T
    moment = x.T @ x / len(x)
    level = product.damping * np.trace(moment) / moment.shape[0]
    inverse = np.linalg.inv(moment + level * np.eye(moment.shape[0]))
    if product.normalize == "none":
        return level * x @ inverse @ target.T
    lengths = np.sqrt(np.einsum("md,de,me->m", unit_t, inverse, unit_t))
    return np.sqrt(level) * x @ inverse @ unit_t.T / lengths


@pytest.mark.parametrize("normalize", ["cosine", "target", "none"])
@pytest.mark.parametrize("preconditioner", ["none", "fisher"])
@pytest.mark.parametrize(("n", "d"), [(40, 8), (12, 30), (300, 16)])
def test_every_product_is_its_formula(normalize: Any, preconditioner: Any, n: int, d: int) -> None:
    train, target = rows(1, n, d), rows(2, 5, d)
    product = InnerProduct(normalize, preconditioner, damping=0.3)
    checkpoint = CheckpointFeatures(train, [target[:2], target[2:]])

    found = subtask_influence([checkpoint], product=product).values

    each = by_formula(train, target, product)
    expected = np.stack([each[:, :2].mean(axis=1), each[:, 2:].mean(axis=1)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), d=st.integers(2, 40))
def test_a_damped_cosine_is_at_most_1_and_tends_to_the_cosine(seed: int, n: int, d: int) -> None:
    checkpoint = CheckpointFeatures(rows(seed, n, d), [rows(seed + 1, 1, d)])
    plain = influence_scores([checkpoint]).values

    damped = influence_scores([checkpoint], product=InnerProduct("cosine", "fisher", 0.1)).values
    nearly = influence_scores([checkpoint], product=InnerProduct("cosine", "fisher", 1e6)).values

    assert np.abs(damped).max() <= 1 + 1e-5
    np.testing.assert_allclose(nearly, plain, atol=1e-4)


def test_fewer_rows_than_dimensions_give_the_same_inverse_as_the_formed_matrix() -> None:
    train, query = rows(3, 20, 21), rows(4, 3, 21)
    few = Fisher.of(PlainRows(train, "t"), unit=False, damping=0.5)
    doubled = PlainRows(np.concatenate([train, train]), "t")  # the same second moment, N > d

    formed = Fisher.of(doubled, unit=False, damping=0.5)

    assert formed.level == pytest.approx(few.level, rel=1e-6)
    np.testing.assert_allclose(formed.solve(query), few.solve(query), rtol=1e-4, atol=1e-5)


def test_whitening_finds_the_row_that_a_common_direction_hides() -> None:
    rng = np.random.default_rng(0)
    common = rng.normal(size=64)
    kinds = rng.normal(size=(4, 64)) / 2
    of_row = np.arange(400) % 4
    train = 4 * common + kinds[of_row] + rng.normal(size=(400, 64)) * 2
    target = 4 * common + kinds[2] + rng.normal(size=(32, 64)) * 2
    checkpoint = CheckpointFeatures(train, [target])

    def share(product: InnerProduct) -> float:
        scores = influence_scores([checkpoint], product=product).values
        return float((of_row[np.argsort(-scores)[:40]] == 2).mean())

    assert share(InnerProduct("cosine", "fisher")) > share(InnerProduct()) + 0.1


def test_unusable_rows_neither_count_nor_get_a_score() -> None:
    train, target = rows(5, 50, 6), rows(6, 4, 6)
    broken = np.concatenate([train[:20], np.full((1, 6), np.nan), np.zeros((1, 6)), train[20:]])
    product = InnerProduct("none", "fisher", 0.2)

    found = influence_scores([CheckpointFeatures(broken, [target])], product=product)

    expected = influence_scores([CheckpointFeatures(train, [target])], product=product).values
    assert found.skipped == {"nonfinite": 1, "zero_norm": 1} or sum(found.skipped.values()) == 2
    np.testing.assert_allclose(found.values[found.usable], expected, rtol=1e-5)


def test_only_so_many_rows_as_the_matrix_needs_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "FEWEST_ROWS", 512)
    train = rows(7, 256 * 20, 4)
    starts = []

    class Counted(PlainRows):
        def read(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            starts.append(start)
            return super().read(start, stop)

    Fisher.of(Counted(train, "t"), unit=True)

    assert starts == [0, 256 * 19]


@pytest.mark.parametrize(("usable", "blocks"), [(0.1, 19), (0.5, 4), (1.0, 2)])
def test_where_few_rows_are_usable_more_blocks_are_read(
    monkeypatch: pytest.MonkeyPatch, usable: float, blocks: int
) -> None:
    """512 of 10,240 rows, of which a tenth, a half or all of each block's are usable."""
    monkeypatch.setattr(curvature, "FEWEST_ROWS", 512)
    train = PlainRows(np.ones((256 * 40, 4)), "t")
    within = np.arange(train.rows) % 256
    train.usable = within < 256 * usable

    found = curvature._sampled_blocks(train, 512)

    assert len(found) == blocks
    assert abs(sum(map(len, found)) - 512) < 256 * usable
    at = [int(rows[0]) // 256 for rows in found]
    assert (at[0], at[-1]) == (0, 39)
    assert np.ptp(np.diff(at)) <= 1, "spread evenly"


def test_blocks_without_a_usable_row_are_passed_over() -> None:
    train = PlainRows(np.ones((256 * 40, 4)), "t")
    train.usable = np.arange(train.rows) // 256 >= 30
    found = curvature._sampled_blocks(train, 512)
    assert [int(rows[0]) // 256 for rows in found] == [30, 39]


@pytest.mark.parametrize("most", [300, 512, 700, 2000])
def test_blocks_of_unlike_sizes_hold_as_many_rows_as_are_wanted(most: int) -> None:
    train = PlainRows(np.ones((256 * 40, 4)), "t")
    block = np.arange(train.rows) // 256
    train.usable = (block % 2 == 0) | (np.arange(train.rows) % 256 == 0)
    assert sum(map(len, curvature._sampled_blocks(train, most))) > most - 256


@pytest.mark.parametrize("normalize", ["cosine", "target", "none"])
@pytest.mark.parametrize(("n", "d"), [(256 * 6, 8), (300, 16), (12, 30)])
def test_the_level_and_the_rows_that_are_told_are_those_of_the_fit(
    monkeypatch: pytest.MonkeyPatch, normalize: Any, n: int, d: int
) -> None:
    monkeypatch.setattr(curvature, "FEWEST_ROWS", 512)
    metric = InnerProduct(normalize, "fisher", 0.3).metric
    pairs = [CheckpointFeatures(rows(seed, n, d), [rows(2, 3, d)]) for seed in (7, 8)]
    fits = [Fisher.of(pair.train, unit=normalize == "cosine", damping=0.3) for pair in pairs]

    told = metric.told(pairs)

    assert told["damping"] == 0.3
    assert told["level"] == pytest.approx([fit.level for fit in fits], rel=1e-6)
    assert told["rows"] == [min(n, 512)] * 2


@pytest.mark.parametrize("sorted_by_kind", [True, False])
def test_a_fit_on_four_rows_a_dimension_ranks_nearly_as_one_on_all(
    monkeypatch: pytest.MonkeyPatch, sorted_by_kind: bool
) -> None:
    """16,384 rows of eight kinds in 512 dimensions, with a falling spectrum, as gradients have."""
    n, d, rng = 16_384, 512, np.random.default_rng(0)
    of_row = np.arange(n) * 8 // n if sorted_by_kind else rng.integers(0, 8, n)
    spectrum = np.arange(1, d + 1) ** -0.5
    train = (rng.normal(size=(n, d)) + rng.normal(size=(8, d))[of_row] / 2) * spectrum
    target = (rng.normal(size=(16, d)) + train[of_row == 3][:16] * 2) * spectrum
    checkpoint, product = CheckpointFeatures(train, [target]), InnerProduct("cosine", "fisher")
    every = influence_scores([checkpoint], product=product).values
    monkeypatch.setattr(curvature, "FEWEST_ROWS", 0)
    moments: list[int] = []
    blocks = curvature._sampled_blocks
    monkeypatch.setattr(
        curvature, "_sampled_blocks",
        lambda train, most: [moments.append(most), *blocks(train, most)][1:],
    )  # fmt: skip

    sampled = influence_scores([checkpoint], product=product).values

    assert moments == [4 * d]
    assert spearmanr(every, sampled).statistic > 0.97
    best = [set(np.argsort(-scores)[: n // 20].tolist()) for scores in (every, sampled)]
    assert len(best[0] & best[1]) > 0.8 * n // 20
    assert not np.array_equal(every, sampled), "or all rows were taken"


def test_scores_do_not_depend_on_chunks_nor_on_how_a_checkpoint_is_cut() -> None:
    checkpoint = CheckpointFeatures(rows(8, 700, 12), [rows(9, 3, 12)])
    product = InnerProduct("target", "fisher")
    whole = influence_scores([checkpoint], product=product)
    chunked = influence_scores([checkpoint], product=product, chunk_rows=256)
    np.testing.assert_array_equal(whole.values, chunked.values)


@pytest.mark.parametrize(("n", "damping"), [(40, 1e-9), (40, 1e-14), (12, 1e-17)])
def test_a_curvature_that_is_singular_but_for_rounding_is_refused(n: int, damping: float) -> None:
    """Of 40 rows Cholesky's factorisation ends, with a pivot that rounding has made."""
    flat = rows(10, n, 20)
    flat[:, -1] = flat[:, 0]
    flat[-1] = flat[0]
    checkpoint = CheckpointFeatures(flat, [rows(11, 2, 20)])
    with pytest.raises(BadInput, match="singular but for rounding, and damping is 1e-"):
        influence_scores([checkpoint], product=InnerProduct("cosine", "fisher", damping))


@pytest.mark.parametrize(("n", "d"), [(300, 16), (12, 30)])
def test_little_damping_of_a_regular_curvature_is_its_formula(n: int, d: int) -> None:
    train, target = rows(12, n, d), rows(13, 3, d)
    product = InnerProduct("none", "fisher", 1e-3)
    found = subtask_influence([CheckpointFeatures(train, [target[:1]])], product=product).values
    expected = by_formula(train, target[:1], product)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-3 * np.abs(expected).max())


def test_without_damping_a_regular_curvature_would_score_all_rows_0_and_is_refused() -> None:
    regular = PlainRows(rows(14, 200, 8), "t")
    for refused in (
        lambda: InnerProduct("cosine", "fisher", 0.0),
        lambda: InnerProduct("none", "fisher", 0),
        lambda: Fisher.of(regular, unit=True, damping=0.0),
    ):
        with pytest.raises(BadInput, match=r"fisher needs a number above 0.* tend to 0 with l"):
            refused()
    assert InnerProduct("none", damping=0).damping == 0, "of fisher alone"


def test_a_target_whose_rows_cancel_out_is_refused_and_not_scored_0() -> None:
    train, target = rows(15, 9, 4), rows(16, 2, 4)
    both = np.stack([target[0], -target[0]])
    with pytest.raises(BadInput, match=r"sub-task 1 .*: its rows cancel out"):
        influence_scores([CheckpointFeatures(train, [target, both])])
    pairs = [CheckpointFeatures(train, [both], 0.5), CheckpointFeatures(train, [target], 0.5)]
    assert influence_scores(pairs).values.any(), "another checkpoint has a direction"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"normalize": "both"}, "normalize is 'both'; use cosine | target | none"),
        ({"preconditioner": "kfca"}, "preconditioner is 'kfca'"),
        ({"damping": -1.0}, "damping is -1.0"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"damping": True}, "damping is True"),
    ],
)
def test_an_unknown_name_or_number_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said.replace("|", r"\|")):
        InnerProduct(**given)


def test_features_of_two_kinds_have_no_common_curvature() -> None:
    class Recorded(PlainRows):
        def __init__(self, values: Floats, name: str, kind: str) -> None:
            super().__init__(values, name)
            self.record = type("Record", (), {"feature": kind})()

    checkpoint = CheckpointFeatures(
        Recorded(rows(1, 9, 4), "train/16", "adam_marginal"),
        [Recorded(rows(2, 2, 4), "dev", "sgd")],
    )
    with pytest.raises(BadInput, match="train/16 holds adam_marginal and dev sgd"):
        influence_scores([checkpoint], product=InnerProduct("cosine", "fisher"))
    assert influence_scores([checkpoint]).usable.all()


def test_a_source_without_norms_has_cosines_only() -> None:
    class Bare:
        rows, dim = 3, 4
        usable = np.ones(3, dtype=bool)

        def read(self, start: int, stop: int) -> np.ndarray[Any, np.dtype[np.float32]]:
            return np.eye(4, dtype=np.float32)[start:stop]

    checkpoint = CheckpointFeatures(Bare(), [rows(1, 2, 4)])
    with pytest.raises(BadInput, match="no norms of its rows"):
        influence_scores([checkpoint], product=InnerProduct("target"))


def test_no_usable_row_is_told_as_such_and_not_as_a_singular_matrix() -> None:
    checkpoint = CheckpointFeatures(np.zeros((3, 4)), [rows(1, 2, 4)])
    with pytest.raises(BadInput, match="none of the 3 train rows is usable"):
        influence_scores([checkpoint], product=InnerProduct("cosine", "fisher"))


def test_every_name_of_a_metric_is_offered_told_and_explained() -> None:
    assert tuple(PRECONDITIONERS) == get_args(Preconditioner)
    guide = (Path(__file__).parents[3] / "docs" / "products.md").read_text(encoding="utf-8")
    option = get_args(options.Preconditioner)[1]
    for name in PRECONDITIONERS:
        InnerProduct("cosine", name)
        assert f"{name};" in option.help or f"{name}:" in option.help, "in the command's help"
        assert f"`preconditioner: {name}`" in guide or name == "none"
    offered = get_args(AnyPreconditioner)
    assert offered == (*PRECONDITIONERS, *get_args(Kind))
    for refused in ({"preconditioner": "kfac"}, {"preconditioner": None}):
        with pytest.raises(BadInput, match=r"use none \| fisher \| subspace"):
            InnerProduct(**refused)  # type: ignore[arg-type]
