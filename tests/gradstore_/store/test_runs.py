"""Whose store it is: what a resume reuses, what is superseded, what is refused, what is removed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.errors import BadInput, ProvenanceMismatch
from gradstore.format.records import LOADED_FROM, RowSet
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit


def names(path: Path, *, superseded: bool = False) -> list[str]:
    return [g.name for g in open_store(path).generations(superseded=superseded)]


def test_another_target_set_a_second_step_and_a_reopened_store_are_accepted(
    kit: StoreKit, fast_path: Path
) -> None:
    kit.build(fast_path / "s", "train/1", "target/a/1")
    kit.build(fast_path / "s", "train/2", n=40)
    with kit.writer(fast_path / "s") as writer:
        kit.add(writer, "target/b/2", 7)
    assert names(fast_path / "s") == ["train/1", "target/a/1", "train/2", "target/b/2"]


def test_a_finished_generation_comes_back_complete(kit: StoreKit, fast_path: Path) -> None:
    path = fast_path / "s"
    kit.build(path)
    before = open_store(path).head
    with kit.writer(path) as writer:
        again = writer.begin(
            kit.record(learning_rate=5.0, libraries={"torch": "9"}), kit.rows(40), dim=4
        )
        assert again.pending == []
        assert again.bad_counts == {"masked": 0, "non_finite": 1, "zero_norm": 1, "too_long": 0,
                                    "forgotten": 0}  # fmt: skip
        assert again.commit() == before
    assert open_store(path).head == before


@pytest.mark.parametrize(
    "change", [{"adapter_hash": "x"}, {"optimizer_hash": "x"}, {"effective_seed": 8}]
)
def test_a_replay_from_another_state_supersedes_and_is_never_refused(
    kit: StoreKit, fast_path: Path, change: dict[str, Any]
) -> None:
    path = fast_path / "s"
    kit.build(path)
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", **change)
        kit.add(writer, "train/1", **change)
    assert names(path) == ["train/1.2"]
    assert names(path, superseded=True) == ["train/1", "train/1.2"]
    store = open_store(path)
    assert store.generation("train/1").name == "train/1.2"
    assert store.generation("train/1").record.name == "train/1"
    assert [g["name"] for g in store.info()["generations"]] == ["train/1.2"]


def test_an_interrupted_generation_of_another_state_is_not_resumed(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        begun = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(begun, kit.features(40), units=1)
    with kit.writer(path) as writer:
        begun = writer.begin(kit.record(adapter_hash="x"), kit.rows(40), dim=4, unit_rows=16)
        assert len(begun.pending) == 3
        kit.fill(begun, kit.features(40))
        begun.commit()
        assert writer.clean() == ["train/1"]
    assert not (path / "plans/train/1.json").exists()
    assert names(path) == ["train/1.2"]


def test_two_runs_that_would_write_the_same_name_are_kept_apart(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    kit.build(path)
    with kit.writer(path) as writer:
        with pytest.raises(ProvenanceMismatch, match=r"gradstore_run=NAME") as caught:
            kit.add(writer, "train/1", run_id="other")
        assert "gradstore=PATH" in str(caught.value)
        assert caught.value.exit_code == 3
        kit.add(writer, "mine/train/1", run_id="other")
    assert names(path) == ["train/1", "mine/train/1"]


def test_a_run_that_never_committed_keeps_nobody_out(kit: StoreKit, fast_path: Path) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        writer.begin(kit.record(), kit.rows(40), dim=4)
    with kit.writer(path) as writer:
        kit.add(writer, "train/1", run_id="other")
    assert names(path) == ["train/1.2"]


def test_fault_09_changed_rows_are_counted_and_the_first_is_named(
    kit: StoreKit, fast_path: Path
) -> None:
    kit.build(fast_path / "s")
    hashes = kit.rows(40).hashes.copy()
    hashes[[7, 9, 30], 0] ^= 1
    rows = RowSet(hashes, kit.rows(40).sources)
    with (
        kit.writer(fast_path / "s") as writer,
        pytest.raises(ProvenanceMismatch, match=r"3 of 40 rows differ, first row 7 \(set one 7\)"),
    ):
        writer.begin(kit.record("train/2"), rows, dim=4)


def test_fault_10_reordered_rows_are_told_from_changed_ones(kit: StoreKit, fast_path: Path) -> None:
    kit.build(fast_path / "s")
    rows = RowSet(kit.rows(40).hashes[::-1].copy())
    with kit.writer(fast_path / "s") as writer:
        with pytest.raises(ProvenanceMismatch, match="same rows, different order"):
            writer.begin(kit.record("train/2"), rows, dim=4)
        with pytest.raises(ProvenanceMismatch, match="40 rows are stored, this run has 50; 40 in"):
            writer.begin(kit.record("train/2"), kit.rows(50), dim=4)
    assert names(fast_path / "s") == ["train/1"]


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(BadInput, match="no rows"):
        RowSet(np.zeros((0, 16), np.uint8))


def test_fault_11_a_changed_run_is_refused_with_every_difference_and_nothing_written(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    kit.build(path)
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    projection = {**kit.provenance["projection"], "seed": 1, "d": 8}
    with pytest.raises(ProvenanceMismatch) as caught:
        kit.writer(path, projection=projection, template="llama3")
    assert [d.split(" ")[0] for d in caught.value.differences] == [
        "projection.d",
        "projection.seed",
        "template",
    ]
    for line in caught.value.differences:
        assert line in str(caught.value)
    assert "gradstore=PATH" in str(caught.value)
    assert before == {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_another_width_or_dtype_in_the_same_space_is_refused(
    kit: StoreKit, fast_path: Path
) -> None:
    kit.build(fast_path / "s")
    record = kit.record("train/2", projection={})
    with kit.writer(fast_path / "s") as writer:
        with pytest.raises(ProvenanceMismatch, match="dim differs"):
            writer.begin(record, kit.rows(40), dim=8)
        with pytest.raises(ProvenanceMismatch, match="dtype differs"):
            writer.begin(record, kit.rows(40), dim=4, dtype="bfloat16")


def test_fault_12_a_canary_within_rounding_is_accepted_and_another_refused(
    kit: StoreKit, fast_path: Path
) -> None:
    kit.build(fast_path / "s")
    near = {**kit.provenance["projection"], "canary": [0.5, -1.2500001, 3.0]}
    kit.writer(fast_path / "s", projection=near).close()
    far = {**near, "canary": [0.5, 1.25, 3.0]}
    with pytest.raises(ProvenanceMismatch, match=r"differs by up to 2\.5 .*another random stream"):
        kit.writer(fast_path / "s", projection=far)


def test_libraries_only_warn(
    kit: StoreKit, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kit.build(fast_path / "s")
    with kit.writer(fast_path / "s") as writer:
        kit.add(writer, "train/2", libraries={"torch": "2.11.0"})
    assert "torch" in caplog.text


def test_places_that_a_model_was_loaded_from_are_no_difference(
    kit: StoreKit, fast_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with kit.writer(fast_path / "s") as writer:
        for step, place in ((1, "/here"), (2, "/there")):
            held = {"torch": "2.11.0", LOADED_FROM: {"folders": [place]}}
            kit.add(writer, f"train/{step}", libraries=held)
    assert caplog.text == ""
    generation = open_store(fast_path / "s").generation("train/2")
    assert generation.record.libraries[LOADED_FROM] == {"folders": ["/there"]}


def test_keep_generations_retires_the_old_ones_of_each_series(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    kit.build(path, "train/1", "target/a/1", "train/9", "train/10")
    early = open_store(path)
    read = early.generation("train/1")
    with kit.writer(path) as writer:
        assert writer.clean() == []
        assert writer.clean(keep_generations=2) == ["train/1"]
        assert writer.clean(keep_generations=2) == []
        with pytest.raises(BadInput, match="keep at least 1"):
            writer.clean(keep_generations=0)
    assert names(path) == ["target/a/1", "train/9", "train/10"]
    assert not (path / "generations/train/1").exists()
    assert verify_store(path).ok
    with pytest.raises(BadInput, match="removed by clean-up"):
        early.generation("train/1").read(0, 1)
    with pytest.raises(BadInput, match="removed by clean-up"):
        read.read(0, 1)
    with pytest.raises(BadInput, match=r"no committed generation 'train/1'; it has: target/a/1"):
        open_store(path).generation("train/1")


def test_a_removed_name_is_never_used_again(kit: StoreKit, fast_path: Path) -> None:
    path = fast_path / "s"
    kit.build(path, "train/1", "train/2")
    with kit.writer(path) as writer:
        writer.clean(keep_generations=1)
        kit.add(writer, "train/1")
    assert names(path) == ["train/2", "train/1.2"]
    assert verify_store(path).ok


def test_removed_generations_leave_no_index(kit: StoreKit, fast_path: Path) -> None:
    path = fast_path / "s"
    store = kit.build(path, "train/1", "train/2")
    for commit in store.commits:
        for kind in ("", ".ivf"):
            (path / "index" / (commit.sha256 + kind)).mkdir(parents=True)
    with kit.writer(path) as writer:
        writer.clean(keep_generations=1)
    kept = store.commits[1].sha256
    assert sorted(p.name for p in (path / "index").iterdir()) == [kept, f"{kept}.ivf"]
