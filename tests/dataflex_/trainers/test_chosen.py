"""Chosen rows to be read: one line each, in the strategy's order, with whatever is known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from dataflex.data.rows import SOURCE_ROW, Rows, RunData
from dataflex.run.log import RunLog
from dataflex.run.spread import spread_of
from dataflex.trainers import chosen as module
from dataflex.trainers.chosen import ChosenRows

N = 6
SCORES = np.array([0.5, np.nan, 0.25, 0.75, 0.0, 1.0])


class Texts:
    """Stands for `RunData.texts`; says how often it was asked, and for how many rows."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def read(self, rows: Any) -> list[Any]:
        self.asked.append(len(rows))
        return [SimpleNamespace(prompt=f"<b>{row}?", response="\ud800\u2028\n") for row in rows]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    found = Texts()
    monkeypatch.setattr(RunData, "texts", lambda self, rows: found)
    return found


def data(*, known: bool = True) -> RunData:
    dataset = Dataset.from_dict({"input_ids": [[1, i] for i in range(N)]})
    files = {"mine": Dataset.from_dict({SOURCE_ROW: list(range(20)), "kind": list("ab") * 10})}
    sources = tuple(("mine", 10 + row) for row in range(N)) if known else None
    nothing: Any = None
    found = RunData(Rows("train", dataset, sources), (), nothing, "default", nothing, "sft")
    return replace(found, files=files) if known else found


def write(folder: Path, rows: RunData, of_rows: Any, *, text: bool = True, **manifest: Any) -> None:
    job: Any = SimpleNamespace(
        data=rows, config=SimpleNamespace(dataflex=SimpleNamespace(store_text=text))
    )
    indices = np.array([5, 1, 3])
    kept = None if of_rows is None else of_rows[indices]
    ChosenRows(job, RunLog(folder)).write(4, indices, kept, manifest)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    text = (folder / "dataflex" / "selections" / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n")[:-1]]


def test_a_line_tells_rank_row_score_source_and_text(texts: Texts, tmp_path: Path) -> None:
    spread = spread_of(SCORES, np.ones(N, dtype=bool), np.array([5, 3]))
    write(tmp_path, data(), SCORES, all_scores=spread)
    said = {"prompt": "<b>5?", "response": "\ud800\u2028\n"}
    found = lines(tmp_path, "step_4")
    assert found[0] == {"rank": 1, "row": 5, "score": 1.0, "source": ["mine", 15], **said}
    assert [(line["rank"], line["row"], line["score"]) for line in found] == [
        (1, 5, 1.0), (2, 1, None), (3, 3, 0.75)
    ]  # fmt: skip
    lowest = lines(tmp_path, "lowest_4")
    assert [(line["row"], line["score"]) for line in lowest] == [
        (4, 0.0), (2, 0.25), (0, 0.5), (3, 0.75), (5, 1.0)
    ]  # fmt: skip
    content = json.loads((tmp_path / "dataflex/selections/step_4.json").read_text())
    assert content["manifest"]["kinds"] == {
        "column": "kind", "chosen": {"b": 3}, "all": {"a": 3, "b": 3}
    }  # fmt: skip
    assert content["manifest"]["all_scores"]["cut"] == 0.75
    assert not list(tmp_path.rglob("*.partial"))


def test_what_is_not_known_is_null(texts: Texts, tmp_path: Path) -> None:
    write(tmp_path, data(known=False), None, text=False)
    assert lines(tmp_path, "step_4") == [
        {"rank": i + 1, "row": row, "score": None, "source": None, "prompt": None, "response": None}
        for i, row in enumerate((5, 1, 3))
    ]
    assert texts.asked == [], "store_text: false keeps no text anywhere"
    assert [path.name for path in (tmp_path / "dataflex/selections").glob("lowest*")] == []
    content = json.loads((tmp_path / "dataflex/selections/step_4.json").read_text())
    assert content["manifest"] == {}


def test_texts_are_read_many_at_once(
    texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    write(tmp_path, data(), None)
    assert texts.asked == [2, 1]
    assert [line["prompt"] for line in lines(tmp_path, "step_4")] == ["<b>5?", "<b>1?", "<b>3?"]


@pytest.mark.parametrize("own", [[1, 2], "text", {"counts": 3}])
def test_a_strategys_own_manifest_may_hold_anything(own: Any, texts: Texts, tmp_path: Path) -> None:
    write(tmp_path, data(), None, all_scores=own)
    assert len(lines(tmp_path, "step_4")) == 3
    assert not list(tmp_path.rglob("lowest*"))
