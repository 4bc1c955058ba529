"""A store of every dtype, read by all that scores and searches its rows."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import torch

from gradstore.errors import BadInput, DamagedData
from gradstore.format.layout import ArraySpec, FeatureDtype
from gradstore.scoring.curvature import Fisher
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.metric import Normalize
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.scan import Scan, exact_float32
from gradstore.similarity.index import FeatureIndex
from gradstore.similarity.rows import UsableRows, read_unit_rows
from gradstore.store.chunks import Chunks
from gradstore.store.reader import Store, open_store

if TYPE_CHECKING:
    from conftest import StoreKit

N, D = 600, 64


@pytest.fixture(params=get_args(FeatureDtype))
def store(request: pytest.FixtureRequest, kit: StoreKit, fast_path: Path) -> Store:
    """600 training rows in units that blocks of 256 cut across, and 40 target rows."""
    kit.dtype, kit.dim, kit.unit_rows = request.param, D, 100
    with kit.writer(fast_path / "s") as writer:
        kit.add(writer, "train/1", N)
        kit.add(writer, "target/a/1", 40)
    return open_store(fast_path / "s")


def directions(store: Store, name: str) -> np.ndarray:
    """(n, d) float64 unit rows of what the store gives back; NaN for rows that can't be used."""
    rows = store.generation(name).read(0, store.generation(name).rows).astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def unbiased(store: Store) -> float:
    """What makes a product with a row of signs, at length 1, an estimate of the cosine."""
    gammas = math.gamma(D / 2) / math.gamma((D + 1) / 2) / math.sqrt(math.pi)
    return 1 / (math.sqrt(D) * gammas) if store.generation("train/1").dtype == "1bit" else 1.0


@pytest.mark.parametrize("normalize", ["cosine", "none"])
def test_scores_are_the_products_of_the_rows_as_they_are_read(
    store: Store, normalize: Normalize
) -> None:
    found = influence_scores(checkpoint_features(store), product=InnerProduct(normalize)).values
    train, target = directions(store, "train/1"), directions(store, "target/a/1")
    query = np.nanmean(target, axis=0)  # all norms of the kit are 1
    expected = train @ query * unbiased(store)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_scores(store: Store) -> None:
    pairs = checkpoint_features(store)
    gpu, cpu = (influence_scores(pairs, device=device).values for device in ("cuda", "cpu"))
    np.testing.assert_allclose(gpu, cpu, rtol=0, atol=2e-6)


@pytest.mark.parametrize("array", ["features", "status"])
def test_a_scan_over_a_damaged_chunk_is_refused(store: Store, array: str) -> None:
    """In the last unit: what was scored before it is not given out either."""
    chunk = store.path / "generations/train/1" / array / "c" / "5"
    file = chunk / "0" if chunk.is_dir() else chunk
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)
    with pytest.raises(DamagedData, match=rf"{array}/c/5.*crc32c"):
        influence_scores(checkpoint_features(open_store(store.path)))


def test_an_index_finds_what_the_scan_finds(store: Store) -> None:
    train, target = store.generation("train/1"), directions(store, "target/a/1")[:2]
    indexed = FeatureIndex.build(train)
    scanned = FeatureIndex.build(train, backend="torch")
    assert indexed.backend == ("torch" if train.dtype == "1bit" else "faiss")
    (scores, rows), (others, same) = indexed.search(target, 9), scanned.search(target, 9)
    assert rows.tolist() == same.tolist()
    np.testing.assert_allclose(scores, others, rtol=0, atol=2e-6)


def test_an_index_of_1bit_rows_is_refused_to_faiss(kit: StoreKit, fast_path: Path) -> None:
    kit.dtype = "1bit"
    train = kit.build(fast_path / "s").generation("train/1")
    with pytest.raises(BadInput, match=r"32 times their size; use backend='torch'"):
        FeatureIndex.build(train, backend="faiss")


@pytest.mark.parametrize("dim", [64, 100])
def test_1bit_products_are_one_whether_looked_up_or_multiplied(
    kit: StoreKit, fast_path: Path, dim: int
) -> None:
    """Few queries are looked up, many multiplied; equal rows get equal bits either way."""
    kit.dtype, kit.dim, kit.unit_rows = "1bit", dim, 100
    with kit.writer(fast_path / "s") as writer:
        begun = writer.begin(
            kit.record(), kit.rows(N), dim=dim, dtype=kit.dtype, unit_rows=kit.unit_rows
        )
        values = kit.features(N)
        values[[100, 300, 599]] = values[0]
        kit.fill(begun, values)
        begun.commit()
    train = open_store(fast_path / "s").generation("train/1")
    queries = np.random.default_rng(0).standard_normal((40, dim))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    with exact_float32():
        many = Scan(train, queries, chunk_rows=N, device=torch.device("cpu"))
        few = Scan(train, queries[:3], chunk_rows=N, device=torch.device("cpu"))
        multiplied, looked_up = many.chunk(0, N)[0], few.chunk(0, N)[0]
        backwards = Scan(train, queries[:3], chunk_rows=256, device=torch.device("cpu"))
        parts = [backwards.chunk(low, min(low + 256, N))[0] for low in range(0, N, 256)[::-1]]
    rows = train.read(0, N).astype(np.float64)
    expected = rows @ queries.T / np.linalg.norm(rows, axis=1, keepdims=True)
    expected *= (
        np.sqrt(dim) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2) * np.sqrt(np.pi) / dim
    )
    good = train.usable
    np.testing.assert_allclose(multiplied[good], expected[good], rtol=0, atol=2e-6)
    np.testing.assert_allclose(looked_up[good], expected[good, :3], rtol=0, atol=2e-6)
    assert np.concatenate(parts[::-1]).tobytes() == looked_up.tobytes()
    for found in (multiplied, looked_up):
        assert found[[100, 300, 599]].tobytes() == np.tile(found[0], (3, 1)).tobytes()


def test_readers_of_unit_rows_see_the_rows_of_the_store(store: Store) -> None:
    expected = directions(store, "train/1")
    train = store.generation("train/1")
    for part in read_unit_rows(train, 130):
        np.testing.assert_allclose(part.rows, expected[part.start : part.stop], atol=1e-6)
    some = UsableRows(train)
    at = np.array([0, 99, 100, 500])
    np.testing.assert_allclose(some[at], expected[some.rows[at]], atol=1e-6)


def test_the_fisher_matrix_is_that_of_the_rows_of_the_store(store: Store) -> None:
    unit = directions(store, "train/1")
    unit = unit[np.isfinite(unit).all(axis=1)]
    moment = unit.T @ unit / len(unit)
    level = np.trace(moment) / D
    query = np.ones((1, D))
    expected = level * np.linalg.solve(moment + level * np.eye(D), query[0])
    fisher = Fisher.of(store.generation("train/1"), unit=True)
    np.testing.assert_allclose(fisher.solve(query)[0], expected, rtol=1e-4)


@pytest.mark.parametrize("queries", [2, 40])
def test_what_a_reader_gave_is_used_before_the_next_and_by_one_thread(
    store: Store, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few queries are multiplied with packed rows in several threads, many in one."""
    wanted = np.random.default_rng(1).standard_normal((queries, D))
    expected = scanned(store, wanted)
    make = Chunks.reader

    def poisoned(self: Chunks, spec: ArraySpec) -> Callable[[int, int, int], np.ndarray]:
        read, given, busy = make(self, spec), [np.zeros(0, np.uint8)], threading.Lock()

        def strict(unit: int, start: int, stop: int) -> np.ndarray:
            assert busy.acquire(blocking=False), "two threads have one reader"
            given[0][:] = 255
            found = read(unit, start, stop).copy()
            given[0] = found.view(np.uint8)
            time.sleep(0.002)  # for others to come in
            busy.release()
            return found

        return strict

    monkeypatch.setattr(Chunks, "reader", poisoned)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = scanned(store, wanted)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def scanned(store: Store, queries: np.ndarray) -> np.ndarray:
    """(n, q) products of the training rows, 256 at a time."""
    with exact_float32():
        scan = Scan(store.generation("train/1"), queries, chunk_rows=256,
                    device=torch.device("cpu"))  # fmt: skip
        parts = [scan.chunk(low, min(low + 256, N))[0].copy() for low in range(0, N, 256)]
    return np.concatenate(parts)
