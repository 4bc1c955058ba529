"""Gradients in the metric of Kronecker factors: a run, its resume, a build, and a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore import open_store
from gradstore.store.verify import verify_store

PARAMS = {"proj_dim": 128, "gradient_type": "sgd", "preconditioner": "ekfac"}


def ok(result: Any) -> Any:
    assert result.code == 0, result.err[-3000:]
    return result


def selections(run: Path) -> dict[str, Any]:
    paths = sorted((run / "dataflex" / "selections").glob("*.json"))
    return {path.name: json.loads(path.read_text()) for path in paths}


def test_a_run_in_the_metric_chooses_by_its_cosines_and_resumes_to_the_same_bits(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Killed among the training rows of its second update: factors are those of the first try."""
    whole, broken = (
        config(f"{name}.yaml", output_dir=str(tmp_path / name), component_params=PARAMS,
               max_samples=48)
        for name in ("whole", "broken")
    )  # fmt: skip
    ok(cli("train", whole))
    told = selections(tmp_path / "whole")
    store = open_store(tmp_path / "whole" / "gradstore")
    assert verify_store(store.path).ok
    assert len(told) == len(list((store.path / "curvature").iterdir())) == 2
    for step in (2, 5):
        selected = told[f"step_{step}.json"]
        train, target = (
            store.generation(name) for name in (f"train/{step}", f"target/tiny_target/{step}")
        )
        assert selected["manifest"]["preconditioner"] == "ekfac"
        assert selected["manifest"]["damping"] == 0.1
        assert selected["manifest"]["factors"] == train.record.curvature["sha256"]
        rows, queries = (each.read(0, each.rows).astype(np.float64) for each in (train, target))
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, queries)]
        scores = unit[0] @ unit[1].mean(axis=0)
        best = np.argsort(-scores, kind="stable")[: len(selected["indices"])]
        assert sorted(selected["indices"]) == sorted(best.tolist())

    assert cli("train", broken, faults={"kill_rows": 130}).code == -9
    left = {path.name for path in (tmp_path / "broken" / "gradstore" / "curvature").iterdir()}
    ok(cli("train", broken))
    again = selections(tmp_path / "broken")
    for name, selected in told.items():
        assert again[name]["indices"] == selected["indices"]
        assert again[name]["metric"] == selected["metric"]
        assert again[name]["manifest"]["factors"] == selected["manifest"]["factors"]
    assert {p.name for p in (tmp_path / "broken" / "gradstore" / "curvature").iterdir()} >= left
    adapters = [(tmp_path / run / "adapter_model.safetensors").read_bytes()
                for run in ("whole", "broken")]  # fmt: skip
    assert adapters[0] == adapters[1]


def test_a_built_store_answers_questions_in_its_metric(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(component_params=PARAMS, max_samples=24, gradient_accumulation_steps=1)
    assert "ekfac factors" in ok(cli("gradstore", "build", path, "--dry-run")).out
    ok(cli("gradstore", "build", path))
    folder = tmp_path / "run" / "gradstore"
    store = open_store(folder)
    train = store.generation("train/0")
    assert train.record.curvature == store.generation("target/tiny_target/0").record.curvature
    text = store.texts(train)
    assert text is not None
    row = text.read([3])[0]
    asked = ok(cli("gradstore", "explain", folder, "--prompt", row.prompt, "--response",
                   row.response, "--why", 3, "--json"))  # fmt: skip
    why = json.loads(asked.out)["why"]
    # The row explains itself: its cosine with itself, projected or exact, is 1.
    assert why["row"]["score"] == pytest.approx(1, abs=1e-2)
    assert why["exact"] == pytest.approx(1, abs=1e-4)


def test_a_parameter_that_leaves_no_metric_is_one_message_before_anything_is_written(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    refused = cli("train", config(component_params={**PARAMS, "gradient_type": "adam_marginal"}))
    assert refused.code == 2
    assert "ekfac is the curvature of plain gradients" in refused.message
    assert "set gradient_type: sgd" in refused.message
    assert not (tmp_path / "run").exists()
