"""Chosen rows as data sets: each in its own format, whole or not at all."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.errors import BadInput, StoreIOError
from gradstore.format.records import LOADED_FROM, RowSet, row_hash
from gradstore.format.text_table import Text
from gradstore.scoring.as_dataset import (
    RANK,
    SCORE,
    check_folder,
    training_keys,
    write_dataset,
)
from gradstore.store.texts import RowTexts
from gradstore.store.writer import StoreWriter

SETS = ("plain", "org/odd [name]")
FORMATS = {"plain": {"formatting": "alpaca", "columns": {"prompt": "q", "response": "a"}},
           SETS[1]: {"formatting": "sharegpt", "columns": {"messages": "chat"}}}  # fmt: skip
ROWS = 6
SCORES = np.array([0.5, 0.4, 0.3, 0.2, 0.1, 0.0])


def original(i: int) -> dict[str, Any]:
    if i % 2:
        return {"chat": [{"from": "human", "value": f"<b> {i}\x00"}], "note": None}
    return {"q": f"question {i}", "a": "ä", "n": i}


def texts_of(kit: Any, path: Path, originals: list[str | None], known: bool = True) -> RowTexts:
    sources = [(SETS[i % 2], i) for i in range(ROWS)] if known else None
    rows = RowSet.from_hashes([row_hash([i], [i]) for i in range(ROWS)], sources)
    with StoreWriter(path, provenance=kit.provenance) as writer:
        given = [Text("p", "r", 1, one) for one in originals]
        writer.keep_texts(rows, given, FORMATS)
        generation = writer.begin(kit.record(), rows, dim=4)
        kit.fill(generation, kit.features(ROWS))
        generation.commit()
        found = writer.store.texts(writer.store.generation("train/1"))
    assert found is not None
    return found


def test_rows_go_to_files_of_their_own_sets_with_score_and_rank(kit: Any, tmp_path: Path) -> None:
    from datasets import load_from_disk

    texts = texts_of(kit, tmp_path / "s", [json.dumps(original(i)) for i in range(ROWS)])
    folder = tmp_path / "deep" / "out"
    names = write_dataset(folder, np.array([0, 3, 2, 4]), SCORES, texts)
    assert names == list(SETS)
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["plain"] == {"file_name": "plain.jsonl", **FORMATS["plain"]}
    assert info[SETS[1]]["file_name"] == "org%2Fodd%20%5Bname%5D.jsonl"
    for name, chosen in ((SETS[0], [(0, 1), (2, 3), (4, 4)]), (SETS[1], [(3, 2)])):
        lines = (folder / info[name]["file_name"]).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [
            {**original(row), SCORE: SCORES[row], RANK: rank} for row, rank in chosen
        ]
    loaded = load_from_disk(folder)
    assert loaded["plain"]["q"][:] == ["question 0", "question 2", "question 4"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["out"]


@pytest.mark.parametrize(
    ("originals", "known", "reason"),
    [
        ([None] * ROWS, True, "its own format"),
        (["{}"] * ROWS, False, "its file is unknown"),
        ([f'{{"{SCORE}": 1}}'] * ROWS, True, "has a column 'dataflex_score' already"),
    ],
)
def test_a_row_that_cannot_be_written_is_named_and_nothing_is_left(
    kit: Any, tmp_path: Path, originals: list[str | None], known: bool, reason: str
) -> None:
    texts = texts_of(kit, tmp_path / "s", originals, known)
    with pytest.raises(BadInput, match=reason):
        write_dataset(tmp_path / "out", np.array([2]), SCORES, texts)
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_in_use_is_refused_and_one_that_cannot_be_written_told(
    kit: Any, tmp_path: Path
) -> None:
    texts = texts_of(kit, tmp_path / "s", [json.dumps(original(i)) for i in range(ROWS)])
    with pytest.raises(BadInput, match="not empty"):
        write_dataset(tmp_path / "s", np.array([0]), SCORES, texts)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreIOError, match="choose a folder"):
        write_dataset(tmp_path / "file" / "out", np.array([0]), SCORES, texts)
    with pytest.raises(BadInput, match="store_text: true"):
        write_dataset(tmp_path / "out", np.array([0]), SCORES, None)


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_a_folder_that_has_no_name_of_its_own_is_refused(name: str) -> None:
    with pytest.raises(BadInput, match="name a new folder"):
        check_folder(Path(name))


def written(kit: Any, tmp_path: Path, originals: list[Any], name: str = "plain") -> Path:
    """The folder of rows that all are of one data set."""
    rows = RowSet.from_hashes([row_hash([i], [i]) for i in range(len(originals))],
                              [(name, i) for i in range(len(originals))])  # fmt: skip
    with StoreWriter(tmp_path / "s", provenance=kit.provenance) as writer:
        given = [Text("p", "r", 1, json.dumps(one)) for one in originals]
        writer.keep_texts(rows, given, {name: FORMATS["plain"]})
        generation = writer.begin(kit.record(), rows, dim=4)
        kit.fill(generation, kit.features(len(originals)))
        generation.commit()
        texts = writer.store.texts(writer.store.generation("train/1"))
    assert texts is not None
    order = np.arange(len(originals))
    write_dataset(tmp_path / "out", order, np.zeros(len(originals)), texts)
    return tmp_path / "out"


def test_a_column_that_the_first_row_does_not_have_is_kept(kit: Any, tmp_path: Path) -> None:
    from datasets import load_from_disk

    split = load_from_disk(written(kit, tmp_path, [{"q": "a"}, {"q": "b", "note": "c"}]))["plain"]
    assert split["note"][:] == [None, "c"]


@pytest.mark.parametrize("values", [[1, "s"], [2**70, 1]])
def test_rows_that_are_no_table_are_told_by_their_data_set(
    values: list[Any], kit: Any, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match="data set 'plain' do not go into one table"):
        written(kit, tmp_path, [{"q": value} for value in values])
    assert not (tmp_path / "out").exists()


def test_a_data_set_may_be_called_as_a_file_of_the_folder(kit: Any, tmp_path: Path) -> None:
    from datasets import load_from_disk

    folder = written(kit, tmp_path, [{"q": "a"}], "dataset_info.json")
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["dataset_info.json"]["file_name"] == "dataset_info.json.jsonl"
    assert load_from_disk(folder)["dataset_info.json_"]["q"][:] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ({"media_dir": "/pictures", "dataset_dir": "/data"}, "/pictures"),
        ({"dataset_dir": "/data"}, "/data"),
        ({}, "FOLDER_OF_THE_PICTURES"),
    ],
)
def test_rows_with_pictures_are_told_with_the_folder_that_those_lie_in(
    arguments: Any, place: str, kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {"columns": {"prompt": "q", "response": "a", "images": "pictures"}}
    monkeypatch.setitem(FORMATS, SETS[0], shown)
    texts = texts_of(kit, tmp_path / "s", [json.dumps(original(i)) for i in range(ROWS)])
    record = replace(kit.record(), libraries={LOADED_FROM: {"arguments": arguments}})
    told = training_keys(Path("out"), SETS, texts, record)
    assert told == f"dataset_dir=out dataset={','.join(SETS)} media_dir={place}"
    plain = training_keys(Path("out"), SETS[1:], texts, record)
    assert plain == f"dataset_dir=out dataset={SETS[1]}"
