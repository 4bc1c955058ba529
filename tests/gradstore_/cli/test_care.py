"""`gradstore gc`: says exactly what goes, and nothing else goes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gradstore.cli import app
from gradstore.errors import BadInput, StoreBusy
from gradstore.format.text_table import Text
from gradstore.storage.local import StoreFiles
from gradstore.store.own_units import quarantine
from gradstore.store.reader import open_store
from gradstore.store.verify import verify_store

Files = dict[str, bytes]


def told(*arguments: object) -> Any:
    found = CliRunner().invoke(app, [str(each) for each in arguments])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    return json.loads(found.stdout) if "--json" in arguments else found.stdout


def files_of(store: Path) -> Files:
    """Every file but the lock's record."""
    paths = (path for path in store.rglob("*") if path.is_file() and path.name != "writer.lock")
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def littered(kit: Any, fast_path: Path) -> Path:
    """A store with rubbish of every kind, and beside it what looks like rubbish and is none."""
    path = fast_path / "s"
    with kit.writer(path) as writer:
        for step in (1, 2, 3):
            kit.add(writer, f"train/{step}")
        kit.add(writer, "target/skill/1", n=8)
        writer.keep_texts(kit.rows(40), [Text("p", "r", 3)] * 40)
        kit.add(writer, "train/3", adapter_hash="replayed")  # supersedes train/3
        for adapter in ("first", "second"):  # the second one supersedes the first
            begun = writer.begin(kit.record("train/4", adapter_hash=adapter), kit.rows(40), dim=4)
            kit.fill(begun, kit.features(40), units=1)
        writer.begin(kit.record("target/skill/2"), kit.rows(8), dim=4)
        rows = kit.rows(5, first=90)
        writer.keep_texts(rows, [Text("unread", "r", 3)] * 5)  # no generation has these rows
    store = open_store(path)
    index = path / "index" / store.generation("train/3.2").commit_sha
    superseded = path / "index" / store.generations(superseded=True)[2].commit_sha
    for folder in (index, superseded, path / "staging" / "12345-dead"):
        folder.mkdir(parents=True)
        (folder / "7").write_bytes(b"left")
    files = StoreFiles(path)
    (path / "plans" / "stray.json").write_bytes(b"not a plan")
    quarantine(files, "plans/stray.json")
    return path


def test_a_dry_run_changes_nothing_and_names_exactly_what_goes_then(littered: Path) -> None:
    before = files_of(littered)
    times = {path: path.stat().st_mtime_ns for path in littered.rglob("*")}
    plan = told("gc", littered, "--keep-generations", 2, "--dry-run", "--json")
    assert files_of(littered) == before
    assert {path: path.stat().st_mtime_ns for path in littered.rglob("*")} == times
    done = told("gc", littered, "--keep-generations", 2, "--json")
    assert (plan["removed"], done["removed"]) == (False, True)
    assert plan["removals"] == done["removals"]
    after = files_of(littered)
    gone = {path: data for path, data in before.items() if path not in after}
    assert after.keys() - before.keys() == {"commits/8.json"}  # the retiring one
    named = [each["path"] for each in plan["removals"]]
    assert gone.keys() == {p for p in before if any(f"{p}/".startswith(f"{n}/") for n in named)}
    assert plan["bytes"] == sum(map(len, gone.values()))
    assert {each["why"] for each in plan["removals"]} == {
        "superseded", "old", "abandoned", "unread text", "staging", "quarantine"}  # fmt: skip
    assert plan["kept_unfinished"] == ["target/skill/2", "train/4.2"]
    assert [g.name for g in open_store(littered).generations()] == [
        "train/2", "target/skill/1", "train/3.2"]  # fmt: skip
    assert verify_store(littered).ok
    again = told("gc", littered, "--keep-generations", 2, "--json")
    assert not [each for each in again["removals"] if each["bytes"]]


def test_gc_leaves_a_living_writers_scratch_and_waits_for_no_one(littered: Path) -> None:
    files = StoreFiles(littered)
    staged = files.stage([b"being written"])
    listed = [each["path"] for each in told("gc", littered, "--dry-run", "--json")["removals"]]
    assert os.path.dirname(staged) not in listed
    told("gc", littered)
    assert (littered / staged).read_bytes() == b"being written"
    files.close()
    assert "staging" in told("gc", littered, "--dry-run")


def test_gc_refuses_a_store_in_use_no_store_and_a_number_that_keeps_nothing(
    kit: Any, littered: Path, tmp_path: Path
) -> None:
    with kit.writer(littered), pytest.raises(StoreBusy):
        told("gc", littered)
    with pytest.raises(BadInput, match="keep at least 1"):
        told("gc", littered, "--keep-generations", 0)
    with pytest.raises(BadInput, match="no store at"):
        told("gc", tmp_path / "none")
    assert not (tmp_path / "none").exists()
