"""All that decides a plain training's losses: a bank names what differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from safetensors.torch import save_file
from torch import ones, zeros

from dataflex.data.rows import Rows, RunData
from dataflex.launch import plain_run
from dataflex.launch.plain_run import deciding
from gradstore.errors import ProvenanceMismatch
from gradstore.evaluation.bank import Bank


@pytest.fixture
def args(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a training from a model and two adapters in folders."""
    for name, file in (("model", "model"), ("one", "adapter_model"), ("two", "adapter_model")):
        (tmp_path / name).mkdir()
        save_file({"weight": zeros(3)}, tmp_path / name / f"{file}.safetensors")
        kind = "config.json" if name == "model" else "adapter_config.json"
        (tmp_path / name / kind).write_text("{}")
    adapters = f"{tmp_path / 'one'}, {tmp_path / 'two'}"
    return {"model_name_or_path": str(tmp_path / "model"), "adapter_name_or_path": adapters,
            "learning_rate": 0.1, "seed": 1, "hf_hub_token": "hf_secret"}  # fmt: skip


def data(label: int = 5) -> RunData:
    rows = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, label]]})
    nothing: Any = None
    return RunData(Rows("train", rows), (Rows("t", rows),), nothing, "default", nothing, "sft")


def bank(folder: Path, args: dict[str, Any], device: str = "cpu") -> Bank:
    return Bank(folder / "bank", deciding(args, data(), device), 1, 1)


def test_the_same_training_is_described_by_the_same_words(
    args: dict[str, Any], tmp_path: Path
) -> None:
    bank(tmp_path, args)
    bank(tmp_path, args | {"seed": 2, "output_dir": "elsewhere"})  # keys that decide nothing
    assert "hf_secret" not in (tmp_path / "bank" / "bank.json").read_text()


@pytest.mark.parametrize(
    ("folder", "file", "key"),
    [
        ("model", "model.safetensors", "model_weights"),
        ("one", "adapter_model.safetensors", "adapter_weights"),
        ("two", "adapter_model.safetensors", "adapter_weights"),
    ],
)
def test_weights_that_were_trained_in_place_are_other_weights(
    args: dict[str, Any], tmp_path: Path, folder: str, file: str, key: str
) -> None:
    bank(tmp_path, args)
    save_file({"weight": ones(3)}, tmp_path / folder / file)  # the same name, the same size
    with pytest.raises(ProvenanceMismatch, match=f"another configuration: {key}: "):
        bank(tmp_path, args)


def test_another_configuration_in_a_models_folder_is_another_model(
    args: dict[str, Any], tmp_path: Path
) -> None:
    bank(tmp_path, args)
    (tmp_path / "model" / "README.md").write_text("of no effect")
    bank(tmp_path, args)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"attention_dropout": 0.5}))
    with pytest.raises(ProvenanceMismatch, match="model_weights"):
        bank(tmp_path, args)


@pytest.mark.parametrize("library", ["transformers", "llamafactory", "peft", "accelerate"])
def test_another_version_and_another_device_are_named(
    args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    bank(tmp_path, args)
    with pytest.raises(ProvenanceMismatch, match="device: 'cpu' in the bank, 'cuda' now"):
        bank(tmp_path, args, "cuda")
    before = plain_run.version
    monkeypatch.setattr(
        plain_run, "version", lambda name: "0.0.1" if name == library else before(name)
    )
    with pytest.raises(ProvenanceMismatch, match=f"{library}: '.*' in the bank, '0.0.1' now"):
        bank(tmp_path, args)


def test_another_torch_is_named(
    args: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank(tmp_path, args)
    monkeypatch.setattr(plain_run.torch, "__version__", "1.0")
    with pytest.raises(ProvenanceMismatch, match=r"torch: '.*' in the bank, '1.0' now"):
        bank(tmp_path, args)


def test_a_hubs_name_is_known_by_its_commit_where_the_cache_has_one(
    args: dict[str, Any], tmp_path: Path
) -> None:
    named = args | {"model_name_or_path": "owner/model", "cache_dir": str(tmp_path / "cache")}
    assert deciding(named, data(), "cpu")["model_weights"] is None
    repository = tmp_path / "cache" / "models--owner--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert deciding(named, data(), "cpu")["model_weights"] == f"commit {commit}"
    odd = named | {"model_name_or_path": "no/such/place"}
    assert deciding(odd, data(), "cpu")["model_weights"] is None
