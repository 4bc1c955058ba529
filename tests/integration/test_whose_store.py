"""Whose store it is: runs that can't be compared never mix, runs that belong together do."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.run.output_owner import own_output
from gradstore import open_store

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny"

Write = Callable[..., Path]


def snapshot(folder: Path) -> dict[str, str]:
    """Every file of a store with its hash; the lock's record and scratch space do not count."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "writer.lock"
    }


def names(store: Path) -> list[str]:
    return [generation.name for generation in open_store(store).generations()]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled by the first test that needs it: a run of 4 steps with a store of its own."""
    folder = tmp_path_factory.mktemp("first")
    return {"store": folder / "store", "run": folder / "run"}


def test_two_runs_do_not_write_into_one_output_folder(
    cli: Any, config: Any, tmp_path: Path
) -> None:
    path = config(component_name="random", component_params=None, train_step=2, max_samples=40)
    lock = own_output(tmp_path / "run")
    result = cli("train", path)
    assert result.code == 6, result.err[-3000:]
    assert f"pid {os.getpid()}" in result.message
    assert "choose another output_dir" in result.message
    lock.release()
    assert cli("train", path).code == 0


@pytest.fixture
def run(first: dict[str, Path], cli: Any, config: Any) -> Write:
    """A small run on the shared store, made once; gives what writes another one's YAML."""

    def write(**changes: Any) -> Path:
        fixed = {
            "gradstore": str(first["store"]),
            "train_step": 4,
            "gradient_accumulation_steps": 1,
            "max_samples": 40,
        }
        return config(**{**fixed, **changes})  # type: ignore[no-any-return]

    if not first["store"].exists():
        result = cli("train", write(output_dir=str(first["run"])))
        assert result.code == 0, result.err[-3000:]
    return write


def other_model(tmp_path: Path) -> str:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + torch.tensor(1e-3, dtype=tensors[name].dtype)
    save_file(tensors, path, metadata={"format": "pt"})
    return str(tmp_path / "model")


def other_order(tmp_path: Path) -> str:
    shutil.copytree(TINY / "data", tmp_path / "data")
    path = tmp_path / "data" / "train.json"
    rows = json.loads(path.read_text())
    rows[0], rows[1] = rows[1], rows[0]
    path.write_text(json.dumps(rows))
    return str(tmp_path / "data")


DIFFERENT = {
    "other data": (lambda _: {"max_samples": 39}, ["train.rows differs", "40 rows are stored"]),
    "other order": (
        lambda tmp: {"dataset_dir": other_order(tmp)},
        ["train.rows differs", "same rows, different order"],
    ),
    "other target rows": (
        lambda tmp: {"dataset_dir": moved_target(tmp)},
        ["target.tiny_target.rows differs"],
    ),
    "other model": (lambda tmp: {"model_name_or_path": other_model(tmp)}, ["base_model differs"]),
    "other cutoff": (lambda _: {"cutoff_len": 32}, ["rows.cutoff_len differs", "64", "32"]),
    "other template": (lambda _: {"template": "alpaca"}, ["template differs", '"alpaca"']),
    "other adapter shape": (lambda _: {"lora_rank": 2}, ["parameters[0]", "projection.p differs"]),
    "other seed and d": (
        lambda _: {"component_params": {"proj_dim": 64, "seed": 1}},
        ["projection.seed differs", "projection.d differs", "dim differs"],
    ),
}


def moved_target(tmp_path: Path) -> str:
    shutil.copytree(TINY / "data", tmp_path / "data")
    shutil.copy(tmp_path / "data" / "targets" / "sort.json", tmp_path / "data" / "target.json")
    return str(tmp_path / "data")


@pytest.mark.parametrize("case", DIFFERENT)
def test_fault_11_what_cannot_be_compared_is_refused_with_every_difference(
    case: str, run: Write, first: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    changes, fragments = DIFFERENT[case]
    before = snapshot(first["store"])
    result = cli("train", run(output_dir=str(tmp_path / "run"), gradstore_run="b",
                              **changes(tmp_path)))  # fmt: skip
    assert result.code == 3, result.err[-3000:]
    for fragment in [*fragments, "gradstore=PATH"]:
        assert fragment in result.message
    assert "Traceback" not in result.err
    assert "'loss'" not in result.err + result.out, "a step was trained before the refusal"
    assert snapshot(first["store"]) == before


def test_the_same_configuration_elsewhere_needs_a_name_of_its_own(
    run: Write, first: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    before = snapshot(first["store"])
    path = run(output_dir=str(tmp_path / "run"))
    result = cli("train", path)
    assert result.code == 3
    assert "gradstore_run=NAME" in result.message
    assert snapshot(first["store"]) == before
    named = cli("train", path, "gradstore_run=second")
    assert named.code == 0, named.err[-3000:]
    after = snapshot(first["store"])
    assert {name: after[name] for name in before} == before
    assert {"train/2", "second/train/2", "second/target/tiny_target/2"} <= set(
        names(first["store"])
    )
    asked = cli("gradstore", "score", first["store"], "--run", "second", "--json")
    assert json.loads(asked.out)["generation"] == "second/train/2"


def test_another_target_set_a_second_checkpoint_and_a_resume_are_accepted(
    run: Write, first: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    """In the first run's own folder: it is the same run."""
    store = tmp_path / "store"
    shutil.copytree(first["store"], store)
    shutil.copytree(first["run"], tmp_path / "run")
    path = run(output_dir=str(tmp_path / "run"), gradstore=str(store))
    before = snapshot(store)
    another_set = cli("gradstore", "build", path, "target_dataset=tiny_target_sort")
    assert another_set.code == 0, another_set.err[-3000:]
    assert "target/tiny_target_sort/2" in names(store)
    resumed = cli("train", path, "train_step=6")
    assert resumed.code == 0, resumed.err[-3000:]
    assert "train/5" in names(store)
    after = snapshot(store)
    assert {name: after[name] for name in before} == before


def test_a_new_start_replaces_the_default_store_and_spares_any_other(
    run: Write, first: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    before = snapshot(first["store"])
    path = run(gradstore=None, overwrite_output_dir=True)
    assert cli("train", path).code == 0
    own = tmp_path / "run" / "gradstore"
    uuid = open_store(own).uuid
    assert cli("train", path, "max_samples=39").code == 0, "other rows, yet a store of its own"
    assert open_store(own).uuid != uuid
    elsewhere = cli("train", run(overwrite_output_dir=True))
    assert elsewhere.code == 3
    assert snapshot(first["store"]) == before


def test_a_new_start_leaves_no_record_or_checkpoint_of_the_old_run_in_use(
    run: Write, cli: Any, tmp_path: Path
) -> None:
    """The old run was longer: its last checkpoint must not be taken for the new run's."""
    path = run(gradstore=None, overwrite_output_dir=True)
    assert cli("train", path, "train_step=6").code == 0
    assert cli("train", path, faults={"kill_step": 3}).code == -9
    folder = tmp_path / "run"
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4",
                                                             "checkpoint-6"}  # fmt: skip
    resumed = cli("train", path, "resume_from_checkpoint=true")
    assert resumed.code == 0, resumed.err[-3000:]
    events = (folder / "dataflex" / "events.jsonl").read_text().splitlines()
    assert {json.loads(line)["step"] for line in events} == {2}
    left = sorted(p.name for p in (folder / "dataflex" / "selections").iterdir())
    assert left == ["lowest_2.jsonl", "step_2.json", "step_2.jsonl"]
    built = cli("gradstore", "build", path)
    assert built.code == 0, built.err[-3000:]
    assert "checkpoint-6 belongs to an earlier run" in built.err
    assert "train/6" not in names(folder / "gradstore")


def test_resume_from_checkpoint_beats_overwrite_output_dir(
    run: Write, cli: Any, tmp_path: Path
) -> None:
    path = run(gradstore=None, overwrite_output_dir=True)
    assert cli("train", path, faults={"kill_step": 3}).code == -9
    uuid = open_store(tmp_path / "run" / "gradstore").uuid
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert cli("train", path, f"resume_from_checkpoint={checkpoint}").code == 0
    assert open_store(tmp_path / "run" / "gradstore").uuid == uuid


def test_a_checkpoint_and_the_store_of_another_run_do_not_go_together(
    run: Write, first: dict[str, Path], cli: Any, tmp_path: Path
) -> None:
    path = run(gradstore=None)
    assert cli("train", path, faults={"kill_step": 3}).code == -9
    before = snapshot(first["store"])
    result = cli("train", path, f"gradstore={first['store']}")
    assert result.code == 3
    assert snapshot(first["store"]) == before
