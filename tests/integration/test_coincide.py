"""COINCIDE on a tiny vision-language model: features follow the model, or a fixed one beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.store.reader import open_store

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
VISION = TINY / "vision"

#: Two layers, so that a unit vector has four blocks.
PARAMS = {"num_clusters": 5, "embedding_layers": [0, 2], "keep_generations": 9}


@pytest.fixture
def coincide(config: Any) -> Any:
    def write(name: str = "run.yaml", params: Any = None, **changes: Any) -> Path:
        changes = {
            "model_name_or_path": str(VISION / "model"), "template": "llava",
            "default_system": "Look.", "dataset": "tiny_vision",
            "dataset_dir": str(VISION / "data"), "media_dir": str(VISION / "data"),
            "cutoff_len": 128, "max_samples": None, "target_dataset": None, "lora_target": "all",
            "gradient_accumulation_steps": 1, "component_name": "coincide", "warmup_step": 1,
            "update_step": 4, "save_steps": 100, **changes,
            "component_params": {**PARAMS, **(params or {})},
        }  # fmt: skip
        path: Path = config(name, **changes)
        return path

    return write


def chosen(run: Path) -> list[list[int]]:
    files = sorted((run / "dataflex" / "selections").glob("*.json"))
    return [json.loads(path.read_text())["indices"] for path in files]


def features(run: Path) -> dict[str, np.ndarray]:
    store = open_store(run / "gradstore")
    return {g.name: g.read(0, g.rows) for g in store.generations()}


def test_rows_are_looked_at_anew_at_every_update(cli: Any, coincide: Any, tmp_path: Path) -> None:
    result = cli("train", coincide())
    assert result.code == 0, result.err[-3000:]
    found = features(tmp_path / "run")
    assert len(found) == 2
    first, second = found.values()
    assert first.shape == (72, 2 * 2 * 64)
    norms = np.linalg.norm(first.reshape(72, 4, 64), axis=2)
    np.testing.assert_allclose(norms, 0.5, atol=1e-3)
    assert not np.allclose(first, second, atol=1e-2), "the model has learnt meanwhile"
    assert all(len(set(rows)) == 8 for rows in chosen(tmp_path / "run"))


def test_a_picture_counts_and_so_does_the_question(cli: Any, coincide: Any, tmp_path: Path) -> None:
    """Rows with one question differ in their image blocks, rows with one place in their text."""
    assert cli("train", coincide(train_step=2)).code == 0
    (found,) = features(tmp_path / "run").values()
    rows = json.loads((VISION / "data" / "vision.json").read_text())
    asked = np.array([row["messages"][0]["content"] for row in rows])
    image, text = found[:, :64], found[:, 64:128]
    same = asked == asked[0]
    assert (np.abs(image[same] - image[0]).max(axis=1) > 1e-4).sum() == same.sum() - 1
    assert np.abs(text[~same] - text[0]).max(axis=1).min() > 1e-2


def test_a_fixed_model_looks_once_and_rows_take_turns(
    cli: Any, coincide: Any, tmp_path: Path
) -> None:
    params = {"embedding_model_name_or_path": str(VISION / "model")}
    result = cli("train", coincide(params=params))
    assert result.code == 0, result.err[-3000:]
    assert len(features(tmp_path / "run")) == 1
    one, two = chosen(tmp_path / "run")
    assert not set(one) & set(two), "while there are rows that no update took"


def test_two_processes_choose_as_one_does(cli: Any, coincide: Any, tmp_path: Path) -> None:
    options = {"train_step": 2, "per_device_train_batch_size": 1, "lora_dropout": 0.0}
    one = coincide("one.yaml", output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2,
                   **options)  # fmt: skip
    assert cli("train", one).code == 0
    two = coincide("two.yaml", output_dir=str(tmp_path / "two"), **options)
    result = cli("train", two, ranks=2)
    assert result.code == 0, result.err[-3000:]
    assert chosen(tmp_path / "one") == chosen(tmp_path / "two")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_name_or_path": str(TINY / "model")}, "needs a vision-language model"),
        ({"params": {"embedding_model_name_or_path": str(TINY / "model")}}, "has no image tokens"),
        ({"dataset": "tiny_train", "dataset_dir": str(TINY / "data"), "max_samples": 40},
         "no training row has one"),
        ({"params": {"embedding_layers": [4]}}, "embedding_layers is [4], but the model in tr"),
        ({"params": {"temperature": 0}}, "temperature is 0"),
        ({"params": {"num_clusters": 0}}, "num_clusters is 0"),
        ({"params": {"single_member_density": 0}}, "single_member_density is 0"),
        ({"update_step": 37}, "update_step is 37"),
    ],
    ids=["text-model", "fixed-text-model", "text-rows", "layer", "temperature", "clusters",
         "density", "too-many-rows"],
)  # fmt: skip
def test_bad_input_is_refused_before_training(
    changes: dict[str, Any], says: str, cli: Any, coincide: Any, tmp_path: Path
) -> None:
    result = cli("train", coincide(**changes))
    assert result.code == 2, result.err[-3000:]
    assert says in result.message
    assert "Traceback" not in result.err
    assert not list((tmp_path / "run").glob("checkpoint-*"))
