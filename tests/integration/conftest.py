"""A small run on the embedded model."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"

#: Names of weights of the embedded model's third and fourth layer.
LATER = re.compile(r"layers\.[23]\.")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the embedded model's first two layers: half of the time, the same paths."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    shutil.copytree(TINY / "model", folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not LATER.search(name)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a small LESS run's YAML: 8 steps, accumulation 3, dropout on, 96 rows."""

    def write(name: str = "run.yaml", **changes: object) -> Path:
        content: dict[str, object] = {
            "model_name_or_path": str(model),
            "template": "default",
            "dataset": "tiny_train",
            "dataset_dir": str(TINY / "data"),
            "cutoff_len": 64,
            "max_samples": 96,
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 4,
            "lora_target": "q_proj,down_proj",
            "lora_dropout": 0.1,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "learning_rate": 2.0e-3,
            "num_train_epochs": 1,
            "logging_steps": 1,
            "save_steps": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "overwrite_cache": True,
            "train_type": "dynamic_select",
            "component_name": "less",
            "target_dataset": "tiny_target",
            "warmup_step": 2,
            "update_step": 3,
            "update_times": 2,
            "component_params": {"proj_dim": 128},
        }
        content.update(changes)
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return path

    return write
