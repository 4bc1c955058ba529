"""The parts together: a real store, scored, selected from, queried and indexed."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.layout import RowStatus
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.scoring.comparable import CheckpointFeatures, check_comparable
from gradstore.scoring.influence import aggregate, checkpoint_weights, influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.scoring.query import query_influence
from gradstore.scoring.scan import unit_rows
from gradstore.scoring.selection import select_top
from gradstore.similarity.index import FeatureIndex
from gradstore.store.reader import Store, open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

N, D, SETS = 700, 40, {"a": 9, "b": 4}


def record(role: str, name: str, step: int) -> GenerationRecord:
    return GenerationRecord(
        name=f"{role}/{name + '/' if name else ''}{step}",
        role="target" if name else "train",
        set=name,
        step=step,
        run_id="test",
        adapter_hash=f"adapter{step}",
        effective_seed=step,
        projection={"method": "sjlt", "d": D, "seed": step},
        feature="sgd",
    )


def features(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, D)) * 10.0 ** rng.integers(-9, 9, (rows, 1))
    status = np.where(rng.random(rows) < 0.05, RowStatus.MASKED, RowStatus.OK).astype(np.uint8)
    status[0] = RowStatus.OK
    return values.astype(np.float32), status


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("scored") / "gradstore"
    with StoreWriter(path, provenance={"test": 1}) as writer:
        for step in (10, 20):
            for name, rows in {"": N, **SETS}.items():
                values, status = features(rows, step + len(name) * ord(name or " "))
                hashes = np.zeros((rows, 16), dtype=np.uint8)
                hashes[:, :8] = np.arange(rows, dtype="<u8").view(np.uint8).reshape(rows, 8)
                role = "target" if name else "train"
                generation = writer.begin(record(role, name, step), RowSet(hashes), dim=D)
                for unit in list(generation.pending):
                    rows_here = slice(unit.start, unit.stop)
                    generation.write_unit(
                        unit.index,
                        values[rows_here],
                        np.linalg.norm(values[rows_here], axis=1).astype(np.float32),
                        status[rows_here],
                        np.ones(unit.stop - unit.start, dtype=np.int32),
                    )
                generation.commit()
    return open_store(path)


def checkpoints(store: Store) -> list[CheckpointFeatures]:
    weights = checkpoint_weights([2e-5, 1e-5])
    return [
        CheckpointFeatures(
            store.generation(f"train/{step}"),
            tuple(store.generation(f"target/{name}/{step}") for name in SETS),
            float(weight),
        )
        for step, weight in zip((10, 20), weights, strict=True)
    ]


def test_scores_of_a_store_equal_float64_cosines_of_its_rows(store: Store) -> None:
    parts = checkpoints(store)
    cosines = np.zeros((N, sum(SETS.values())))
    columns = np.ones(sum(SETS.values()), dtype=bool)
    for part in parts:
        check_comparable(part.train, part.targets)
        targets = np.concatenate([t.read(0, t.rows) for t in part.targets])
        columns &= np.concatenate([t.usable for t in part.targets])
        cosines += part.weight * unit_rows(part.train.read(0, N))[0] @ unit_rows(targets)[0].T
    expected, best = aggregate(cosines, list(SETS.values()), usable_targets=columns)
    scores = influence_scores(parts)
    usable = parts[0].train.usable & parts[1].train.usable
    assert (scores.usable == usable).all()
    assert scores.skipped == {"masked": int((~usable).sum())}
    np.testing.assert_allclose(scores.values[usable], expected[usable], atol=2e-6)
    assert (scores.best_subtask[usable] == best[usable]).all()
    chosen = select_top(scores.values, 50, usable=scores.usable)
    assert set(chosen.tolist()) <= set(np.flatnonzero(usable).tolist())


def test_a_sample_stands_for_the_training_rows_and_is_never_a_target(store: Store) -> None:
    """As set "b" was one: it may be the train side, and no question takes it for a target."""

    def seen(name: str) -> SimpleNamespace:
        found = store.generation(name)
        sampled = replace(found.record, feature_options={"sample_of": "train"})
        kept = {
            k: getattr(found, k) for k in ("name", "role", "set", "step", "space", "dim", "read")
        }
        return SimpleNamespace(record=sampled if found.set == "b" else found.record, **kept)

    names = [g.name for g in store.generations()]
    view: Any = SimpleNamespace(path="s", generations=lambda: [seen(name) for name in names])
    (newest,) = checkpoint_features(view)
    assert [t.name for t in newest.targets] == ["target/a/20"]
    sampled = checkpoint_features(view, "all", train_set="b", targets=["a"])
    assert [c.train.name for c in sampled] == ["target/b/10", "target/b/20"]
    assert [[t.name for t in c.targets] for c in sampled] == [["target/a/10"], ["target/a/20"]]
    with pytest.raises(BadInput, match="no target generation of b"):
        checkpoint_features(view, targets=["b"])


def test_generations_of_two_checkpoints_are_not_scored_together(store: Store) -> None:
    with pytest.raises(ProvenanceMismatch, match="adapter_hash") as caught:
        check_comparable(store.generation("train/10"), [store.generation("target/a/20")])
    assert len(caught.value.differences) == 3


def test_index_query_and_stream_agree(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    train, target = store.generation("train/10"), store.generation("target/a/10")
    one = CheckpointFeatures(train, (target,))
    result = query_influence([one], 0, top=12)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            index = FeatureIndex.build(train, store.path / "index")
            scores, rows = index.search(target.read(0, 1), 12)
            assert rows[0].tolist() == result.helped.tolist()
            np.testing.assert_allclose(scores[0], result.values[result.helped], atol=2e-6)
    assert caplog.text == ""
    assert (store.path / "index" / train.commit_sha / "faiss.bin").is_file()
    assert verify_store(store.path).ok
