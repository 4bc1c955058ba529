"""Candidates of one store ranked again by another: exact among them, and read alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pytest

from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch
from gradstore.format.layout import FeatureDtype
from gradstore.format.records import RowSet
from gradstore.scoring.choose import Choice
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import Aggregation, Scores, influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.rescored import check_rerank, check_same_rows, rerank
from gradstore.scoring.rules import Rule
from gradstore.scoring.selection import select_top
from gradstore.scoring.some_rows import SomeRows
from gradstore.store.generation import Generation
from gradstore.store.reader import Store, open_store

if TYPE_CHECKING:
    from conftest import StoreKit

N, D, K = 600, 64, 40
NAMES = ("train/1", "train/2", "target/a/1", "target/a/2", "target/b/1", "target/b/2")


def built(kit: StoreKit, path: Path, dtype: str, **changes: Any) -> Store:
    """Two checkpoints of 600 training rows, some of them not usable, and of two target sets."""
    kit.dtype, kit.dim, kit.unit_rows = dtype, D, 100
    with kit.writer(path, **changes.pop("provenance", {})) as writer:
        for name in NAMES:
            kit.add(writer, name, N if name.startswith("train") else 30, **changes)
    return open_store(path)


@pytest.fixture
def first(kit: StoreKit, fast_path: Path) -> list[CheckpointFeatures]:
    return checkpoint_features(built(kit, fast_path / "bits", "1bit"), "all")


def beside(
    kit: StoreKit, fast_path: Path, dtype: str = "float32", **changes: Any
) -> list[CheckpointFeatures]:
    return checkpoint_features(built(kit, fast_path / "second", dtype, **changes), "all")


def top(**budget: Any) -> Choice:
    return Choice(Rule("top"), **budget)


def best(scores: Scores, k: int) -> np.ndarray:
    return select_top(scores.values, k, usable=scores.usable)


@pytest.mark.parametrize("aggregation", ["max", "mean"])
@pytest.mark.parametrize("dtype", get_args(FeatureDtype))
def test_rows_taken_are_the_second_stores_best_of_the_first_ones_candidates(
    kit: StoreKit,
    fast_path: Path,
    first: list[CheckpointFeatures],
    dtype: str,
    aggregation: Aggregation,
) -> None:
    second = beside(kit, fast_path, dtype)
    check_same_rows(first, second)
    ranks = influence_scores(first, aggregation=aggregation)
    exact = influence_scores(second, aggregation=aggregation)
    found = rerank(top(count=K), ranks, second, aggregation=aggregation)
    candidates = np.sort(best(ranks, 60))
    assert found.candidates.tolist() == candidates.tolist()
    assert found.values[candidates].tobytes() == exact.values[candidates].tobytes()
    assert np.flatnonzero(~np.isnan(found.values)).tolist() == candidates.tolist()
    order = candidates[np.argsort(-exact.values[candidates], kind="stable")]
    assert found.rows.tolist() == order[:K].tolist()
    assert found.moved == len(set(order[:K].tolist()) - set(best(ranks, K).tolist()))


@pytest.mark.parametrize("normalize", ["target", "none"])
def test_other_products_and_subtasks_are_those_of_the_second_store_alone(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures], normalize: Any
) -> None:
    sizes, product = [10, 20], InnerProduct(normalize, "subspace")
    second = [CheckpointFeatures(p.train, p.targets[0], p.weight) for p in
              beside(kit, fast_path)]  # fmt: skip
    ranks = influence_scores(
        [CheckpointFeatures(p.train, p.targets[0], p.weight) for p in first], subtask_sizes=sizes,
        product=product,
    )  # fmt: skip
    exact = influence_scores(second, subtask_sizes=sizes, product=product)
    found = rerank(top(count=K), ranks, second, subtask_sizes=sizes, product=product)
    rows = found.candidates
    assert found.values[rows].tobytes() == exact.values[rows].tobytes()


def test_with_all_rows_as_candidates_the_choice_is_the_second_stores_own(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures]
) -> None:
    second = beside(kit, fast_path)
    exact = influence_scores(second)
    found = rerank(top(fraction=0.1), influence_scores(first), second, factor=1e9)
    assert len(found.candidates) == exact.usable.sum()
    assert found.rows.tolist() == best(exact, int(0.1 * exact.usable.sum())).tolist()


def test_equal_scores_of_the_second_store_go_to_the_lower_row(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures], monkeypatch: Any
) -> None:
    values = kit.features(N, 1)
    values[100:110] = values[99]
    monkeypatch.setattr(kit, "features", lambda n, seed=0: values[:n].copy())
    second = beside(kit, fast_path)
    ranks = np.zeros(N, dtype=np.float32)
    ranks[99:110] = np.arange(11) + 1  # the first store prefers the higher rows
    scores = Scores(ranks, first[-1].train.usable, np.zeros(N, np.int32), {})
    usable = [row for row in range(99, 110) if second[-1].train.usable[row]]
    found = rerank(top(count=4), scores, second, factor=2.5)
    assert found.rows.tolist() == [r for r in usable if r in found.candidates][:4]


def test_chunks_without_a_candidate_are_not_read(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures]
) -> None:
    """A damaged chunk is noticed where it holds a candidate, and only there."""
    store = built(kit, fast_path / "second", "int8")
    for unit in (1, 5):
        chunk = fast_path / f"second/generations/train/2/features/c/{unit}"
        chunk = chunk / "0" if chunk.is_dir() else chunk
        data = bytearray(chunk.read_bytes())
        data[7] ^= 1
        chunk.write_bytes(data)
    ranks = influence_scores(first)
    away = np.r_[100:200, 500:600]
    ranks.values[away] = -np.inf
    second = checkpoint_features(open_store(store.path), "all")
    found = rerank(top(count=K), ranks, second)
    assert not np.isin(found.candidates, away).any()
    ranks.values[500:600] = np.inf
    with pytest.raises(DamagedData, match="features/c/5"):
        rerank(top(count=K), ranks, second)


def test_of_the_second_store_the_candidates_rows_alone_are_read(
    kit: StoreKit,
    fast_path: Path,
    first: list[CheckpointFeatures],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    second, ranks, asked = beside(kit, fast_path), influence_scores(first), []
    take = Generation.take_raw

    def noted(self: Generation, rows: Any) -> np.ndarray:
        assert self.role == "train"
        asked.append(np.asarray(rows))
        return take(self, rows)

    def only_targets(self: Generation, start: int, stop: int) -> np.ndarray:
        assert self.role == "target"
        return read(self, start, stop)

    read = Generation.read
    monkeypatch.setattr(Generation, "take_raw", noted)
    monkeypatch.setattr(Generation, "read", only_targets)
    monkeypatch.setattr(Generation, "raw_reader", lambda self: pytest.fail("a whole scan"))
    found = rerank(top(count=K), ranks, second)
    assert np.concatenate(asked).tolist() == found.candidates.tolist() * 2  # checkpoints


def test_a_token_budget_is_kept_and_used_up(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures]
) -> None:
    second, ranks = beside(kit, fast_path), influence_scores(first)
    found = rerank(top(tokens=1000), ranks, second)
    tokens = second[-1].train.tokens  # type: ignore[attr-defined]
    every = np.argsort(-np.where(ranks.usable, ranks.values, -np.inf), kind="stable")
    reach = int(np.searchsorted(np.cumsum(tokens[every]), 1500)) + 1
    assert found.candidates.tolist() == np.sort(every[:reach]).tolist()
    order = select_top(found.values, len(found.candidates))
    fits = int(np.searchsorted(np.cumsum(tokens[order]), 1000, side="right"))
    assert found.rows.tolist() == order[:fits].tolist()


def test_quotas_are_kept_whatever_the_candidates_are(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures], monkeypatch: Any
) -> None:
    """Sets of one row each: as many candidates as the widened budget allows would be too few."""

    def rows(n: int, first: int = 0) -> RowSet:
        plain = type(kit).rows(kit, n, first)
        return RowSet(plain.hashes, [(f"set {i // 3}", i) for i in range(n)])

    monkeypatch.setattr(kit, "rows", rows)
    second, ranks = beside(kit, fast_path), influence_scores(first)
    ranks.values[:] = np.where(ranks.usable, -np.arange(N), np.nan)
    quotas: dict[str, int | float] = {f"set {i}": 1 for i in range(N // 3)}
    found = rerank(top(count=100, quotas=quotas), ranks, second)
    assert len(found.rows) == 100
    assert len({int(row) // 3 for row in found.rows}) == 100
    in_set = [found.candidates[found.candidates // 3 == i] for i in range(N // 3)]
    for row in found.rows.tolist():
        assert found.values[row] == np.nanmax(found.values[in_set[row // 3]])


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "projection": ({"projection": {"method": "sjlt", "d": D, "seed": 8}}, "projection.seed"),
    "model": ({"adapter_hash": "cc"}, "adapter_hash"),
    "feature": ({"feature": "sgd"}, "feature differs"),
    "learning rate": ({"learning_rate": 3e-4}, "learning_rate"),
    "template": ({"provenance": {"template": "other"}}, "template"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_second_store_of_another_run_or_projection_is_refused(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures], what: str
) -> None:
    changes, says = OTHERS[what]
    with pytest.raises(ProvenanceMismatch, match=says) as refused:
        check_same_rows(first, beside(kit, fast_path, **changes))
    assert refused.value.exit_code == 3
    assert refused.value.differences


def test_a_second_store_of_other_rows_is_refused_and_the_first_of_them_named(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures], monkeypatch: Any
) -> None:
    def rows(n: int, first: int = 0) -> RowSet:
        hashes = type(kit).rows(kit, n, first).hashes.copy()
        hashes[7:9] = hashes[8:10]
        return RowSet(hashes)

    monkeypatch.setattr(kit, "rows", rows)
    with pytest.raises(ProvenanceMismatch, match=r"train/1: 2 of 600 rows are others.*row 7"):
        check_same_rows(first, beside(kit, fast_path))


def test_a_second_store_of_other_checkpoints_is_refused(
    kit: StoreKit, fast_path: Path, first: list[CheckpointFeatures]
) -> None:
    second = beside(kit, fast_path)
    with pytest.raises(ProvenanceMismatch, match=r"steps \[2\] and \[1\]"):
        check_same_rows(first[1:], second[:1])
    check_same_rows(first[:1], second[:1])


@pytest.mark.parametrize("factor", [0.9, 0, -1, float("nan"), float("inf"), True, "2"])
def test_a_factor_that_is_no_number_from_1_is_refused(
    first: list[CheckpointFeatures], factor: Any
) -> None:
    ranks = Scores(np.zeros(N, np.float32), np.ones(N, bool), np.zeros(N, np.int32), {})
    with pytest.raises(BadInput, match="rerank factor"):
        rerank(top(count=1), ranks, first, factor=factor)


def test_what_needs_more_than_candidates_is_refused() -> None:
    with pytest.raises(BadInput, match="needs the subset 'top', not 'round_robin'"):
        check_rerank(Choice(Rule("round_robin"), 5))
    with pytest.raises(BadInput, match="fitted to the scores of all rows"):
        check_rerank(top(count=5, length="bins"))
    with pytest.raises(BadInput, match="read the second store whole"):
        check_rerank(top(count=5), InnerProduct(preconditioner="fisher"))
    check_rerank(replace(top(count=5), count=None, tokens=9), InnerProduct("none"))


def test_some_rows_of_an_array_score_as_they_do_in_the_whole() -> None:
    draw = np.random.default_rng(0)
    pair = CheckpointFeatures(draw.standard_normal((700, 24)), draw.standard_normal((3, 24)))
    rows = draw.permutation(700)[:300]
    some = CheckpointFeatures(SomeRows(pair.train, rows), pair.targets)
    whole = influence_scores([pair]).values
    assert influence_scores([some]).values.tobytes() == whole[rows].tobytes()
    with pytest.raises(BadInput, match="rows 0 to 699, not 3 to 700"):
        SomeRows(pair.train, np.array([3, 700]))
