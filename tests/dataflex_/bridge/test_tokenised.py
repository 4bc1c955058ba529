"""`tokenized_path` without a mixture: LlamaFactory's own folder, with a record of its origin."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.bridge.tokenised import FORMAT, MANIFEST
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch

ROWS = [{"instruction": f"sort: {i} 1", "input": "", "output": f"1 {i}"} for i in range(2, 8)]
DataDir = Callable[..., Path]


def ids(data: Any) -> list[list[int]]:
    return list(data.train.dataset["input_ids"])


def test_rows_are_read_again_where_nothing_changed(
    load_rows: Any, dataset_dir: DataDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, path = dataset_dir(rows=ROWS), tmp_path / "deep" / "tokenised"
    first = load_rows(folder, tokenized_path=str(path))
    assert json.loads((path / MANIFEST).read_text())["format"] == FORMAT
    assert [p.name for p in path.parent.iterdir()] == ["tokenised"], "nothing half written is left"
    again = load_rows(folder, tokenized_path=str(path))
    assert ids(again) == ids(first)
    assert len(ids(first)) == len(ROWS)
    (folder / "rows.json").unlink()
    assert ids(load_rows(folder, tokenized_path=str(path))) == ids(first), "its rows are enough"
    assert ids(load_rows(folder, tokenized_path=str(path), dataset=None)) == ids(first)
    assert "no record" not in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "alpaca"}, "template 'default', now 'alpaca'"),
        ({"cutoff_len": 32}, "cutoff_len 64, now 32"),
        ({"train_on_prompt": True}, "train_on_prompt False, now True"),
        ({"stage": "pt"}, "stage 'sft', now 'pt'"),
        ({"max_samples": 3}, "max_samples None, now 3"),
        ({"default_system": "be brief"}, "default_system None, now 'be brief'"),
        ({"dataset": "rows,more"}, "datasets"),
        ({"mix_strategy": "interleave_under"}, "mix_strategy 'concat'"),
    ],
)
def test_rows_made_with_other_settings_are_refused(
    changes: dict[str, Any], says: str, load_rows: Any, dataset_dir: DataDir, tmp_path: Path
) -> None:
    """Target rows would be tokenised in the new way, training rows in the old."""
    folder, path = dataset_dir(rows=ROWS, more=ROWS), str(tmp_path / "tokenised")
    load_rows(folder, tokenized_path=path)
    with pytest.raises(ProvenanceMismatch, match=says) as refused:
        load_rows(folder, tokenized_path=path, **changes)
    assert "Restore the values, or name another folder" in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "entries"),
    [
        (ROWS[1:], {}),
        (ROWS, {"rows": {"file_name": "rows.json", "columns": {"prompt": "output"}}}),
    ],
    ids=["a file", "its entry"],
)
def test_rows_of_other_files_are_refused(
    rows: Any, entries: dict[str, Any], load_rows: Any, dataset_dir: DataDir, tmp_path: Path
) -> None:
    path = str(tmp_path / "tokenised")
    load_rows(dataset_dir(rows=ROWS), tokenized_path=path)
    with pytest.raises(ProvenanceMismatch, match=r"data set 'rows': (rows.json|its entry)"):
        load_rows(dataset_dir(entries, rows=rows), tokenized_path=path)


def test_what_differs_is_told_by_its_key_and_no_whole_hash(
    load_rows: Any, dataset_dir: DataDir, tmp_path: Path
) -> None:
    path = tmp_path / "tokenised"
    load_rows(dataset_dir(rows=ROWS), tokenized_path=str(path))
    held = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**held, "tokenizer": "c0ffee" + 58 * "0"}))
    folder = dataset_dir({"rows": {"file_name": "rows.json", "license": "mit"}}, rows=ROWS)
    with pytest.raises(
        ProvenanceMismatch, match=r"tokenizer c0ffee00\.\.\., now [0-9a-f]{8}\."
    ) as no:
        load_rows(folder, tokenized_path=str(path))
    assert "its entry in dataset_info.json has other values of license" in str(no.value)
    assert not re.search("[0-9a-f]{17}", str(no.value))


@pytest.mark.parametrize("note", [[], {"rows": 3}, {"rows": {"of": 3, "rows": ["other"]}}])
def test_a_damaged_note_of_dropped_rows_is_told(
    note: Any, load_rows: Any, dataset_dir: DataDir, tmp_path: Path
) -> None:
    folder, path = dataset_dir(rows=ROWS), tmp_path / "tokenised"
    load_rows(folder, tokenized_path=str(path))
    held = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**held, "dropped": note}))
    with pytest.raises(DamagedData, match="'dropped' in"):
        load_rows(folder, tokenized_path=str(path))
    del held["dropped"]  # as releases before 0.2.0 wrote it
    (path / MANIFEST).write_text(json.dumps(held))
    assert load_rows(folder, tokenized_path=str(path)).dropped == {}


def test_a_folder_without_a_record_is_used_with_a_warning(
    load_rows: Any, dataset_dir: DataDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Made by llamafactory-cli, or by a run of before."""
    folder, path = dataset_dir(rows=ROWS), tmp_path / "tokenised"
    first = load_rows(folder, tokenized_path=str(path))
    (path / MANIFEST).unlink()
    with caplog.at_level(logging.WARNING):
        assert ids(load_rows(folder, tokenized_path=str(path))) == ids(first)
    assert "no record of what its rows were made of" in caplog.text
    assert "remove the folder" in caplog.text
    (path / MANIFEST).write_text("{")
    with pytest.raises(ProvenanceMismatch, match="no readable"):
        load_rows(folder, tokenized_path=str(path))


def test_a_folder_of_something_else_is_refused_and_nobody_is_told_to_remove_it(
    load_rows: Any, dataset_dir: DataDir
) -> None:
    folder = dataset_dir(rows=ROWS)
    with pytest.raises(BadInput, match="holds no tokenised rows") as refused:
        load_rows(folder, tokenized_path=str(folder))
    assert "emove" not in str(refused.value)


def test_a_folder_of_domains_is_no_folder_of_whole_rows(
    load_rows: Any, dataset_dir: DataDir, tmp_path: Path
) -> None:
    folder, path = dataset_dir(rows=ROWS), str(tmp_path / "tokenised")
    mixed = {"train_type": "dynamic_mix"}
    load_rows(folder, tokenized_path=path, ours=mixed)
    with pytest.raises(ProvenanceMismatch, match="layout 'by domain', now 'whole'"):
        load_rows(folder, tokenized_path=path)


def test_rows_held_out_keep_their_responses_where_evaluation_generates(
    load_rows: Any, dataset_dir: DataDir, tmp_path: Path
) -> None:
    """The folder's validation rows are prompts alone then: as targets they are made anew."""
    data = load_rows(
        dataset_dir(rows=ROWS), val_size=2, tokenized_path=str(tmp_path / "tokenised"),
        training={"predict_with_generate": True},
    )  # fmt: skip
    (target,) = data.targets
    for row in target.dataset:
        answer = [label for label in row["labels"] if label != -100]
        assert row["input_ids"][-len(answer) :] == answer


def test_a_folder_that_has_no_name_of_its_own_is_refused(
    load_rows: Any, dataset_dir: DataDir
) -> None:
    with pytest.raises(BadInput, match=r"tokenized_path '\.' cannot be made anew"):
        load_rows(dataset_dir(rows=ROWS), tokenized_path=".")
