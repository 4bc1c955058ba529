"""Every command takes s3://bucket/prefix, and says of a bucket what it says of a folder."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.cli.care import repair_told
from gradstore.errors import BadInput, DamagedData
from gradstore.format.layout import NEEDS
from gradstore.format.text_table import Text
from gradstore.storage.location import location
from gradstore.storage.objects import ObjectFiles
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

KEPT = Path(__file__).parents[1] / "store" / "kept"


def told(*arguments: object) -> Any:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return json.loads(found.stdout) if "--json" in arguments else found.stdout


def build(kit: Any, place: str | Path) -> None:
    with kit.writer(place) as writer:
        writer.keep_texts(kit.rows(24), [Text(f"p {i}", f"r {i}", 3) for i in range(24)])
        for name, n in (("train/1", 24), ("target/dev/1", 8), ("train/2", 24), ("target/dev/2", 8)):
            kit.add(writer, name, n)


def without_ids(answer: Any) -> Any:
    """An answer without what differs between any two stores."""
    if isinstance(answer, dict):
        drop = ("store_uuid", "head", "commit", "path", "store")
        return {k: without_ids(v) for k, v in answer.items() if k not in drop}
    if isinstance(answer, list):  # in a bucket there is no empty folder that could be removed
        return [without_ids(each) for each in answer if "staging" not in str(each)]
    return answer


def test_commands_answer_of_a_bucket_as_of_a_folder(kit: Any, bucket: str, tmp_path: Path) -> None:
    build(kit, bucket)
    build(kit, tmp_path / "s")
    for command in (["info"], ["verify"], ["score", "--checkpoints", "all"],
                    ["query", "--target-row", 1, "--top", 3],
                    ["gc", "--keep-generations", 1, "--dry-run"]):  # fmt: skip
        name, *options = command
        answers = [told(name, store, *options, "--json") for store in (bucket, tmp_path / "s")]
        assert without_ids(answers[0]) == without_ids(answers[1]), command
    for number, store in enumerate((bucket, tmp_path / "s")):
        told("select", store, "-k", 5, "-o", tmp_path / f"{number}.jsonl")
    assert (tmp_path / "0.jsonl").read_bytes() == (tmp_path / "1.jsonl").read_bytes()


def test_commands_that_change_a_store_change_a_bucket(kit: Any, bucket: str) -> None:
    build(kit, bucket)
    told("gc", bucket, "--keep-generations", 1, "--json")
    assert [each.name for each in open_store(bucket).generations()] == ["train/2", "target/dev/2"]
    told("forget", bucket, "--row", 3, "--yes", "--json")
    assert np.flatnonzero(open_store(bucket).generation("train/2").status == 5).tolist() == [3]
    objects = ObjectFiles(location(bucket)).bucket  # type: ignore[arg-type]
    objects.delete(["generations/train/2.2/units/0.json", "zarr.json"])
    with pytest.raises(DamagedData):
        told("info", bucket)
    repair_told(location(bucket), dry_run=False, as_json=True)
    assert verify_store(bucket).ok


def test_a_store_of_the_first_schema_is_migrated_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    with tarfile.open(KEPT / "schema_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    objects = ObjectFiles(location(bucket)).bucket  # type: ignore[arg-type]
    for file in (tmp_path / "store").rglob("*"):
        if file.is_file():
            objects.put(file.relative_to(tmp_path / "store").as_posix(), file.read_bytes())
    assert open_store(bucket).schema_version == 1
    before = told("score", bucket, "--json")["scores"]
    told("migrate", bucket, "--json")
    assert open_store(bucket).schema_version == max(NEEDS)
    assert told("score", bucket, "--json")["scores"] == before


@pytest.mark.parametrize("command", ["score", "select", "audit"])
def test_what_a_command_writes_is_a_file_of_this_machine(command: str, bucket: str) -> None:
    """Told before a store is opened: there is none at this place."""
    options = ["-k", 1] if command == "select" else []
    with pytest.raises(BadInput, match=r"'s3://a-bucket/x.parquet' is no path"):
        told(command, bucket, *options, "-o", "s3://a-bucket/x.parquet")
