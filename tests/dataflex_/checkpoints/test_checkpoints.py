"""What is read of saved checkpoints: learning rates, and whether they are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dataflex.checkpoints.folders import check_sound, find_checkpoints, mean_learning_rate
from dataflex.checkpoints.saving import clear_place, disk_faults, remove_older
from dataflex.checkpoints.state import RunState, load_state, trainer_state
from dataflex.checkpoints.weights import check_moments, check_resumable
from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.run.output_owner import known_identity
from gradstore.errors import BadInput, DamagedData, StoreIOError


@pytest.mark.parametrize(
    ("previous", "step", "expected"),
    [(0, 4, 0.002), (4, 8, 0.001), (0, 2, 0.002), (4, 6, 0.002), (0, 8, 0.0015)],
)
def test_a_stretch_without_a_log_line_takes_the_nearest(
    previous: int, step: int, expected: float, tmp_path: Path
) -> None:
    history = [{"step": 4, "learning_rate": 0.002}, {"step": 8, "learning_rate": 0.001}]
    state = {"global_step": step, "log_history": [*history, {"step": 8, "eval_loss": 1.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert mean_learning_rate(tmp_path, previous, step) == pytest.approx(expected)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A whole one of a LoRA run, as far as its files go."""
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4}')
    save_file({"a": np.ones(8, np.float32)}, tmp_path / "adapter_model.safetensors")
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save({"last_epoch": 4}, tmp_path / "scheduler.pt")
    random_states = {"python": (3, (1,), None), "numpy": ("MT19937", np.ones(4, np.uint32)),
                     "cpu": torch.get_rng_state()}  # fmt: skip
    for rank in (0, 1):
        torch.save(random_states, tmp_path / f"rng_state_{rank}.pth")
    return tmp_path


def test_a_whole_checkpoint_can_be_resumed(checkpoint: Path) -> None:
    check_resumable(checkpoint)


def test_a_field_that_the_trainer_does_not_know_is_refused_by_file(checkpoint: Path) -> None:
    (checkpoint / "trainer_state.json").write_text('{"global_step": 4, "foo": 1}')
    with pytest.raises(DamagedData, match=r"trainer_state\.json is damaged.*foo"):
        check_resumable(checkpoint)


def test_sharded_checkpoints_keep_states_and_weights_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "global_step4").mkdir()
    check_resumable(tmp_path)


@pytest.mark.parametrize("kind", ["optimizer.pt", "scheduler.pt", "rng_state*.pth",
                                  "adapter_model.safetensors"])  # fmt: skip
def test_a_checkpoint_that_lacks_a_part_or_its_end_is_refused(kind: str, checkpoint: Path) -> None:
    paths = sorted(checkpoint.glob(kind))
    whole = paths[-1].read_bytes()
    paths[-1].write_bytes(whole[:-5])
    with pytest.raises(DamagedData, match=f"{paths[-1].name} is damaged"):
        check_resumable(checkpoint)
    for path in paths:
        path.unlink()
    with pytest.raises(BadInput, match="has no "):
        check_resumable(checkpoint)


def test_features_are_made_of_whole_adapters_alone(checkpoint: Path) -> None:
    config = RunConfig(
        DataFlexConfig(gradstore_checkpoints=(str(checkpoint),)), {}, Path("build.yaml")
    )
    assert find_checkpoints(config) == [checkpoint]
    adapter = checkpoint / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-5])
    with pytest.raises(DamagedData, match="adapter_model"):
        find_checkpoints(config)


class Planted:
    """An object whose unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "scaler.pt"])
def test_no_code_of_a_checkpoints_file_is_run(name: str, checkpoint: Path, tmp_path: Path) -> None:
    planted = tmp_path / "planted"
    torch.save({"state": Planted(planted)}, checkpoint / name)
    with pytest.raises(BadInput, match=rf"{name} cannot be loaded without running code"):
        check_resumable(checkpoint)
    if name == "optimizer.pt":
        with pytest.raises(BadInput, match="gradient_type"):
            check_moments(checkpoint)
    assert not planted.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("optimizer.pt", []), ("optimizer.pt", {"state": {}}), ("scheduler.pt", 3),
     ("rng_state_1.pth", {"python": (), "numpy": ()})],
)  # fmt: skip
def test_a_state_that_holds_something_else_is_refused(
    name: str, content: object, checkpoint: Path
) -> None:
    torch.save(content, checkpoint / name)
    with pytest.raises(BadInput, match=rf"{name} is no \w+ state: it does not hold"):
        check_resumable(checkpoint)


STATE = "dataflex/state.json"
NESTED = "[" * 50_000


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (STATE, {"step": -5}, "step is -5"),
        (STATE, {"step": True}, "step is True"),
        (STATE, {"schedule": None}, "schedule is null"),
        (STATE, {"schedule": [1, 2]}, r"schedule\.2"),
        (STATE, {"component": None}, "component is null"),
        (STATE, {"more": 3}, "more is 3"),
        (STATE, {"run_id": ""}, "run_id is ''"),
        (STATE, {"stranger": 1}, "stranger is 1"),
        (STATE, {"component": {"__array__": "nothing"}}, "arrays.npz"),
        (STATE, {"component": {"__array__": []}}, "arrays.npz"),
        (STATE, "[]", "should be an object"),
        (STATE, NESTED, "recursion"),
        ("trainer_state.json", {"global_step": -3}, "global_step is -3"),
        ("trainer_state.json", {"global_step": "4"}, "global_step is '4'"),
        ("trainer_state.json", {"log_history": {}}, "log_history is {}"),
        ("trainer_state.json", {"log_history": [{"learning_rate": "x"}]},
         r"log_history\.0\.learning_rate is 'x'"),
        ("trainer_state.json", "{}", "it has no global_step"),
        ("trainer_state.json", "[]", "should be an object"),
        ("trainer_state.json", NESTED, "recursion"),
        ("adapter_config.json", {"r": -4}, "r is -4"),
        ("adapter_config.json", {"lora_alpha": None}, "lora_alpha is null"),
        ("adapter_config.json", {"target_modules": 7}, "target_modules.*is 7"),
        ("adapter_config.json", "{}", "it has no peft_type"),
        ("adapter_config.json", "[]", "should be an object"),
        ("adapter_config.json", NESTED, "recursion"),
    ],
)  # fmt: skip
def test_impossible_values_in_sound_json_are_refused_by_file_and_field(
    name: str, change: object, says: str, checkpoint: Path
) -> None:
    RunState(4, "run-a", (2, 2, 2), "0" * 64, schema=2).save(checkpoint)
    load_state(checkpoint)
    path = checkpoint / name
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(str(change))
    with pytest.raises(DamagedData, match=f"(?s){says}") as refused:
        check_sound(checkpoint)
    assert str(checkpoint) in str(refused.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"run_id": 3}', NESTED, ""])
def test_a_damaged_record_of_the_runs_identity_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "dataflex" / "run.json"
    assert known_identity(tmp_path) is None
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DamagedData, match=r"run\.json is damaged.*Remove the file"):
        known_identity(tmp_path)


def test_state_and_log_come_back_as_they_were_saved(tmp_path: Path) -> None:
    component, more = {"rewards": np.arange(3), "name": "x"}, {"rows": [np.ones(2)]}
    settings = {"alpha": float("nan")}
    state = RunState(4, "run-a", (0, 2, -1), "0" * 64, settings, component, more, schema=2)
    state.save(tmp_path)
    log = [{"step": 4, "eval_loss": 1.0}, {"train_runtime": 2.5}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 4, "log_history": log}))
    held = load_state(tmp_path)
    assert repr(held) == repr(state)
    assert trainer_state(tmp_path).global_step == 4


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"),
     StoreIOError("cannot write dataflex/moments.safetensors: No space left on device"),
     RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
     SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")],
)  # fmt: skip
def test_a_failed_write_is_one_message_of_what_to_do(error: Exception, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    with pytest.raises(StoreIOError, match=r"checkpoint-4 cannot be saved .*make room"), \
            disk_faults(folder):  # fmt: skip
        raise error


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ConnectionError("the hub is away")])
def test_other_failures_while_saving_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error), match=str(error)), disk_faults(tmp_path):
        raise error


@pytest.mark.parametrize(
    ("limit", "present", "best", "others", "left"),
    [
        (None, 8, None, (), [2, 4, 6, 8]),
        (0, 8, None, (), [2, 4, 6, 8]),
        (2, 8, None, (), [6, 8]),
        (2, 8, 2, (), [2, 8]),
        (1, 8, 2, (), [2, 8]),
        (1, 4, None, (), [4, 6, 8]),  # resumed from 2: those ahead are not the Trainer's to remove
        (2, 4, 6, (), [2, 4, 6, 8]),
        (2, 6, None, (), [4, 6, 8]),
        (2, 6, None, (4, 8), [2, 6]),  # of an earlier run: they go first, whatever their step
        (3, 6, None, (4, 8), [2, 6, 8]),
        (1, 2, 8, (4, 6, 8), [2, 8]),
    ],
)
def test_checkpoints_go_by_step_and_the_present_the_best_and_those_ahead_stay(
    limit: int | None,
    present: int,
    best: int | None,
    others: tuple[int, ...],
    left: list[int],
    tmp_path: Path,
) -> None:
    """Times of the folders, which a copy changes, run the other way."""
    folders = {step: tmp_path / f"checkpoint-{step}" for step in (2, 4, 6, 8)}
    for step, folder in folders.items():
        folder.mkdir()
        os.utime(folder, (100 - step, 100 - step))
    own = {folder for step, folder in folders.items() if step not in others}
    the_best = None if best is None else folders[best]
    remove_older(list(folders.values()), limit, folders[present], the_best, own)
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.iterdir()) == left


def test_leftovers_of_a_killed_run_are_not_sealed_with_a_new_checkpoint(checkpoint: Path) -> None:
    clear_place(checkpoint)
    assert not checkpoint.exists()
    clear_place(checkpoint)
