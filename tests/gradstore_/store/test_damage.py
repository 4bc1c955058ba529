"""Whatever is damaged on disk is reported, with file, expected and found, before it is used."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch, StoreError
from gradstore.export.kronecker import BlockFactors, KroneckerFactors
from gradstore.format.canonical import canonical_json, parse, seal
from gradstore.format.layout import NEEDS, plan_path, provenance_path, root_json
from gradstore.format.text_table import Text
from gradstore.format.unit_records import crc32c
from gradstore.similarity.index import FeatureIndex
from gradstore.similarity.index_cache import IndexCache
from gradstore.storage.local import StoreFiles
from gradstore.storage.reading import ReadFiles
from gradstore.store.asked_rows import asked_rows
from gradstore.store.curvature import factors_path
from gradstore.store.forgetting import forget, request_for
from gradstore.store.held import held_store
from gradstore.store.reader import Store, open_store
from gradstore.store.texts import RowTexts
from gradstore.store.verify import verify_store

if TYPE_CHECKING:
    from conftest import StoreKit

IGNORED = {"writer.lock"}


def read_everything(path: Path, file: str = "", opened: Store | None = None) -> None:
    """Read a store, or of it only what a file in it matters to, beside what opens it.

    One that is `opened` has read commits and nothing else; where the file is none, that is enough.
    """
    top = file.split("/")[0]
    if opened is None or top in ("commits", "zarr.json"):
        store = open_store(path)
    else:
        store = opened.refresh()
    if top in ("", "forgotten"):
        store.requests()
    for commit in store.text_commits().values() if top in ("", "texts") else ():
        texts = RowTexts(ReadFiles(path), commit.texts[0])
        texts.read(range(len(texts)))
    for generation in store.generations(superseded=True) if top != "texts" else ():
        if top == "curvature":
            store.factors(generation)
            continue
        generation.check_values()
        generation.read(0, generation.rows)
        generation.take([0])
        assert generation.norm.shape == generation.tokens.shape
        assert generation.loss is None or generation.loss.shape == generation.norm.shape
        if not top:
            store.factors(generation)


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name not in IGNORED)


@pytest.fixture
def store(kit: StoreKit, fast_path: Path) -> Path:
    kit.build(fast_path / "s", "train/1", "target/a/1", n=20)
    return fast_path / "s"


def test_fault_21_any_flipped_bit_in_any_file_is_reported_when_read_and_when_verified(
    store: Path,
) -> None:
    draw = random.Random(0)
    for file in files_of(store):
        data = file.read_bytes()
        inside = draw.sample(range(len(data)), min(6, len(data)))
        for at in {0, len(data) - 1, *inside}:
            damaged = bytearray(data)
            damaged[at] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(DamagedData) as caught:
                read_everything(store)
            assert caught.value.exit_code == 4
            report = verify_store(store)
            assert str(file.relative_to(store)) in [f.file for f in report.faults], (file, at)
        file.write_bytes(data)
    assert verify_store(store).ok


def full_store(kit: StoreKit, path: Path) -> None:
    """Three rows and, of each kind, every file that a store may have; an index comes on top."""
    values = np.random.default_rng(0).standard_normal((2, 2))
    block = BlockFactors(
        *(torch.tensor(values * scale, dtype=torch.float32) for scale in (1, 2, 3))
    )
    factors = KroneckerFactors("ekfac", {"a": block}, rows=3, sample="5a")
    record = kit.record(feature="sgd", feature_options={"curvature": factors.options()})
    with kit.writer(path) as writer:
        files = StoreFiles(path)
        files.publish(factors_path(factors.sha256), factors.to_bytes())
        files.close()
        writer.keep_texts(kit.rows(3), [Text(f"p {i}", "r", 1) for i in range(3)])
        begun = writer.begin(record, kit.rows(3), dim=4, unit_rows=4, losses=True)
        begun.write_unit(0, kit.features(3), np.ones(3, np.float32), np.zeros(3, np.uint8),
                         np.arange(3), np.arange(3) / 8)  # fmt: skip
        begun.commit()
    with held_store(path) as (held, view):
        forget(held, view, request_for(held, view(), asked_rows(held, view(), [1])))


def test_fault_21_every_byte_of_a_small_store_is_reported_when_a_bit_of_it_is_flipped(
    kit: StoreKit, fast_path: Path
) -> None:
    """A reader reports each of them, a check of the whole store names the file (every 61st)."""
    path, draw, flipped = fast_path / "s", random.Random(0), 0
    full_store(kit, path)
    read_everything(path)
    opened = open_store(path)
    for file in files_of(path):
        data, name = file.read_bytes(), str(file.relative_to(path))
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(DamagedData) as caught:
                read_everything(path, name, opened)
            assert caught.value.exit_code == 4, (name, at)
            if flipped % 61 == 0:
                assert name in [f.file for f in verify_store(path).faults], (name, at)
            flipped += 1
        file.write_bytes(data)
    assert {file.relative_to(path).parts[0] for file in files_of(path)} == {
        "commits", "curvature", "forgotten", "generations", "plans", "spaces", "texts", "zarr.json",
    }  # fmt: skip
    assert flipped > 10_000
    assert verify_store(path).ok


def test_fault_23_every_byte_of_a_small_index_is_told_when_a_bit_of_it_is_flipped(
    kit: StoreKit, fast_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("faiss")
    generation = kit.build(fast_path / "s", n=3).generation("train/1")
    caches: list[IndexCache] = []
    sound_file = IndexCache.sound_file

    def noted(cache: IndexCache) -> Path | None:
        caches.append(cache)
        return sound_file(cache)

    monkeypatch.setattr(IndexCache, "sound_file", noted)
    FeatureIndex.build(generation, fast_path / "index", backend="faiss")
    (cache,), draw, flipped = caches, random.Random(0), 0
    assert sound_file(cache) is not None
    for file in files_of(fast_path / "index"):
        data = file.read_bytes()
        for at in range(len(data)):
            damaged = bytearray(data)
            damaged[at] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            assert sound_file(cache) is None, (file, at)
            flipped += 1
        file.write_bytes(data)
    assert sound_file(cache) is not None
    assert flipped > 400


SWAPPED = {
    "units of an array": ("features/c/0/0", "features/c/1/0"),
    "units of a small array": ("scale/c/0", "scale/c/1"),
    "arrays of equal size": ("scale/c/0", "norm/c/0"),
    "arrays and units": ("scale/c/0", "norm/c/1"),
    "unit records": ("units/0.json", "units/1.json"),
    "zarr.json of two arrays": ("scale/zarr.json", "tokens/zarr.json"),
    "generations": ("features/c/0/0", "../../target/a/2/features/c/0/0"),
}


@pytest.mark.parametrize("what", SWAPPED)
def test_fault_21_two_sound_files_that_are_swapped_are_both_reported(
    kit: StoreKit, fast_path: Path, what: str
) -> None:
    path = fast_path / "s"
    kit.build(path, "train/1", "target/a/2", n=32)  # the step is the seed: other values
    base = path / "generations/train/1"
    first, second = ((base / name).resolve() for name in SWAPPED[what])
    sizes = {file.stat().st_size for file in (first, second)}
    assert len(sizes) == 1 or first.suffix == ".json"
    one, other = first.read_bytes(), second.read_bytes()
    assert one != other
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(DamagedData):
        read_everything(path)
    faults = {fault.file for fault in verify_store(path).faults}
    assert faults >= {str(file.relative_to(path.resolve())) for file in (first, second)}
    first.write_bytes(one)
    second.write_bytes(other)
    assert verify_store(path).ok


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "longer"])
def test_fault_21_a_missing_or_wrongly_sized_file_is_reported_never_filled_in(
    store: Path, how: str
) -> None:
    for file in files_of(store):
        data = file.read_bytes()
        if how == "missing":
            file.unlink()
        else:
            size = {"empty": 0, "truncated": len(data) - 1, "longer": len(data) + 1}[how]
            file.write_bytes((data + b"\0")[:size])
        if how == "missing" and file.name == "2.json" and file.parent.name == "commits":
            assert open_store(store).head.number == 1  # type: ignore[union-attr]
        else:
            with pytest.raises(DamagedData, match=r"expected .* found"):
                read_everything(store)
            assert not verify_store(store).ok
        file.write_bytes(data)
    assert verify_store(store).ok


def test_fault_22_an_edited_commit_breaks_the_chain_even_with_a_new_seal(store: Path) -> None:
    file = store / "commits/1.json"
    file.write_bytes(canonical_json(seal({**parse(file.read_bytes()), "chunk_bytes": 1})))
    with pytest.raises(DamagedData, match="chain broken at 2"):
        open_store(store)


def test_a_missing_commit_in_the_middle_breaks_the_chain(store: Path) -> None:
    (store / "commits/1.json").unlink()
    with pytest.raises(DamagedData, match="chain broken at 1"):
        open_store(store)


def test_fault_22_an_edited_unit_record_is_reported_even_with_a_new_seal(store: Path) -> None:
    file = store / "generations/train/1/units/0.json"
    file.write_bytes(canonical_json(seal({**parse(file.read_bytes()), "status": {"ok": 16}})))
    with pytest.raises(DamagedData, match=r"units/0\.json"):
        open_store(store).generation("train/1")


def test_a_unit_of_another_plan_is_done_again_however_well_it_is_sealed(
    kit: StoreKit, fast_path: Path
) -> None:
    values, path = kit.features(40), fast_path / "s"
    with kit.writer(path) as writer:
        kit.fill(writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16), values)
    file = path / "generations/train/1/units/1.json"
    file.write_bytes(canonical_json(seal({**parse(file.read_bytes()), "plan_sha256": "0" * 64})))
    with kit.writer(path) as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        assert [unit.index for unit in generation.pending] == [1]


@pytest.mark.parametrize("what", ["plan", "provenance"])
def test_another_plan_or_provenance_is_reported_even_with_a_new_seal(
    what: str, store: Path
) -> None:
    file = store / {"plan": plan_path("train/1"), "provenance": provenance_path("gradient")}[what]
    document = parse(file.read_bytes())
    if what == "plan":
        document["record"] = {**document["record"], "run_id": "another"}
    else:
        document["fields"] = {**document["fields"], "template": "another"}
    file.write_bytes(canonical_json(seal(document)))
    with pytest.raises(DamagedData, match="expected sha256"):
        read_everything(store)
    assert str(file.relative_to(store)) in [fault.file for fault in verify_store(store).faults]


def test_fault_17_an_uncommitted_damaged_unit_is_set_aside_and_redone(
    kit: StoreKit, fast_path: Path
) -> None:
    values, path = kit.features(40), fast_path / "s"
    with kit.writer(path) as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(generation, values)
        chunk = path / "generations/train/1/features/c/1/0"
        chunk.write_bytes(b"")
        (path / "generations/train/1/scale/c/2").unlink()
        with pytest.raises(DamagedData, match="not committed"):
            generation.commit()
    with kit.writer(path) as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        assert [unit.index for unit in generation.pending] == [1, 2]
        kit.fill(generation, values)
        generation.commit()
        assert (path / "staging/quarantine").is_dir()
        writer.clean()
    assert not (path / "staging/quarantine").exists()
    assert verify_store(path).ok


@pytest.mark.parametrize("file", ["plans/train/1.json", "zarr.json", "generations/zarr.json"])
def test_an_uncommitted_store_with_an_empty_file_is_repaired(
    kit: StoreKit, fast_path: Path, file: str
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        kit.fill(
            writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16), kit.features(40), units=1
        )
    (path / file).write_bytes(b"")
    with kit.writer(path) as writer:
        kit.add(writer)
    assert verify_store(path).ok


def test_a_writer_refuses_a_store_whose_committed_root_is_damaged(
    kit: StoreKit, store: Path
) -> None:
    (store / "zarr.json").write_bytes(b"")
    with pytest.raises(DamagedData):
        kit.writer(store)


def test_fault_15_a_newer_schema_is_refused_and_nothing_written(kit: StoreKit, store: Path) -> None:
    attributes = parse(root_json("u"))["attributes"]
    body = {k: v for k, v in attributes.items() if k != "check"}
    newer = {**body, "schema_version": max(NEEDS) + 1, "needs": "dataflex-gradstore>=9"}
    check = seal(newer)["sha256"]
    document = {"zarr_format": 3, "attributes": {**newer, "check": check}, "extra": 1}
    (store / "zarr.json").write_bytes(canonical_json(document))
    before = {file: file.read_bytes() for file in files_of(store)}
    with pytest.raises(ProvenanceMismatch, match="needs 'dataflex-gradstore>=9'"):
        open_store(store)
    with pytest.raises(ProvenanceMismatch):
        kit.writer(store)
    assert before == {file: file.read_bytes() for file in files_of(store)}


def test_other_folders_are_no_stores(kit: StoreKit, fast_path: Path) -> None:
    with pytest.raises(BadInput, match="no store at"):
        open_store(fast_path)
    (fast_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BadInput, match=r"model\.safetensors"):
        kit.writer(fast_path)
    with pytest.raises(BadInput, match="is a file, no gradient store"):
        open_store(fast_path / "model.safetensors")
    assert os.listdir(fast_path) == ["model.safetensors"]
    with pytest.raises(BadInput, match="is a file"):
        kit.writer(fast_path / "model.safetensors")


# ---- hostile stores --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**50, 4]},
        {"data_type": "object"},
        {"codecs": [{"name": "bytes"}, {"name": "zstd"}]},
        {"storage_transformers": [{"name": "x"}]},
    ],
)
def test_fault_27_metadata_other_than_ours_is_refused_before_an_array_is_opened(
    store: Path, change: dict[str, object]
) -> None:
    file = store / "generations/train/1/features/zarr.json"
    file.write_bytes(canonical_json({**parse(file.read_bytes()), **change}))
    with pytest.raises(DamagedData, match=r"features/zarr\.json"):
        open_store(store).generation("train/1")


def forge(store: Path, **changes: object) -> None:
    """Replaces the last commit by a well-sealed one that says something else."""
    file = store / "commits/2.json"
    file.write_bytes(canonical_json(seal({**parse(file.read_bytes()), **changes})))


@pytest.mark.parametrize(
    "name", ["../../etc/1", "/etc/1", "train/../1", "train/1/x", "", "a/b/c/1"]
)
def test_fault_27_hostile_generation_names_never_reach_the_disk(store: Path, name: str) -> None:
    forge(store, generations=[name])
    with pytest.raises(StoreError) as caught:
        read_everything(store)
    assert caught.value.exit_code == 4
    assert not verify_store(store).ok


def test_fault_27_a_plan_of_impossible_size_is_refused(store: Path) -> None:
    file = store / "plans/target/a/1.json"
    plan = seal({**parse(file.read_bytes()), "row_count": 2**50, "dim": 2**50})
    file.write_bytes(canonical_json(plan))
    forge(store, plan_sha256=plan["sha256"])
    with pytest.raises(DamagedData, match="plans/target/a/1"):
        read_everything(store)


def test_fault_07_a_plan_that_names_a_position_twice_is_refused(
    kit: StoreKit, fast_path: Path
) -> None:
    with kit.writer(fast_path / "s") as writer:
        writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
    file = fast_path / "s/plans/train/1.json"
    plan = parse(file.read_bytes())
    plan["units"][1]["rows"] = [0, 16]
    file.write_bytes(canonical_json(seal(plan)))
    with (
        kit.writer(fast_path / "s") as writer,
        pytest.raises(BadInput, match="exactly once"),
    ):
        writer.begin(kit.record(), kit.rows(40), dim=4)


@pytest.mark.parametrize(
    "name",
    ["plans/train/1.json", "spaces/gradient/provenance.json", "generations/train/1/norm/zarr.json"],
)
def test_nothing_is_committed_beside_a_document_that_changed_since_it_was_written(
    kit: StoreKit, fast_path: Path, name: str
) -> None:
    with kit.writer(fast_path / "s") as writer:
        generation = writer.begin(kit.record(), kit.rows(40), dim=4, unit_rows=16)
        kit.fill(generation, kit.features(40))
        file = fast_path / "s" / name
        data = file.read_bytes()
        file.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        with pytest.raises(DamagedData, match=f"not committed: {name}"):
            generation.commit()
        file.write_bytes(data)
        generation.commit()
    assert verify_store(fast_path / "s").ok


def test_files_that_no_one_committed_are_reported_by_verify(store: Path) -> None:
    (store / "generations/train/1/features/c/9").mkdir()
    (store / "generations/train/1/features/c/9/0").write_bytes(b"x")
    assert [f.file for f in verify_store(store).faults] == ["generations/train/1/features/c/9/0"]


def test_a_report_tells_every_fault_and_its_exit_code(store: Path) -> None:
    for unit in (0, 1):
        chunk = store / f"generations/train/1/tokens/c/{unit}"
        chunk.write_bytes(np.zeros(17, "<i4").tobytes())
    report = verify_store(store)
    assert len(report.faults) == 2
    assert report.ok is False
    with pytest.raises(DamagedData, match="damaged in 2 place") as caught:
        CliRunner().invoke(app, ["verify", str(store)], catch_exceptions=False)
    assert caught.value.exit_code == 4
    for fault in report.faults:
        assert str(fault) in str(caught.value)


def same_crc32c(data: bytes) -> bytes:
    """Another text of the same length and crc32c, different in its first 5 bytes.

    The checksum is affine over GF(2): of the 40 single-bit changes, some combination leaves it.
    """

    def change(bit: int) -> int:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        return crc32c(bytes(flipped)) ^ crc32c(data)

    basis: dict[int, tuple[int, int]] = {}  # leading bit -> (change of the checksum, bits flipped)
    for bit in range(40):
        value, bits = change(bit), 1 << bit
        while value and value.bit_length() in basis:
            other, other_bits = basis[value.bit_length()]
            value, bits = value ^ other, bits ^ other_bits
        if not value:
            return bytes(b ^ (bits >> 8 * i & 255) for i, b in enumerate(data[:5])) + data[5:]
        basis[value.bit_length()] = (value, bits)
    raise AssertionError("40 changes of a 32-bit checksum are independent")


def test_a_chunk_made_to_fit_its_crc32c_is_told_by_its_sha256(store: Path) -> None:
    file = store / "generations/train/1/features/c/0/0"
    data = file.read_bytes()
    forged = same_crc32c(data[:-4]) + data[-4:]
    assert forged != data
    assert crc32c(forged[:-4]) == crc32c(data[:-4])
    file.write_bytes(forged)
    (fault,) = verify_store(store).faults
    assert fault.file == "generations/train/1/features/c/0/0"
    assert fault.expected.startswith("sha256")


def test_commits_of_another_store_are_no_commits_of_this_one(
    kit: StoreKit, store: Path, fast_path: Path
) -> None:
    """All of the other store but its identity: each document fits its seal and the chain holds."""
    other = fast_path / "other"
    with kit.writer(other):
        pass
    for name in ("commits", "plans", "generations", "spaces"):
        shutil.copytree(store / name, other / name, dirs_exist_ok=True)
    says = r"expected store .*, found store .* \(chain broken at 1\)"
    with pytest.raises(DamagedData, match=says):
        open_store(other)
