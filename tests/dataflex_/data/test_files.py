"""What is wrong with a data file, an entry or a row is told with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dataflex.data.files import data_files, entry_faults, file_faults, unreadable

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
ROWS = [{"instruction": "a", "output": "b"}]
TEXT = json.dumps(ROWS)


def in_file(folder: Path, name: str, content: bytes) -> list[str]:
    (folder / name).write_bytes(content)
    return file_faults(folder, {"file_name": name})


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", LFS, "git-LFS pointer, not the data: run `git lfs pull`"),
        ("a.parquet", LFS, "git-LFS pointer"),
        ("a.json", TEXT.encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("a.json", TEXT.encode("utf-8-sig"), "byte order mark"),
        ("a.json", b" []\n", "is empty"),
        ("a.jsonl", b"", "is empty"),
    ],
)
def test_a_file_that_is_no_data_is_told_before_it_is_read(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (fault,) = in_file(tmp_path, name, content)
    assert says in fault
    assert name in fault


def test_sound_files_have_no_fault(tmp_path: Path) -> None:
    assert in_file(tmp_path, "a.json", TEXT.encode()) == []
    assert in_file(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n') == [], "datasets takes it"
    assert unreadable(tmp_path / "a.json") is unreadable(tmp_path / "a.jsonl") is None
    assert file_faults(tmp_path, {"file_name": "hf://datasets/a"}) == []
    assert file_faults(tmp_path, {"hf_hub_url": "a/b"}) == []


def test_a_folder_holds_files_of_one_kind_alone(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    entry = {"file_name": "many"}
    assert "is empty" in file_faults(tmp_path, entry)[0]
    for name in ("a.json", "b.json"):
        (folder / name).write_text(TEXT)
    assert file_faults(tmp_path, entry) == []
    assert [path.name for path in data_files(tmp_path, entry)] == ["a.json", "b.json"]
    (folder / ".DS_Store").write_bytes(b"\0")
    (fault,) = file_faults(tmp_path, entry)
    assert "holds '.DS_Store' beside files of data" in fault
    assert "remove it" in fault


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": "x"}\n\n{"a": "y"\n', "line 3 of"),
        ("a.json", b'[{"a": "x"},\n{"a": "y"]', "line 2 column"),
        ("a.json", '[\n{"a": "é"}]'.encode("latin-1"), r"line 2 of.*not UTF-8 \(byte 0xe9\)"),
        ("a.jsonl", b'{"a": "x"}\n{"a": 3}\n', r"line 2 of.*'a' is a number \(3\).*text"),
        ("a.json", b'[{"a": null}, {"a": "x"}, {"a": {"b": 1}}]', "row 2 of.*'a' is an object"),
        ("a.json", b"[1, 2]", "row 0 of.*is a number, not an object"),
        ("a.json", b"[" * 5000, "not JSON"),
    ],
)
def test_the_first_row_that_cannot_be_read_is_named(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    import re

    (tmp_path / name).write_bytes(content)
    found = unreadable(tmp_path / name)
    assert found is not None
    assert re.search(says, found), found


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colums": {}}, "'colums' (did you mean 'columns'?)"),
        ({"columns": {"promt": "a"}}, "'columns.promt' (did you mean 'columns.prompt'?)"),
        ({"tags": {"role_tags": "a"}}, "did you mean 'tags.role_tag'"),
        ({"columns": ["a"]}, "columns is ['a']"),
        ({"num_samples": "10"}, "num_samples is '10'"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"formatting": "shargpt"}, "formatting is 'shargpt'"),
    ],
)
def test_an_entry_that_looks_misspelt_is_told(changes: dict[str, Any], says: str) -> None:
    (fault,) = entry_faults({"file_name": "a.json", **changes})
    assert says in fault


def test_an_entry_may_have_notes_of_ones_own_and_a_script_is_refused() -> None:
    assert entry_faults({"file_name": "a.json", "license": "mit", "comment": "x"}) == []
    (fault,) = entry_faults({"script_url": "belle"})
    assert "runs no scripts" in fault
    assert entry_faults({"script_url": "belle", "hf_hub_url": "a/b"}) == []
