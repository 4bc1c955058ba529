"""Repair: names the rows that are damaged, and puts back the committed bytes or none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gradstore.cli.care import repair_told
from gradstore.errors import BadInput, DamagedData
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName
from gradstore.format.plans import Plan, UnitRange
from gradstore.format.text_table import Text
from gradstore.storage.local import Hook, StoreFiles
from gradstore.store import repair as repair_module
from gradstore.store.damage import Damage, assess, plan_of
from gradstore.store.encoding import encoded_unit
from gradstore.store.reader import Store, open_store
from gradstore.store.repair import put_back, repair_store, supersede
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

N = 40


def hashes(store: Path) -> dict[str, str]:
    return {
        path.relative_to(store).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "writer.lock" and "staging" not in path.parts
    }


def flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def store(kit: StoreKit, fast_path: Path) -> Path:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        writer.keep_texts(kit.rows(N), [Text("p", f"r {i}", 3) for i in range(N)])
        kit.add(writer, "train/1", N)
        kit.add(writer, "myrun/target/a/1", 8)
    return path


def units_of(kit: StoreKit, noise: float = 0.0) -> Callable[[Plan, UnitRange], dict[str, Any]]:
    """Computes any unit of `store` as its build did; with noise as another device would."""

    def compute(plan: Plan, unit: UnitRange) -> dict[str, Any]:
        step = GenerationName.parse(plan.name).step
        values = kit.features(len(plan.rows), step)[unit.start : unit.stop] * (1 + noise)
        k = unit.stop - unit.start
        ones, status = np.ones(k, np.float32), np.full(k, RowStatus.OK, np.uint8)
        return encoded_unit(plan, unit, values, ones, status, np.arange(k))

    return compute


def recomputed(kit: StoreKit, noise: float = 0.0) -> Any:
    """Does what `gradstore repair STORE CONFIG` does, with the features above for a model's."""

    def run(files: StoreFiles, view: Callable[[], Store], damages: Sequence[Damage]) -> list[str]:
        notes = []
        for damage in damages:
            if damage.unit is not None:
                plan, commit = plan_of(files, view(), damage.generation)
                values = units_of(kit, noise)(plan, damage.unit)
                notes += put_back(files, plan, commit, damage.unit, values)
        return notes

    return run


def test_the_report_names_exactly_the_rows_of_damaged_chunks(store: Path) -> None:
    flip(store / "generations/train/1/features/c/1/0", 9)
    (store / "generations/train/1/tokens/c/2").unlink()
    flip(store / "generations/myrun/target/a/1/scale/c/0")
    found = {(d.generation, d.unit and d.unit.index): d for d in assess(store)}
    assert found.keys() == {("train/1", 1), ("train/1", 2), ("myrun/target/a/1", 0)}
    one = found["train/1", 1]
    assert one.unit == UnitRange(1, 16, 32)
    assert one.sources == tuple(("set one", i) for i in range(16, 32))
    assert one.arrays == {"features"}
    assert found["train/1", 2].unit == UnitRange(2, 32, 40)
    assert {d.remedy for d in found.values()} == {"config"}


def test_every_damaged_file_comes_back_as_it_was_or_is_named_as_lost(
    kit: StoreKit, store: Path
) -> None:
    """Files of each kind, one after the other with a flipped byte or missing."""
    before = hashes(store)
    lost = set()
    for number, name in enumerate(name for name in before if "myrun" not in name):
        if name.split("/")[-1] in ("1", "2", "1.json", "2.json") and "units" in name:
            continue
        data = (store / name).read_bytes()
        if number % 2 or name.startswith("commits"):  # the newest may go unnoticed
            flip(store / name, 0)
        else:
            (store / name).unlink()
        result = repair_store(store, recomputed(kit))
        assert name in [f.file for d in result.found for f in d.faults]
        if hashes(store) != before:
            lost.add(name)
            (store / name).write_bytes(data)
        else:
            assert result.left == (), name
    assert {name.split("/")[0] for name in lost} == {"commits", "plans", "spaces", "texts"}
    assert hashes(store) == before
    assert verify_store(store).ok


def test_what_follows_from_other_files_needs_no_model(store: Path) -> None:
    before = hashes(store)
    generation = store / "generations/train/1"
    flip(generation / "row_hash/c/0/0", 3)
    (generation / "units/2.json").unlink()
    flip(generation / "row_hash/c/2/0", 3)  # and the record that could say so is missing
    flip(store / "zarr.json", 5)
    (generation / "zarr.json").unlink()
    (generation / "notes.txt").write_text("mine")
    index = store / "index" / open_store_sha(store)
    index.mkdir(parents=True)
    (index / "faiss.bin").write_bytes(b"torn")
    (index / "index.json").write_text(json.dumps({"sha256": "0" * 64}))
    result = repair_store(store)
    assert result.left == ()
    assert {d.what for d in result.found} == {"root", "unit", "metadata", "stray", "index"}
    assert hashes(store) == before
    assert verify_store(store).ok
    assert [p.read_text() for p in (store / "staging/quarantine").iterdir()] == ["mine"]


@pytest.mark.parametrize("second", ["commits/2.json", "plans/train/1.json"])
@pytest.mark.parametrize("spelled", [b"{}", None, b""], ids=["other", "torn", "empty"])
@pytest.mark.parametrize("third", [False, True], ids=["", "and a plan without a commit"])
def test_a_root_beside_another_damaged_document_is_reported_with_it(
    kit: StoreKit, store: Path, second: str, spelled: bytes | None, third: bool
) -> None:
    """Nothing is touched then: not the plan without a commit either, which waits for the rest."""
    begun = store / "plans/train/2.json"
    if third:
        with kit.writer(store) as writer:
            writer.begin(kit.record("train/2"), kit.rows(N), dim=kit.dim, unit_rows=kit.unit_rows)
        whole = begun.read_bytes()
        begun.write_bytes(whole[:-9])
    before = hashes(store)
    sound = {name: (store / name).read_bytes() for name in ("zarr.json", second)}
    (store / "zarr.json").write_bytes(b"{}")
    (store / second).write_bytes(sound[second][:-9] if spelled is None else spelled)
    harmed = hashes(store)
    result = repair_store(store, recomputed(kit))
    others = ["plans/train/2.json"] if third else []
    assert [f.file for d in result.left for f in d.faults] == ["zarr.json", second, *others]
    assert {d.remedy for d in result.left} == {"none"}
    assert result.found == result.left
    assert hashes(store) == harmed
    (store / second).write_bytes(sound[second])
    if third:
        begun.write_bytes(whole)
        before["plans/train/2.json"] = hashes(store)["plans/train/2.json"]
    assert repair_store(store, recomputed(kit)).left == ()
    assert hashes(store) == before


@pytest.mark.parametrize("spelled", [b"{}", None, b""], ids=["other", "torn", "empty"])
def test_a_damaged_plan_that_was_never_committed_does_not_keep_a_root_from_being_written_again(
    kit: StoreKit, store: Path, spelled: bytes | None
) -> None:
    """It has nothing that anybody could lose: it is set aside, as beside a root that is there."""
    before = hashes(store)
    with kit.writer(store) as writer:
        begun = writer.begin(
            kit.record("train/2"), kit.rows(N), dim=kit.dim, unit_rows=kit.unit_rows
        )
        kit.fill(begun, kit.features(N), units=1)
    plan = store / "plans/train/2.json"
    damaged = plan.read_bytes()[:-9] if spelled is None else spelled
    plan.write_bytes(damaged)
    (store / "zarr.json").unlink()
    result = repair_store(store, recomputed(kit))
    assert result.left == ()
    assert [(d.what, d.faults[0].file) for d in result.found] == [
        ("root", "zarr.json"), ("document", "plans/train/2.json"),
    ]  # fmt: skip
    assert hashes(store) == before
    aside = store / "staging/quarantine"
    assert (aside / "0").read_bytes() == damaged
    assert (aside / "1/units/0.json").is_file()
    with kit.writer(store) as writer:
        kit.add(writer, "train/2", N)
    assert verify_store(store).ok


def test_a_plan_that_names_a_position_twice_ends_no_repair_in_a_traceback(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its seal fits: somebody has written it so."""
    (store / "zarr.json").write_bytes(b"{}")

    def twice(data: bytes) -> Any:
        raise BadInput("does not hold each of its positions exactly once")

    monkeypatch.setattr(Plan, "from_bytes", twice)
    found = [(d.what, d.faults[0].file) for d in repair_store(store, recomputed(kit)).left]
    assert found == [("root", "zarr.json"), ("document", "plans/myrun/target/a/1.json"),
                     ("document", "plans/train/1.json")]  # fmt: skip


def test_a_loose_plan_of_a_later_release_is_not_set_aside_by_an_earlier_one(
    kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kit.writer(store) as writer:
        writer.begin(kit.record("train/2"), kit.rows(N), dim=kit.dim, unit_rows=kit.unit_rows)
    plan, read = store / "plans/train/2.json", Plan.from_bytes
    later = plan.read_bytes()

    def earlier_release(data: bytes) -> Any:
        if data == later:
            raise ValueError("another schema")
        return read(data)

    monkeypatch.setattr(Plan, "from_bytes", earlier_release)
    monkeypatch.setattr(repair_module, "NEEDS", {0: "the release before the plan's"})
    (store / "zarr.json").unlink()
    assert "plans/train/2.json" in [d.faults[0].file for d in repair_store(store).left]
    assert plan.read_bytes() == later


def open_store_sha(store: Path) -> str:
    """The sha of train/1's commit, though the root is damaged."""
    return str(json.loads((store / "commits/2.json").read_text())["sha256"])


def test_a_unit_that_comes_out_otherwise_is_refused_and_may_become_a_new_attempt(
    kit: StoreKit, store: Path
) -> None:
    chunk = store / "generations/train/1/features/c/1/0"
    good = open_store(store).generation("train/1").read(0, 16)
    flip(chunk, 9)
    before = hashes(store)
    result = repair_store(store, recomputed(kit, noise=0.01))
    assert result.notes == ("generations/train/1/features/c/1/0",)
    assert [d.generation for d in result.left] == ["train/1"]
    assert hashes(store) == before
    record = store / "generations/train/1/units/1.json"
    told = record.read_bytes()
    record.unlink()  # then nothing but the commit says what the unit was
    result = repair_store(store, recomputed(kit, noise=0.01))
    assert result.notes == ("generations/train/1/units/1.json",)
    record.write_bytes(told)
    assert hashes(store) == before
    files = StoreFiles(store)
    plan, _ = plan_of(files, Store(files), "train/1")
    values: Mapping[int, Any] = {1: units_of(kit, 0.01)(plan, plan.units[1])}
    with kit.writer(store) as writer:
        assert supersede(files, lambda: writer.store, "train/1", values) == "train/1.2"
    now = open_store(store)
    assert [c.kind for c in now.commits] == ["texts", "generation", "generation", "generation",
                                            "retire"]  # fmt: skip
    generation = now.generation("train/1")
    np.testing.assert_array_equal(generation.read(0, 16), good)
    assert generation.name == "train/1.2"
    assert now.texts(generation) is not None
    assert not chunk.exists()
    assert verify_store(store).ok


def spoil(store: Path) -> None:
    """Damage two files of a unit, of what follows from other files, and add a stranger's."""
    generation = store / "generations/train/1"
    (generation / "status/c/0").unlink()
    (generation / "units/0.json").unlink()
    flip(generation / "features/c/1/0", 9)
    flip(generation / "scale/zarr.json", 5)
    (generation / "notes.txt").write_text("mine")


def repaired(kit: StoreKit, store: Path, monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Repair a store, and see all its operations on disk."""
    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "files_at", lambda place: StoreFiles(place, hook))
        assert repair_store(store, recomputed(kit)).left == ()


def test_fault_16_a_kill_at_every_operation_of_a_repair_is_finished_by_the_next_one(
    kit: StoreKit, crashes: Any, store: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(store)
    spoil(store)
    kills = crashes.Kills(store, [])
    repaired(kit, store, monkeypatch, kills)
    for k, (left, _) in enumerate(kills.each(fast_path)):
        assert repair_store(left, recomputed(kit)).left == (), k
        assert hashes(left) == before, k
    assert k > 12


def test_fault_17_a_power_loss_at_any_operation_of_a_repair_spoils_nothing_that_was_sound(
    kit: StoreKit, crashes: Any, store: Path, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What returned as repaired is whole; else what is damaged still is repaired by the next."""
    before = hashes(store)
    spoil(store)
    sound = {name: sha for name, sha in hashes(store).items() if before.get(name) == sha}
    losses = crashes.PowerLosses(store, [])
    repaired(kit, store, monkeypatch, losses)
    for k, (left, _) in enumerate(losses.each(fast_path)):
        assert hashes(left).items() >= sound.items(), k
        assert repair_store(left, recomputed(kit)).left == (), k
        assert hashes(left) == before, k
    assert k > 5
    crashes.write_contents(losses.now(), fast_path / "at the end")
    losses.close()
    assert hashes(fast_path / "at the end") == before


def test_the_command_says_rows_and_the_next_step_and_exits_with_4_while_damage_is_left(
    kit: StoreKit, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(store / "generations/train/1/features/c/1/0", 9)
    (store / "generations/train/1/zarr.json").unlink()
    before = hashes(store)
    with pytest.raises(DamagedData, match="without --dry-run"):
        repair_told(store, dry_run=True, as_json=False)
    assert hashes(store) == before
    assert "16 to 31 (set one[16] to set one[31])" in capsys.readouterr().out
    with pytest.raises(DamagedData, match="repair STORE CONFIG") as caught:
        repair_told(store, dry_run=False, as_json=True)
    assert caught.value.exit_code == 4
    told = json.loads(capsys.readouterr().out)
    assert [each["what"] for each in told["mended"]] == ["metadata"]
    assert [each["rows"] for each in told["left"]] == [[16, 32]]
    repair_told(store, recomputed(kit), dry_run=False, as_json=True)
    assert json.loads(capsys.readouterr().out)["ok"] is True
    repair_told(store, dry_run=False, as_json=False)
    assert "0 damaged" in capsys.readouterr().out
