"""Every command takes the address of a bucket or a service, and says what it says of a folder."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.cli.care import repair_told
from gradstore.errors import BadInput, DamagedData
from gradstore.format.layout import NEEDS
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.store.reader import open_store
from gradstore.store.repair import repair_store
from gradstore.store.verify import verify_store

KEPT = Path(__file__).parents[1] / "store" / "kept"


def test_commands_answer_of_another_place_as_of_a_folder(
    commands: Any, elsewhere: Any, tmp_path: Path
) -> None:
    places = (elsewhere.address, tmp_path / "s")
    for place in places:
        commands.store(place)
    for command in (["info"], ["verify"], ["score", "--checkpoints", "all"],
                    ["query", "--target-row", 1, "--top", 3],
                    ["gc", "--keep-generations", 1, "--dry-run"],
                    ["gc", "--keep-generations", 1], ["info"], ["verify"]):  # fmt: skip
        name, *options = command
        answers = [commands(name, place, *options, "--json") for place in places]
        assert commands.without_ids(answers[0]) == commands.without_ids(answers[1]), command
    for number, place in enumerate(places):
        commands("select", place, "-k", 5, "-o", tmp_path / f"{number}.jsonl")
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes() != b""


def test_what_is_damaged_and_committed_is_repaired_where_it_lies(
    commands: Any, in_service: Any
) -> None:
    """Not through a service."""
    service = in_service.service
    commands.store(service.address)
    in_service.change("generations/train/1/row_hash/c/0/0", b"")
    with pytest.raises(BadInput, match="damaged is repaired where the store lies"):
        repair_store(service.address)
    service.stop()
    assert repair_store(service.folder).left == ()
    assert verify_store(service.folder).ok
    service.start()
    assert verify_store(service.address).ok


def test_commands_that_change_a_store_change_a_bucket(commands: Any, bucket: str) -> None:
    commands.store(bucket)
    commands("gc", bucket, "--keep-generations", 1, "--json")
    assert [each.name for each in open_store(bucket).generations()] == ["train/2", "target/dev/2"]
    commands("forget", bucket, "--row", 3, "--yes", "--json")
    assert np.flatnonzero(open_store(bucket).generation("train/2").status == 5).tolist() == [3]
    objects = ObjectFiles(location(bucket)).bucket  # type: ignore[arg-type]
    objects.delete(["generations/train/2.2/units/0.json", "zarr.json"])
    with pytest.raises(DamagedData):
        commands("info", bucket)
    repair_told(location(bucket), dry_run=False, as_json=True)
    assert verify_store(bucket).ok


def test_a_store_of_the_first_schema_is_migrated_in_a_bucket(
    commands: Any, bucket: str, tmp_path: Path
) -> None:
    with tarfile.open(KEPT / "schema_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    objects = ObjectFiles(location(bucket)).bucket  # type: ignore[arg-type]
    for file in (tmp_path / "store").rglob("*"):
        if file.is_file():
            objects.put(file.relative_to(tmp_path / "store").as_posix(), file.read_bytes())
    assert open_store(bucket).schema_version == 1
    before = commands("score", bucket, "--json")["scores"]
    commands("migrate", bucket, "--json")
    assert open_store(bucket).schema_version == max(NEEDS)
    assert commands("score", bucket, "--json")["scores"] == before


@pytest.mark.parametrize("command", ["score", "select", "audit"])
def test_what_a_command_writes_is_a_file_of_this_machine(
    commands: Any, command: str, bucket: str
) -> None:
    """Told before a store is opened: there is none at this place."""
    options = ["-k", 1] if command == "select" else []
    with pytest.raises(BadInput, match=r"'s3://a-bucket/x.parquet' is no path"):
        commands(command, bucket, *options, "-o", "s3://a-bucket/x.parquet")
