"""Places that a model was loaded from: what a generation keeps of them, and finding them again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.features.loaded_from import find_checkpoint, loaded_from, loading_arguments
from gradstore.errors import BadInput
from gradstore.format.records import LOADED_FROM


def checkpoint(folder: Path, step: int, base: str | None = "org/base") -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    state = {"global_step": step, "max_steps": 9, "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


def train(step: int = 4, **held: Any) -> Any:
    record = SimpleNamespace(
        libraries={LOADED_FROM: held} if held else {}, attention="sdpa", autocast="bf16"
    )
    rows = {"cutoff_len": 64, "train_on_prompt": False}
    provenance = {"template": "default", "stage": "sft", "rows": rows}
    return SimpleNamespace(name=f"train/{step}", step=step, record=record, provenance=provenance)


def test_places_are_absolute_and_hold_no_secret_nor_leave_to_run_code(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    model.mkdir()
    other.mkdir()
    keys = {
        "model_name_or_path": str(model), "adapter_name_or_path": f"{other}, org/hub",
        "dataset_dir": "ONLINE", "cutoff_len": 64, "template": "default",
        "output_dir": str(tmp_path / "run"), "hf_hub_token": "hf_secret", "learning_rate": 0.1,
        "trust_remote_code": True, "flash_attn": None,
    }  # fmt: skip
    config = RunConfig(DataFlexConfig(gradstore_checkpoints=(str(other), "gone")), keys, Path("x"))
    found = loaded_from(config)
    assert found == {
        "arguments": {
            "model_name_or_path": str(model), "adapter_name_or_path": f"{other},org/hub",
            "dataset_dir": "ONLINE", "cutoff_len": 64, "template": "default",
        },
        "folders": [str(other), str(tmp_path / "run")],
    }  # fmt: skip
    assert json.loads(json.dumps(found)) == found


def test_a_checkpoint_is_found_by_its_step_where_it_was_or_beside_the_store(tmp_path: Path) -> None:
    run = tmp_path / "run"
    folders = {step: checkpoint(run / f"checkpoint-{step}", step) for step in (2, 4)}
    checkpoint(run / "final", 6)
    recorded = train(folders=[str(run)])
    elsewhere = tmp_path / "stores" / "one"
    assert find_checkpoint(recorded, elsewhere) == folders[4]
    assert find_checkpoint(train(2), run / "gradstore") == folders[2], "moved together"
    assert find_checkpoint(train(), elsewhere, folders[4]) == folders[4]
    assert find_checkpoint(train(), elsewhere, run) == folders[4]
    assert find_checkpoint(train(0), elsewhere) is None, "a fresh adapter"
    (folders[4] / "trainer_state.json").unlink()
    with pytest.raises(BadInput, match=r"of step 4, .*: there are those of steps 2\. Name"):
        find_checkpoint(recorded, elsewhere)
    with pytest.raises(BadInput, match="there are none"):
        find_checkpoint(train(0), elsewhere, tmp_path / "empty")


def test_arguments_come_from_the_store_and_what_it_lacks_from_provenance_and_checkpoint(
    tmp_path: Path,
) -> None:
    folder = checkpoint(tmp_path / "checkpoint-4", 4)
    bare = loading_arguments(train(), folder, {})
    assert bare == {
        "stage": "sft", "template": "default", "flash_attn": "sdpa", "bf16": True,
        "cutoff_len": 64, "train_on_prompt": False, "model_name_or_path": "org/base",
        "adapter_name_or_path": str(folder), "create_new_adapter": False,
    }  # fmt: skip
    held = {"model_name_or_path": "org/held", "adapter_name_or_path": "org/merged",
            "create_new_adapter": True, "seed": 7}  # fmt: skip
    kept = loading_arguments(train(arguments=held), folder, {"cutoff_len": 9})
    assert kept["model_name_or_path"] == "org/held"
    assert kept["adapter_name_or_path"] == f"org/merged,{folder}"
    assert (kept["seed"], kept["cutoff_len"]) == (7, 9)
    with pytest.raises(BadInput, match="does not say which model"):
        loading_arguments(train(), None, {})
    gone = {"model_name_or_path": str(tmp_path / "gone")}
    with pytest.raises(BadInput, match=r"no longer at .*gone'; say where it is now with --model"):
        loading_arguments(train(arguments=gone), None, {})
