"""Rows of one's own through LlamaFactory's real loader, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dataflex.data.rows import RunData

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny"

#: `load_rows(rows=..., target_dataset=(...), **data_arguments)` -> what a run gets.
LoadRows = Callable[..., RunData]


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Callable[..., Path]:
    """`dataset_dir(rows=[...], other="raw text")` -> a folder with a dataset_info.json."""

    def make(entries: Mapping[str, Any] | None = None, **sets: Any) -> Path:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        info: dict[str, Any] = {name: {"file_name": f"{name}.json"} for name in sets}
        for name, rows in sets.items():
            content = rows if isinstance(rows, bytes | str) else json.dumps(rows)
            raw = content if isinstance(content, bytes) else content.encode()
            (folder / f"{name}.json").write_bytes(raw)
        (folder / "dataset_info.json").write_text(json.dumps({**info, **(entries or {})}))
        return folder

    return make


@pytest.fixture
def load_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadRows:
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments, ModelArguments, TrainingArguments
    from transformers import AutoTokenizer

    from dataflex.bridge.arguments import configuration_faults
    from dataflex.bridge.origins import row_sources
    from dataflex.bridge.rows import dataset_loader
    from dataflex.config.keys import DataFlexConfig, RunConfig

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def load(
        folder: Path, *, stage: str = "sft", template: str = "default",
        training: Mapping[str, Any] | None = None, ours: Mapping[str, Any] | None = None,
        **data: Any,
    ) -> RunData:  # fmt: skip
        usual = {"dataset": "rows", "dataset_dir": str(folder), "cutoff_len": 64,
                 "template": template, "overwrite_cache": True, "packing": False}  # fmt: skip
        data_args = DataArguments(**{**usual, **data})
        tokenizer = AutoTokenizer.from_pretrained(str(TINY / "model"))
        model_args = ModelArguments(
            model_name_or_path=str(TINY / "model"), cache_dir=str(tmp_path / "cache")
        )
        training_args = TrainingArguments(
            output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True, do_train=True,
            **(training or {}),
        )  # fmt: skip
        config = RunConfig(replace(DataFlexConfig(), **(ours or {})), {}, Path("run.yaml"))
        held: list[RunData] = []
        with configuration_faults(), row_sources() as files:
            prepared = get_template_and_fix_tokenizer(tokenizer, data_args)
            loader = dataset_loader(config, get_dataset, lambda d, _: held.append(d), files)
            loader(prepared, model_args, data_args, training_args, stage=stage, tokenizer=tokenizer)
        return held[0]

    return load
