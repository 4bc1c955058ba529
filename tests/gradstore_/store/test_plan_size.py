"""No plan is written that nobody could read again, and none is set aside for its size."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from gradstore.errors import BadInput, TooLarge
from gradstore.storage.reading import DOCUMENT_BYTES, ReadFiles
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store
from gradstore.store.writer import StoreWriter

if TYPE_CHECKING:
    from conftest import StoreKit

#: More than any other document of these stores, and about what a plan of 60 rows takes.
MOST_BYTES = 4000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReadFiles, "most_bytes", MOST_BYTES)


def begin(kit: StoreKit, writer: StoreWriter, rows: int) -> Any:
    return writer.begin(kit.record(), kit.rows(rows), dim=kit.dim, unit_rows=kit.unit_rows)


def test_a_plan_says_its_bytes_before_it_is_written(kit: StoreKit, fast_path: Path) -> None:
    plan = kit.build(fast_path / "s").generation("train/1").plan
    assert plan.byte_count == len(plan.to_bytes()) < DOCUMENT_BYTES
    assert plan.byte_count == (fast_path / "s/plans/train/1.json").stat().st_size


@pytest.mark.usefixtures("small")
def test_more_rows_than_a_plan_can_hold_are_refused_when_they_are_begun(
    kit: StoreKit, fast_path: Path
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        with pytest.raises(BadInput, match=r"1,000 rows.* 4,000 are the most .*gradstore=PATH"):
            begin(kit, writer, 1000)
        assert not list(path.glob("plans/**/*.json"))
        kit.add(writer)  # rows that fit are none the worse for it
    assert verify_store(path).ok


@pytest.mark.usefixtures("small")
def test_the_bound_is_the_same_where_a_store_is_no_folder(kit: StoreKit, elsewhere: Any) -> None:
    with (
        StoreWriter(elsewhere.address, provenance=kit.provenance) as writer,
        pytest.raises(BadInput, match="1,000 rows"),
    ):
        begin(kit, writer, 1000)
    assert not [name for name in elsewhere.files() if name.startswith("plans/")]


def test_a_larger_plan_of_another_release_is_told_and_stays_and_other_generations_go_on(
    kit: StoreKit,
    fast_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = fast_path / "s"
    with kit.writer(path) as writer:
        kit.fill(begin(kit, writer, 1000), kit.features(1000), units=2)
    before = {file: file.read_bytes() for file in path.rglob("*.json")}
    monkeypatch.setattr(ReadFiles, "most_bytes", MOST_BYTES)
    told = r"plans/train/1\.json of store .* at most 4,000 bytes .*left as it is"
    with kit.writer(path) as writer, pytest.raises(TooLarge, match=told):
        kit.add(writer, "train/1")
    with kit.writer(path) as writer:
        kit.add(writer, "train/2")
    assert "train/1 is left as it is" in caplog.text
    assert {file: file.read_bytes() for file in before} == before
    assert not (path / "staging/quarantine").exists()
    assert open_store(path).planned() == ["train/1"]


def test_a_larger_plan_in_a_bucket_is_told_and_stays(
    kit: StoreKit, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StoreWriter(bucket, provenance=kit.provenance) as writer:
        kit.fill(begin(kit, writer, 1000), kit.features(1000), units=2)
    monkeypatch.setattr(ReadFiles, "most_bytes", MOST_BYTES)
    with StoreWriter(bucket, provenance=kit.provenance) as writer:
        with pytest.raises(TooLarge, match="left as it is"):
            kit.add(writer)
        assert list(writer.store.planned()) == ["train/1"]
