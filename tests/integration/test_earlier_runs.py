"""What version 0.1.0 wrote, before the packages were divided into rooms, still works.

earlier/run_0_1_0.tar.gz is a run of six steps with `less` on the embedded model, cut at its
checkpoint of step 3: run.yaml, run/ (checkpoint, records, store), and what the whole run ended in:
step_4.json, the selection after that checkpoint, and final.safetensors, the adapter.
"""

from __future__ import annotations

import importlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dataflex.config.registry import imported
from gradstore import checkpoint_features, influence_scores, open_store
from gradstore.store.verify import verify_store

ARCHIVE = Path(__file__).parent / "earlier" / "run_0_1_0.tar.gz"

#: `class` in the state.json of its checkpoints, one for each strategy of 0.1.0.
CLASSES = (
    "dataflex.mixers.custom:CustomMixer",
    "dataflex.mixers.doremi:DoremiMixer",
    "dataflex.mixers.dynamic_moe:DynamicMoeMixer",
    "dataflex.mixers.odm:OdmMixer",
    "dataflex.mixers.random:RandomMixer",
    "dataflex.mixers.static:StaticMixer",
    "dataflex.pipelines.pipeline:Pipeline",
    "dataflex.reorders.custom:CustomReorder",
    "dataflex.reorders.dynamic:DynamicReorder",
    "dataflex.reorders.static:StaticReorder",
    "dataflex.selectors.cluster_less:ClusterLessSelector",
    "dataflex.selectors.coincide:CoincideSelector",
    "dataflex.selectors.custom:CustomSelector",
    "dataflex.selectors.delta_loss:DeltaLossSelector",
    "dataflex.selectors.icons:IconsSelector",
    "dataflex.selectors.less:LessSelector",
    "dataflex.selectors.loss:LossSelector",
    "dataflex.selectors.near:NearSelector",
    "dataflex.selectors.nice:NiceSelector",
    "dataflex.selectors.random:RandomSelector",
    "dataflex.selectors.tsds:TsdsSelector",
    "dataflex.weighters.adapt:AdaptWeighter",
    "dataflex.weighters.custom:CustomWeighter",
    "dataflex.weighters.joint_update_aware:JointUpdateAwareWeighter",
    "dataflex.weighters.loss:LossWeighter",
)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def selection(path: Path) -> tuple[list[int], list[float]]:
    content = json.loads(path.read_text())
    return content["indices"], content["metric"]["score"]


def test_a_checkpoint_of_an_earlier_version_resumes_to_what_that_version_did(
    earlier: Path, cli: Any
) -> None:
    run = earlier / "run"
    result = cli("train", earlier / "run.yaml", f"output_dir={run}")
    assert result.code == 0, result.err[-3000:]
    log = [json.loads(line) for line in (run / "trainer_log.jsonl").read_text().splitlines()]
    assert min(line["current_steps"] for line in log) == 4, "resumed, not begun again"
    rows, scores = selection(run / "dataflex" / "selections" / "step_4.json")
    expected_rows, expected_scores = selection(earlier / "step_4.json")
    assert rows == expected_rows
    assert scores == pytest.approx(expected_scores, abs=1e-5)
    adapter = load_file(run / "adapter_model.safetensors")
    for name, expected in load_file(earlier / "final.safetensors").items():
        np.testing.assert_allclose(adapter[name], expected, atol=1e-5, err_msg=name)


def test_a_store_of_an_earlier_version_is_whole_and_scores_as_it_did(earlier: Path) -> None:
    path = earlier / "run" / "gradstore"
    assert verify_store(path).ok
    scores = influence_scores(checkpoint_features(open_store(path))).values
    rows, expected = selection(earlier / "run" / "dataflex" / "selections" / "step_2.json")
    assert scores[rows] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("target", CLASSES)
def test_the_class_that_an_earlier_state_names_is_there(target: str) -> None:
    """A resume compares it with the class of the run; it must not have moved."""
    found = imported(target, "class", "package.module:Class")
    assert f"{found.__module__}:{found.__qualname__}" == target


def test_every_public_name_of_the_contract_is_where_it_was() -> None:
    for module, names in {
        "gradkernels": ("ProjectionSpec", "project", "project_reference"),
        "gradstore": ("FeatureIndex", "export_features", "influence_scores", "open_store",
                      "select_top"),
    }.items():  # fmt: skip
        for name in names:
            assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"
