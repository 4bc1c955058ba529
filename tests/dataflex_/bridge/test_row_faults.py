"""Rows that LlamaFactory drops, or chokes on, are told: which, why, how many."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.bridge.origins import _SourceCarrier
from dataflex.data.rows import SOURCE_ROW, SOURCE_SET
from gradstore.errors import BadInput

DataDir = Callable[..., Path]


def row(output: Any, **more: Any) -> dict[str, Any]:
    return {"instruction": "copy: a", "input": "", "output": output, **more}


GOOD = [row("a")] * 3
SHAREGPT = {"file_name": "chat.json", "formatting": "sharegpt",
            "columns": {"messages": "talk"}}  # fmt: skip


def talk(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"talk": [{"from": role, "value": text} for role, text in turns]}


def test_dropped_rows_are_one_line_with_reasons_and_counts(
    load_rows: Any, dataset_dir: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dataflex"):
        data = load_rows(dataset_dir(rows=[row(None), *GOOD * 4, row(None)]), val_size=3)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("dataflex")]
    assert ours == ["data set 'rows': 2 of 14 rows are not used: 2 with no response (row 0, 13)"]
    assert data.dropped == {"no_response": 2}
    assert len(data.train) < 12, "rows held out are not dropped"


def test_a_dropped_row_is_not_told_by_llamafactory_too_unless_it_says_all(
    load_rows: Any, dataset_dir: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    folder = dataset_dir(rows=[row(None), *GOOD])
    said = {}
    for level in (logging.WARNING, logging.INFO):
        caplog.clear()
        with caplog.at_level(level, "llamafactory"):
            load_rows(folder)
        said[level] = [r for r in caplog.records if "Dropped invalid" in r.getMessage()]
    assert not said[logging.WARNING]
    assert said[logging.INFO]


def test_sound_rows_that_interleaving_leaves_out_and_sets_named_twice_are_not_miscounted(
    load_rows: Any, dataset_dir: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    folder = dataset_dir(rows=GOOD * 5, few=[row(None), *GOOD])
    with caplog.at_level(logging.WARNING, "dataflex"):
        data = load_rows(
            folder, dataset="rows,few", mix_strategy="interleave_under", interleave_probs="0.5,0.5"
        )
        assert data.dropped == {"no_response": 1}
        assert len(data.train) < 18
        caplog.clear()
        load_rows(folder, dataset="few", ours={"target_dataset": ("few",)})
        assert caplog.text.count("1 of 4 rows are not used") == 1, "told as training data"
        assert load_rows(folder, dataset="few,few").dropped == {"no_response": 1}
    assert "another fault" not in caplog.text


def test_broken_conversations_are_told_by_what_is_wrong_with_them(
    load_rows: Any, dataset_dir: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    good = talk(("human", "copy: a"), ("gpt", "a"))
    rows = [good, talk(("gpt", "a"), ("human", "b")), good, talk(("human", "a")), {"talk": []}]
    folder = dataset_dir({"chat": SHAREGPT}, chat=rows)
    with caplog.at_level(logging.WARNING, "dataflex"):
        data = load_rows(folder, dataset="chat")
    assert data.dropped == {"roles": 2, "no_response": 1}
    assert "3 of 5 rows are not used: 2 with turns out of order" in caplog.text


@pytest.mark.parametrize("workers", [None, 2])
def test_rows_that_packing_leaves_out_are_told_with_their_reasons(
    workers: int | None, load_rows: Any, dataset_dir: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*GOOD, row(None), *GOOD, row(None)]
    folder = dataset_dir(rows=rows, few=[row(None), *GOOD[:2]])
    asked = {"dataset": "rows,few", "packing": True, "preprocessing_batch_size": 5,
             "preprocessing_num_workers": workers}  # fmt: skip
    with caplog.at_level(logging.WARNING):
        data = load_rows(folder, **asked)
    assert data.dropped == {"no_response": 3}
    assert "2 of 8 rows are not used: 2 with no response (row 3, 7)" in caplog.text
    assert "1 of 3 rows are not used: 1 with no response (row 0)" in caplog.text
    assert len(data.train) < len(rows), "packed"
    assert not [name for name in data.train.dataset.column_names if name.startswith("_source")]
    assert data.train.sources is None
    assert sorted(data.train.packed) == sorted(
        [("rows", i) for i in range(len(rows)) if i not in (3, 7)] + [("few", 1), ("few", 2)]
    )


@pytest.mark.parametrize("packing", [False, True])
def test_rows_that_are_not_in_a_tokenized_path_are_told_when_it_is_made_and_when_it_is_read(
    packing: bool, load_rows: Any, dataset_dir: DataDir, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = dataset_dir(rows=[*GOOD, row(None), row(None)], few=GOOD)
    asked = {"dataset": "rows,few", "packing": packing, "tokenized_path": str(tmp_path / "kept")}
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "dataflex"):
            data = load_rows(folder, **asked)
        assert data.dropped == {"no_response": 2}
        assert "'rows': 2 of 5 rows are not used: 2 with no response (row 3, 4)" in caplog.text
        assert caplog.text.count("not used") == 1


def test_rows_too_long_to_be_packed_are_not_among_the_packed() -> None:
    """LlamaFactory cuts text to cutoff_len; pictures can make a row longer."""

    class Packing:
        data_args = SimpleNamespace(packing=True, cutoff_len=4)

        def _encode_data_example(self, length: int) -> tuple[list[int], list[int]]:
            return [1] * length, [1] * length

        def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = zip(examples["_response"], examples["length"], strict=True)
            lengths = [len(self._encode_data_example(n)[0]) for turn, n in rows if turn]
            return {"input_ids": [[1] * 5] * sum(n <= 4 for n in lengths)}

    turn = [{"role": "user", "content": "a"}]
    made = _SourceCarrier(Packing()).preprocess_dataset(
        {"_prompt": [turn] * 4, "_response": [turn, [], turn, turn], "length": [4, 4, 5, 3],
         SOURCE_ROW: [7, 8, 9, 10], SOURCE_SET: ["a", "a", "b", "b"]}
    )  # fmt: skip
    assert made[SOURCE_ROW] == [[7, 10], []]
    assert made[SOURCE_SET] == [["a", "b"], []]


def test_texts_that_packing_cuts_into_blocks_are_all_used(
    load_rows: Any, dataset_dir: DataDir, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dataflex"):
        data = load_rows(dataset_dir(rows=[row("a")] * 60), packing=True, stage="pt")
    assert data.dropped == {}
    assert "not used" not in caplog.text


def test_packed_rows_are_told_where_none_is_left(load_rows: Any, dataset_dir: DataDir) -> None:
    with pytest.raises(BadInput, match="3 of 3 rows are not used: 3 with no response"):
        load_rows(dataset_dir(rows=[row(None)] * 3), packing=True)


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        ([1, 2, 3], r"3 with a response that is not text \(row 0, 1, 2\)"),
        ([{"a": "b"}] * 5, r"5 with a response that is not text \(row 0, 1, 2, ...\)"),
        ([None, None], "2 with no response"),
    ],
    ids=["numbers", "objects", "nulls"],
)
@pytest.mark.parametrize("role", ["dataset", "target"])
def test_where_every_row_is_dropped_the_reason_is_told(
    role: str, outputs: list[Any], says: str, load_rows: Any, dataset_dir: DataDir
) -> None:
    folder = dataset_dir(rows=GOOD, odd=[row(output) for output in outputs])
    asked = {"dataset": "odd"} if role == "dataset" else {"ours": {"target_dataset": ("odd",)}}
    with pytest.raises(BadInput, match=says) as refused:
        load_rows(folder, **asked)
    assert "'odd'" in str(refused.value)
    step = "give each row a response" if outputs[0] is None else "write each response as text"
    assert f"To mend it, {step}" in str(refused.value)
    assert "README" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([{"instruction": "a"}] * 2, "a row has no 'input': row 0, with the columns instruction"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": 3}]', "row 1 of.*'instruction'"),
        ('{"a": 1}\n{"a": \n', "line 2 of.*not JSON"),
        ([row("a", history=[["only one"]])] * 2, "row 0 is not in the format 'alpaca'"),
    ],
    ids=["no column", "two types", "broken", "history"],
)
def test_the_first_row_that_cannot_be_loaded_is_named(
    content: Any, says: str, load_rows: Any, dataset_dir: DataDir
) -> None:
    entry = {"file_name": "odd.json", "columns": {"prompt": "instruction", "query": "input",
             "response": "output", "history": "history"}}  # fmt: skip
    has_history = isinstance(content, list) and "history" in content[0]
    folder = dataset_dir({"odd": entry} if has_history else {}, rows=GOOD, odd=content)
    with pytest.raises(BadInput, match=says) as refused:
        load_rows(folder, dataset="rows,odd")
    assert "data set 'odd'" in str(refused.value), "of several sets the one at fault is named"


def test_a_column_with_a_name_of_ours_is_refused_by_name(
    load_rows: Any, dataset_dir: DataDir
) -> None:
    folder = dataset_dir(rows=[row("a", _source_row=7, _source_set="x")] * 3)
    with pytest.raises(BadInput, match=r"data set 'rows'.*column '_source_row'.*rename"):
        load_rows(folder)


def test_columns_with_other_names_of_ours_or_of_llamafactorys_work(
    load_rows: Any, dataset_dir: DataDir
) -> None:
    odd = {"_source_set": "x", "_prompt": "p", "_response": "r", "input_ids": 3, "labels": "l",
           "domain_id": 1, "attention_mask": "m", "images_": None}  # fmt: skip
    plain, data = (
        load_rows(dataset_dir(rows=GOOD)),
        load_rows(dataset_dir(rows=[row("a", **odd)] * 3)),
    )
    assert data.train.dataset.to_list() == plain.train.dataset.to_list()
    assert data.train.sources == (("rows", 0), ("rows", 1), ("rows", 2))
    assert data.raw is not None
    assert data.raw.numbers("domain_id").tolist() == [1, 1, 1]
    with pytest.raises(BadInput, match=r"its columns are .*_source_set"):
        data.raw.numbers("score")
