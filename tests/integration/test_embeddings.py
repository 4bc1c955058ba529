"""Selectors on embeddings in real runs: an encoder embeds once, and what is refused before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradstore.store.reader import open_store

ROOT = Path(__file__).resolve().parents[2]

#: Any folder of a model will do as an encoder: its states are averaged.
ENCODER = str(ROOT / "examples" / "tiny" / "model")
SHORT = {"max_samples": 60, "train_step": 5, "update_times": 1, "per_device_train_batch_size": 2,
         "gradient_accumulation_steps": 1}  # fmt: skip


def chosen(run: Path) -> list[int]:
    content = json.loads((run / "dataflex" / "selections" / "step_2.json").read_text())
    return list(content["indices"])


def test_an_encoder_embeds_once_for_several_runs_and_any_number_of_processes(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Both runs see the same rows first, though the second one has two processes."""
    store = tmp_path / "store"
    answers = []
    for name, ranks in (("one", 1), ("two", 2)):
        shape = {"per_device_train_batch_size": 2 // ranks}
        path = config(
            component_name="near", output_dir=str(tmp_path / name), gradstore=str(store),
            component_params={"embedding_model_name_or_path": ENCODER}, **{**SHORT, **shape},
        )  # fmt: skip
        result = cli("train", path, ranks=ranks)
        assert result.code == 0, result.err[-3000:]
        answers.append(chosen(tmp_path / name))
        generations = open_store(store).generations()
        assert [(str(g.role), g.step) for g in generations] == [("target", 0), ("train", 0)]
    assert answers[0] == answers[1]
    train, target = (g for g in sorted(generations, key=lambda g: str(g.role), reverse=True))
    assert train.space.startswith("model.")
    cosines = target.read(0, target.rows) @ train.read(0, train.rows).T
    order = list(dict.fromkeys(np.argsort(-cosines, axis=1, kind="stable").T.ravel().tolist()))
    assert answers[0] == order[: len(answers[0])]


def test_rows_near_most_target_rows_go_first_and_a_kill_changes_nothing(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    """Embeddings of a frozen encoder: both updates choose by the same similarities."""
    params = {"embedding_model_name_or_path": ENCODER, "subset": "knn_uniform", "neighbours": 3}
    common = {
        **SHORT, "train_step": 8, "update_times": 2, "save_steps": 3, "component_name": "near",
        "component_params": params,
    }  # fmt: skip
    answers = []
    for name in ("whole", "killed"):
        path = config(output_dir=str(tmp_path / name), **common)
        if name == "killed":
            assert cli("train", path, faults={"kill_step": 7}).code == -9
            path = config(output_dir=str(tmp_path / name), resume_from_checkpoint=True, **common)
        result = cli("train", path)
        assert result.code == 0, result.err[-3000:]
        files = sorted((tmp_path / name / "dataflex" / "selections").glob("*.json"))
        answers.append([json.loads(file.read_text())["indices"] for file in files])
    assert answers[0] == answers[1]
    first, second = answers[0]
    assert not set(first) & set(second), "rows served before are left out"
    generations = {str(g.role): g for g in open_store(tmp_path / "whole/gradstore").generations()}
    train, target = generations["train"], generations["target"]
    cosines = target.read(0, target.rows) @ train.read(0, train.rows).T
    named = np.argsort(-cosines, axis=1, kind="stable")[:, :3]
    counts = np.bincount(named.ravel(), minlength=train.rows)
    assert counts[first].tolist() == sorted(counts, reverse=True)[: len(first)]


CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no encoder": (
        {"component_name": "near", "component_params": {"embedding_model_name_or_path": "./no"}},
        ["embedding_model_name_or_path './no' is not a folder here"],
    ),
    "no such layer": (
        {"component_name": "tsds", "component_params": {"embedding_model_name_or_path": ENCODER,
                                                        "embedding_layer": 99}},
        ["embedding_layer is 99", "hidden states"],
    ),
    "no file made offline": (
        {"component_name": "near", "component_params": {"indices_path": "no.npy"}},
        ["'no.npy' is not a file here"],
    ),
    "alpha": (
        {"component_name": "tsds", "component_params": {"alpha": 2}},
        ["component 'tsds'", "alpha is 2", "0 to 1"],
    ),
    "no target": ({"component_name": "near", "component_params": None, "target_dataset": None},
                  ["needs target rows", "target_dataset"]),
    "unknown clustering": (
        {"component_name": "cluster_less", "component_params": {"clustering_method": "kmaens"}},
        ["clustering_method is 'kmaens'", "kmeans"],
    ),
    "window": (
        {"component_name": "delta_loss", "component_params": {"window_size": 0}},
        ["window_size is 0", "at most 1"],
    ),
    "tasks that do not add up": (
        {"component_name": "icons", "component_params": {"task_boundaries": [20, 10]}},
        ["task_boundaries adds up to 30", "has 32 rows"],
    ),
    "tasks named twice": (
        {"component_name": "icons", "target_subtasks": [16, 16],
         "component_params": {"task_boundaries": [16, 16]}},
        ["remove one of them"],
    ),
    "misspelt parameter of the base": (
        {"component_name": "icons", "component_params": {"proj_dmi": 64}},
        ["'proj_dmi' (did you mean 'proj_dim'?)", "task_boundaries"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_bad_configuration_ends_in_2_before_the_model(
    case: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    changes, fragments = CASES[case]
    result = cli("train", config(**changes))
    assert result.code == 2, result.err[-3000:]
    assert result.err.count("error: ") == 1
    for fragment in fragments:
        assert fragment in result.message
    assert "trainable params" not in result.out + result.err
    assert not (tmp_path / "run" / "gradstore").exists()


@pytest.mark.parametrize(
    ("component", "key", "array", "says"),
    [
        ("near", "indices_path", [[0, 1, 2]], "names 3 of the 96 training rows"),
        ("tsds", "probs_path", [0.5, 0.5], "holds 2 probabilities"),
    ],
)
def test_a_file_made_offline_of_other_data_ends_in_2_before_the_model(
    component: str, key: str, array: Any, says: str, cli: Any, config: Any, tmp_path: Path
) -> None:
    np.save(tmp_path / "made.npy", np.array(array))
    path = config(
        component_name=component, target_dataset=None,
        component_params={key: str(tmp_path / "made.npy")},
    )  # fmt: skip
    result = cli("train", path)
    assert result.code == 2, result.err[-3000:]
    assert says in result.message
    assert "trainable params" not in result.out + result.err


def test_a_configuration_of_1_1_0_reads_its_file(cli: Any, config: Any, tmp_path: Path) -> None:
    """A components.yaml and a table of neighbours as DataFlex 1.1.0 has them; no target set."""
    np.save(tmp_path / "top_indices.npy", np.arange(60)[::-1].reshape(2, 30))
    presets = tmp_path / "components.yaml"
    presets.write_text(
        "selectors:\n  near:\n    name: near\n    params:\n"
        f"      indices_path: {tmp_path / 'top_indices.npy'}\n      cache_dir: saves\n"
    )
    path = config(
        component_name="near", component_params=None, components_cfg_file=str(presets),
        target_dataset=None, **SHORT,
    )  # fmt: skip
    result = cli("train", path)
    assert result.code == 0, result.err[-3000:]
    assert "cache_dir is ignored" in result.out + result.err
    assert chosen(tmp_path / "run") == [59, 29, 58, 28, 57, 27]
    assert not (tmp_path / "run" / "gradstore").exists()
