"""Selection and stores without an adapter: finetuning_type full and freeze, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from gradstore import open_store
from gradstore.store.generation import Generation

ROOT = Path(__file__).resolve().parents[2]


def ok(result: Any) -> Any:
    assert result.code == 0, result.err[-3000:]
    return result


def cosines(found: Generation, expected: Generation) -> np.ndarray:
    """Of the features of the same rows."""
    pair = [generation.read(0, generation.rows) for generation in (found, expected)]
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in pair)
    return np.asarray((a * b).sum(axis=1))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full") / "run"


FULL = {"finetuning_type": "full", "lora_rank": None, "lora_target": None, "lora_dropout": None,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "target_dataset":
        "tiny_target_sort", "update_step": 2, "max_samples": 48}  # fmt: skip


@pytest.fixture
def full(kept: Path, cli: Any, config: Any) -> dict[str, Path]:
    """Six steps of all parameters, selections and checkpoints at 2 and 4; made once."""
    path = config(**FULL, output_dir=str(kept))
    if not kept.exists():
        told = ok(cli("train", path)).err
        assert told.count("gradients of whole weights take about") == 1
    return {"run": kept, "yaml": path}


def test_less_selects_by_gradients_of_a_whole_model(full: dict[str, Path]) -> None:
    store = open_store(full["run"] / "gradstore")
    trains = [g for g in store.generations() if g.role == "train"]
    assert [(g.step, g.rows, int(g.usable.sum())) for g in trains] == [(2, 48, 48), (4, 48, 48)]
    names = [line.split()[0] for line in trains[0].provenance["parameters"]]
    assert len(names) == 7 * len({name.split(".")[2] for name in names})
    assert all(name.endswith("_proj.weight") for name in names)
    chosen = json.loads((full["run"] / "dataflex/selections/step_4.json").read_text())
    assert len(chosen["indices"]) == 4
    assert chosen["manifest"]["train"] == "train/4"


@pytest.mark.parametrize("plain", [False, True])
def test_a_store_built_from_its_checkpoints_holds_what_training_stored(
    full: dict[str, Path], cli: Any, tmp_path: Path, plain: bool
) -> None:
    """`plain`: as LlamaFactory alone leaves a checkpoint."""
    held = []
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        shutil.copytree(full["run"] / f"checkpoint-{step}", folder)
        assert not (folder / "dataflex" / "moments.safetensors").exists()  # optimizer.pt has them
        if plain:
            shutil.rmtree(folder / "dataflex")
        held.append(str(folder))
    built, trained = tmp_path / "store", open_store(full["run"] / "gradstore")
    ok(cli("gradstore", "build", full["yaml"], f"gradstore={built}",
           f"gradstore_checkpoints=[{','.join(held)}]"))  # fmt: skip
    store = open_store(built)
    assert store.generation("train/2").provenance == trained.generation("train/2").provenance
    for name in ("train/2", "train/4", "target/tiny_target_sort/2", "target/tiny_target_sort/4"):
        found, expected = store.generation(name), trained.generation(name)
        assert found.record.adapter_hash == expected.record.adapter_hash
        assert found.record.optimizer_hash == expected.record.optimizer_hash
        assert cosines(found, expected).min() > 1 - 1e-5
    assert cosines(store.generation("train/2"), store.generation("train/4")).min() < 0.9


def test_other_modules_and_other_kinds_of_checkpoints_are_refused(
    full: dict[str, Path], cli: Any, config: Any
) -> None:
    store = full["run"] / "gradstore"
    again = cli("gradstore", "build", full["yaml"], f"gradstore={store}",
                "component_params.gradient_modules=all")  # fmt: skip
    assert again.code == 3
    assert "parameters" in again.message
    checkpoint = full["run"] / "checkpoint-2"
    lora = cli("gradstore", "build", config("lora.yaml"), f"gradstore_checkpoints=[{checkpoint}]")
    assert lora.code == 2
    assert "has no adapter" in lora.message
    asked = cli("gradstore", "explain", store, "--prompt", "sort b a")
    assert asked.code == 2
    assert "finetuning_type full" in asked.message
    other = cli("gradstore", "build", full["yaml"], f"gradstore_checkpoints=[{checkpoint}]",
                f"model_name_or_path={ROOT / 'examples/tiny/moe'}")  # fmt: skip
    assert other.code == 2
    assert "does not fit the model" in other.message


def test_icons_votes_by_gradients_of_the_layers_that_freeze_trains(
    cli: Any, config: Any, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    path = config(**{**FULL, "finetuning_type": "freeze", "freeze_trainable_layers": 1,
                     "component_name": "icons", "update_times": 1, "component_params":
                     {"proj_dim": 64, "gradient_type": "sgd", "gradient_modules": "all"},
                     "target_dataset": "tiny_target_sort,tiny_target_date", "save_steps": 4,
                     "output_dir": str(run)})  # fmt: skip
    ok(cli("train", path))
    (train,) = [g for g in open_store(run / "gradstore").generations() if g.role == "train"]
    names = [line.split()[0] for line in train.provenance["parameters"]]
    (layer,) = {name.split(".")[2] for name in names}
    assert sum("norm" in name for name in names) == 2
    assert len(names) == 9
    assert int(train.usable.sum()) == 48
    before = load_file(model / "model.safetensors")
    after = load_file(run / "checkpoint-4" / "model.safetensors")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert moved == set(names)
    assert f"layers.{layer}." in names[0]
