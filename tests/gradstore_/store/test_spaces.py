"""Several spaces of one store under one lock: apart where they differ, joined in their rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import BadInput, ProvenanceMismatch, StoreBusy
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName, space_run
from gradstore.format.records import embedding_record
from gradstore.scoring.comparable import CheckpointFeatures, check_comparable
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.pairing import checkpoint_features
from gradstore.store.reader import Store, open_store
from gradstore.store.space_writer import SpaceWriter
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

SPACE = "minilm"
FIELDS = {"model": "ff", "pooling": "mean", "dim": 6}
N = 40


def record(role: Any = "train", step: int = 1, set: str = "", run: str = "", **changes: Any) -> Any:
    options = {"space": SPACE, "run_id": "run", "model_hash": "ff", **changes}
    return embedding_record(GenerationName(role, step, set, run), **options)


def add(
    kit: StoreKit, space: SpaceWriter, made: Any, n: int = N, dim: int = 6, seed: int = 3
) -> None:
    """Commits a generation of n unit rows, the second of them masked."""
    generation = space.begin(made, kit.rows(n), dim=dim, unit_rows=16)
    values = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    status = np.full(n, RowStatus.OK, np.uint8)
    status[1] = RowStatus.MASKED
    for unit in list(generation.pending):
        rows = slice(unit.start, unit.stop)
        ones = np.ones(unit.stop - unit.start)
        generation.write_unit(unit.index, values[rows], ones, status[rows], ones)
    generation.commit()


@pytest.fixture
def both(kit: StoreKit, fast_path: Path) -> Store:
    """Gradients (d = 4) of steps 1 and 2, embeddings (d = 6) of steps 1, 2 and 9."""
    with kit.writer(fast_path / "s") as writer:
        space = writer.with_space(SPACE, FIELDS)
        for step in (1, 2):
            kit.add(writer, f"train/{step}", N)
            kit.add(writer, f"target/skill/{step}", 8)
        for step in (1, 2, 9):
            add(kit, space, record(step=step), seed=step)
            add(kit, space, record("target", step, "skill"), 8, seed=step + 50)
    return open_store(fast_path / "s")


def test_two_spaces_under_one_lock_hold_features_of_their_own_length(
    kit: StoreKit, both: Store
) -> None:
    assert both.spaces() == ["gradient", SPACE]
    assert both.provenance(SPACE) == FIELDS
    assert {g.name: (g.space, g.dim) for g in both.generations() if g.step == 1} == {
        "train/1": ("gradient", 4),
        "target/skill/1": ("gradient", 4),
        "minilm/train/1": (SPACE, 6),
        "minilm/target/skill/1": (SPACE, 6),
    }
    assert verify_store(both.path).ok
    with kit.writer(both.path) as writer:
        begun = writer.with_space(SPACE, FIELDS).begin(record(), kit.rows(N), dim=6)
        assert begun.pending == []


def test_a_further_space_shares_the_lock_and_ends_with_it(kit: StoreKit, fast_path: Path) -> None:
    with kit.writer(fast_path / "s") as writer:
        space = writer.with_space(SPACE, FIELDS)
        add(kit, space, record())
        with pytest.raises(StoreBusy):
            kit.writer(fast_path / "s")
        interrupted = space.begin(record(step=2), kit.rows(N), dim=6)
        del space
        with pytest.raises(StoreBusy):
            kit.writer(fast_path / "s")
        space = writer.with_space(SPACE, FIELDS)
    with pytest.raises(BadInput, match="was closed"):
        space.begin(record(step=2), kit.rows(N), dim=6)
    with pytest.raises(BadInput, match="was closed"):
        writer.with_space(SPACE, FIELDS)
    assert [unit.index for unit in interrupted.pending] == [0]
    kit.writer(fast_path / "s").close()


def test_each_space_is_compared_with_its_own_provenance(kit: StoreKit, both: Store) -> None:
    before = {p: p.read_bytes() for p in both.path.rglob("*.json")}
    with kit.writer(both.path) as writer:
        with pytest.raises(ProvenanceMismatch) as caught:
            writer.with_space(SPACE, {**FIELDS, "model": "ee", "pooling": "last_token"})
        assert [d.split(" ")[0] for d in caught.value.differences] == ["model", "pooling"]
        assert caught.value.exit_code == 3
        writer.with_space(SPACE, FIELDS)
        writer.with_space("other", {**FIELDS, "model": "ee"})
    after = {p: p.read_bytes() for p in both.path.rglob("*.json")}
    assert {p.parent.name for p in after.keys() - before.keys()} == {"other"}
    assert all(after[path] == data for path, data in before.items())


def test_length_and_dtype_are_compared_within_a_space_only(kit: StoreKit, both: Store) -> None:
    with kit.writer(both.path) as writer:
        space = writer.with_space(SPACE, FIELDS)
        with pytest.raises(ProvenanceMismatch, match="dim differs"):
            space.begin(record(step=3), kit.rows(N), dim=4)
        with pytest.raises(ProvenanceMismatch, match="dtype differs"):
            space.begin(record(step=3), kit.rows(N), dim=6, dtype="bfloat16")
        other = writer.with_space("other", {})
        add(kit, other, record(space="other"), dim=3)
        kit.add(writer, "train/3", N)


def test_the_rows_of_a_set_are_the_same_in_every_space(kit: StoreKit, both: Store) -> None:
    with kit.writer(both.path) as writer:
        other = writer.with_space("other", {})
        with pytest.raises(ProvenanceMismatch, match="this run has 30; 30 in common"):
            other.begin(record(space="other"), kit.rows(30), dim=3)
        with pytest.raises(ProvenanceMismatch, match=r"target\.skill\.rows .*8 of 8 rows differ"):
            other.begin(record("target", 1, "skill", space="other"), kit.rows(8, first=100), dim=3)
        add(kit, other, record("target", 1, "another", space="other"), 5, dim=3)


def test_the_names_of_two_spaces_never_meet(kit: StoreKit, both: Store) -> None:
    assert space_run("gradient", "a") == "a"
    assert record(run="a").name == "a+minilm/train/1"
    with kit.writer(both.path) as writer:
        space = writer.with_space(SPACE, FIELDS)
        plain = kit.record("train/7", projection={})
        with pytest.raises(BadInput, match=r"its run must be 'minilm' or RUN\+minilm"):
            space.begin(plain, kit.rows(N), dim=6)
        with pytest.raises(ProvenanceMismatch, match=r"space of 'minilm' differs.*gradstore_run"):
            kit.add(writer, "minilm/train/7", N)
        add(kit, space, record(step=7, run="a"))
    assert open_store(both.path).generation("a+minilm/train/7").record.run == "a+minilm"


def test_scores_look_at_gradients_unless_another_space_is_named(both: Store) -> None:
    assert [c.train.name for c in checkpoint_features(both, "all")] == ["train/1", "train/2"]
    (newest,) = checkpoint_features(both)
    assert [g.name for g in (newest.train, *newest.targets)] == ["train/2", "target/skill/2"]
    (near,) = checkpoint_features(both, space=SPACE)
    assert [g.name for g in (near.train, *near.targets)] == [
        "minilm/train/9",
        "minilm/target/skill/9",
    ]
    with pytest.raises(BadInput, match=r"of run 'minilm' \(it has .* space .*minilm"):
        checkpoint_features(both, run=SPACE)
    with pytest.raises(BadInput, match="in space 'absent'"):
        checkpoint_features(both, space="absent")


def test_embeddings_are_never_scored_with_gradients_even_of_equal_length(
    kit: StoreKit, both: Store
) -> None:
    with kit.writer(both.path) as writer:
        add(kit, writer.with_space("four", {}), record(space="four"), dim=4)
    store = open_store(both.path)
    pair = CheckpointFeatures(
        store.generation("four/train/1"), (store.generation("target/skill/1"),)
    )
    with pytest.raises(ProvenanceMismatch, match="space differs: four/train/1 has four"):
        influence_scores([pair])
    with pytest.raises(ProvenanceMismatch, match="space differs"):
        check_comparable(store.generation("four/train/1"), [store.generation("target/skill/1")])


def test_the_command_line_scores_gradients_and_lists_every_space(
    both: Store, tmp_path: Path
) -> None:
    run = CliRunner()
    answer = json.loads(run.invoke(app, ["score", str(both.path), "--json"]).stdout)
    assert (answer["generation"], answer["targets"]) == ("train/2", ["target/skill/2"])
    answer = json.loads(
        run.invoke(app, ["query", str(both.path), "--target-row", "0", "--json"]).stdout
    )
    assert answer["target"] == "target/skill/2"
    chosen = tmp_path / "selected.jsonl"
    assert run.invoke(app, ["select", str(both.path), "-k", "3", "-o", str(chosen)]).exit_code == 0
    listed = json.loads(run.invoke(app, ["info", str(both.path), "--json"]).stdout)["generations"]
    entry = next(e for e in listed if e["name"] == "minilm/train/9")
    assert (entry["projection"], entry["feature"], entry["space"]) == ({}, "embedding", SPACE)
    assert (entry["dim"], entry["usable_rows"]) == (6, N - 1)
    shown = run.invoke(app, ["info", str(both.path)])
    assert shown.exit_code == 0
    assert "embedding" in shown.stdout
    reasons = {f"{n} {why}" for e in listed for why, n in e["status"].items() if n and why != "ok"}
    assert reasons, "some rows are skipped"
    for reason in reasons:
        assert reason in shown.stdout


def test_clean_up_keeps_the_newest_of_each_space(kit: StoreKit, both: Store) -> None:
    with kit.writer(both.path) as writer:
        removed = writer.clean(keep_generations=1)
    assert sorted(removed) == [
        "minilm/target/skill/1",
        "minilm/target/skill/2",
        "minilm/train/1",
        "minilm/train/2",
        "target/skill/1",
        "train/1",
    ]


def test_other_libraries_of_another_space_do_not_warn(
    kit: StoreKit, both: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with kit.writer(both.path) as writer:
        space = writer.with_space("other", {})
        add(kit, space, record(space="other", libraries={"torch": "0"}))
    assert "torch" not in caplog.text
