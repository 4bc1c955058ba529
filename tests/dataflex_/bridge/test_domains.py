"""Loading source by source, with a loader that stands in for LlamaFactory's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dataflex.bridge.domains import held_out_rows, load_domains
from dataflex.bridge.tokenised import MANIFEST
from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.data.rows import Domains, Rows
from gradstore.errors import BadInput, DamagedData, ProvenanceMismatch

SIZES = {"a": 6, "b": 3, "a_eval": 2, "b_eval": 4, "none": 0}
#: First token of each set's rows.
FIRST = {name: 100 * i for i, name in enumerate(SIZES)}
MADE_WITH = {"stage": "sft", "template": "default", "tokenizer": "0123"}


class Loader:
    """Row i of a set is [first token of the set + i]; the last `val_size` rows are held out.

    Rows that are processed for generating are negative.
    """

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, data_args: Any, training_args: Any) -> dict[str, Any]:
        from datasets import Dataset

        assert data_args.tokenized_path is None
        wanted = data_args.dataset or data_args.eval_dataset
        self.asked.append(list(wanted))
        ids = [FIRST[name] + i for name in wanted for i in range(SIZES[name])]
        held = int(data_args.val_size)
        sign = -1 if training_args.predict_with_generate else 1

        def rows(values: Sequence[int]) -> Any:
            return Dataset.from_dict({"input_ids": [[value] for value in values]})

        if not data_args.dataset:
            return {"eval_dataset": rows(ids)}
        found = {"train_dataset": rows(ids[: len(ids) - held])}
        if held:
            found["eval_dataset"] = rows([sign * value for value in ids[len(ids) - held :]])
        return found


def load(
    loader: Loader | None = None, *, generate: bool = False, held_out: Sequence[str] = (),
    made_with: dict[str, str] = MADE_WITH, **data: Any,
) -> tuple[dict[str, Any], Domains]:  # fmt: skip
    usual = {"dataset": ["a", "b"], "eval_dataset": None, "val_size": 0.0, "tokenized_path": None,
             "mix_strategy": "concat", "interleave_probs": None, "eval_on_each_dataset": False,
             "cutoff_len": 64, "packing": False, "max_samples": None}  # fmt: skip
    config = RunConfig(DataFlexConfig(mixer_eval_dataset=tuple(held_out)), {}, Path("run.yaml"))
    training = SimpleNamespace(predict_with_generate=generate, should_save=True, seed=42)
    return load_domains(
        config, SimpleNamespace(**{**usual, **data}), training, loader or Loader(), Rows, made_with
    )


def ids(dataset: Any) -> list[int]:
    return [row["input_ids"][0] for row in dataset]


def test_sources_are_loaded_one_by_one_in_the_users_order() -> None:
    loader = Loader()
    module, domains = load(loader, dataset=["b", "a"])
    assert loader.asked == [["b"], ["a"]]
    assert ids(module["train_dataset"]) == [100, 101, 102, 0, 1, 2, 3, 4, 5]
    assert domains.names == ("b", "a")
    assert domains.of_row.tolist() == [0] * 3 + [1] * 6
    assert domains.sizes.tolist() == [3, 6]
    assert "eval_dataset" not in module


def test_val_size_holds_rows_of_every_source_out_of_training() -> None:
    module, domains = load(val_size=2)
    assert ids(module["train_dataset"]) == [0, 1, 2, 3, 100]
    assert ids(module["eval_dataset"]) == [4, 5, 101, 102]
    assert {name: ids(rows.dataset) for name, rows in domains.held_out.items()} == {
        "a": [4, 5],
        "b": [101, 102],
    }
    assert ids(held_out_rows(domains).dataset) == [4, 5, 101, 102]
    each, _ = load(val_size=2, eval_on_each_dataset=True)
    assert {name: ids(rows) for name, rows in each["eval_dataset"].items()} == {
        "a": [4, 5],
        "b": [101, 102],
    }


def test_held_out_rows_are_processed_for_training_even_where_evaluation_generates() -> None:
    module, domains = load(val_size=1, generate=True)
    assert ids(module["eval_dataset"]) == [-5, -102]
    assert [ids(rows.dataset) for rows in domains.held_out.values()] == [[5], [102]]


def test_held_out_sets_belong_to_the_domain_of_their_name() -> None:
    module, domains = load(held_out=("b_eval", "a_eval"), eval_dataset=["b_eval"])
    assert {name: ids(rows.dataset) for name, rows in domains.held_out.items()} == {
        "b": [300, 301, 302, 303],
        "a": [200, 201],
    }
    assert ids(module["eval_dataset"]) == [300, 301, 302, 303]
    assert len(module["train_dataset"]) == 9


def test_a_source_without_a_row_is_named() -> None:
    with pytest.raises(BadInput, match="data set 'none' has no row left after preprocessing"):
        load(dataset=["a", "none"])


# -- tokenized_path -------------------------------------------------------------------------------


def test_a_tokenised_folder_is_reused_where_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokenised"
    first, domains = load(tokenized_path=str(path), val_size=1)
    assert not list(path.parent.glob(".*")), "nothing half written is left"
    loader = Loader()
    again, same = load(loader, tokenized_path=str(path), val_size=1)
    assert loader.asked == []
    assert ids(again["train_dataset"]) == ids(first["train_dataset"]) == [0, 1, 2, 3, 4, 100, 101]
    assert ids(again["eval_dataset"]) == [5, 102]
    np.testing.assert_array_equal(same.of_row, domains.of_row)
    assert [ids(rows.dataset) for rows in same.held_out.values()] == [[5], [102]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset": ["b", "a"]}, "datasets"),
        ({"cutoff_len": 32}, "cutoff_len 64, now 32"),
        ({"packing": True}, "packing False, now True"),
        ({"max_samples": 5}, "max_samples None, now 5"),
        ({"val_size": 2.0}, "val_size"),
        ({"made_with": {**MADE_WITH, "template": "qwen"}}, "template 'default', now 'qwen'"),
        ({"made_with": {**MADE_WITH, "stage": "pt"}}, "stage 'sft', now 'pt'"),
        ({"made_with": {**MADE_WITH, "tokenizer": "4567"}}, "tokenizer"),
    ],
)
def test_rows_that_were_tokenised_otherwise_are_refused(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = str(tmp_path / "tokenised")
    load(tokenized_path=path)
    with pytest.raises(ProvenanceMismatch, match=says):
        load(tokenized_path=path, **changes)


def test_a_folder_of_the_first_format_is_still_used(tmp_path: Path) -> None:
    path = tmp_path / "tokenised"
    load(tokenized_path=str(path))
    held = json.loads((path / MANIFEST).read_text())
    later = {"layout", "files", "preserve_thinking", "mix_strategy", "interleave_probs"}
    old = {k: v for k, v in held.items() if k not in later} | {"format": 1}
    (path / MANIFEST).write_text(json.dumps(old))
    loader = Loader()
    load(loader, tokenized_path=str(path))
    assert loader.asked == []
    with pytest.raises(ProvenanceMismatch, match="cutoff_len 64, now 32"):
        load(tokenized_path=str(path), cutoff_len=32)


def test_a_folder_that_is_not_ours_or_lacks_a_part_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenised"
    path.mkdir()
    load(tokenized_path=str(path))  # an empty folder is taken
    shutil.rmtree(path / "001_b" / "train")
    with pytest.raises(DamagedData, match="Remove the folder"):
        load(tokenized_path=str(path))
    (path / MANIFEST).write_text(json.dumps({"format": 0}))
    with pytest.raises(ProvenanceMismatch, match="made with other settings"):
        load(tokenized_path=str(path))
    (path / MANIFEST).unlink()
    with pytest.raises(ProvenanceMismatch, match="Name another folder"):
        load(tokenized_path=str(path))
