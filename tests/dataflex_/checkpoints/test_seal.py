"""Sealed checkpoints: what changes in one is refused by name, and the newest sound one taken."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dataflex.checkpoints.folders import check_sound, find_checkpoints, resume_point
from dataflex.checkpoints.seal import MANIFEST, seal, verify
from dataflex.checkpoints.state import RunState
from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.run.output_owner import remember_identity
from gradstore.errors import BadInput, DamagedData, StoreError


def made(folder: Path, step: int) -> Path:
    """A checkpoint as a LoRA run of two ranks saves it: the files of Trainer and peft, and ours."""
    torch.manual_seed(step)
    folder.mkdir(parents=True)
    weights = torch.nn.Linear(24, 24)
    optimizer = torch.optim.AdamW(weights.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + at))
    weights(torch.randn(2, 24)).sum().backward()
    optimizer.step()
    save_file(dict(weights.state_dict()), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "README.md").write_text("an adapter\n")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(scheduler.state_dict(), folder / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": np.random.get_state(),
              "cpu": torch.get_rng_state()}  # fmt: skip
    for rank in (0, 1):
        torch.save(states, folder / f"rng_state_{rank}.pth")
    RunState(step, "run-a", (2, 2, 2), "0" * 64, {"seed": 1}, {"rewards": np.ones(3)}).save(folder)
    log = [{"step": step, "learning_rate": 1e-3, "epoch": 0.5}]
    state = {"global_step": step, "max_steps": 9, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    seal(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Folder of a run with two sound checkpoints."""
    remember_identity(tmp_path / "run", "run-a")
    for step in (2, 4):
        made(tmp_path / "run" / f"checkpoint-{step}", step)
    return tmp_path / "run"


def configured(run: Path, resume: str | None = None) -> RunConfig:
    keys = {"output_dir": str(run), "resume_from_checkpoint": resume}
    return RunConfig(DataFlexConfig(), keys, Path("run.yaml"))


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def refusal(checkpoint: Path) -> StoreError:
    """The error that a resume from a named checkpoint ends with."""
    with pytest.raises(StoreError) as caught:
        resume_point(configured(checkpoint.parent, str(checkpoint)))
    return caught.value


def check_refused_and_passed_over(
    run: Path, path: Path, caplog: pytest.LogCaptureFixture
) -> StoreError:
    """A changed file of checkpoint-4 is named, and checkpoint-2 taken in its place, in one line."""
    error = refusal(run / "checkpoint-4")
    assert str(path) in str(error)
    for resume in (None, "true"):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert resume_point(configured(run, resume)) == run / "checkpoint-2"
        (line,) = caplog.messages
        assert line.startswith(f"resuming from {run / 'checkpoint-2'}: {run / 'checkpoint-4'} is")
        assert str(path) in line
    return error


def test_a_flipped_bit_of_any_file_is_refused_by_name_and_the_newest_sound_one_taken(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(5)
    for path in files(run / "checkpoint-4"):
        whole = path.read_bytes()
        at, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        assert check_refused_and_passed_over(run, path, caplog).exit_code == 4
        path.write_bytes(whole)
    assert resume_point(configured(run)) == run / "checkpoint-4"


def removed(path: Path) -> None:
    path.unlink()


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def of_another_run(path: Path) -> None:
    other = path.parent.with_name("checkpoint-2") / path.name
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("change", [removed, cut_short, of_another_run])
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "optimizer.pt", "rng_state_1.pth", "trainer_state.json"]
)
def test_a_file_removed_cut_short_or_of_another_run_is_refused_by_name(
    name: str, change: Callable[[Path], None], run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoint-4" / name
    if name.startswith("rng") and change is of_another_run:
        state = torch.load(path, weights_only=False)
        torch.save({**state, "cpu": torch.zeros_like(state["cpu"])}, path)
    else:
        change(path)
    check_refused_and_passed_over(run, path, caplog)


@pytest.mark.parametrize("name", ["rng_state_2.pth", "adapter_model.bin", "global_step4/x.pt"])
def test_an_added_file_that_a_resume_would_read_is_refused_others_are_not(
    name: str, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for beside in ("notes.txt", ".DS_Store", "dataflex/.DS_Store"):
        (run / "checkpoint-4" / beside).write_text("the good one")
    assert resume_point(configured(run)) == run / "checkpoint-4"
    path = run / "checkpoint-4" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"x")
    check_refused_and_passed_over(run, path, caplog)


def test_two_swapped_files_are_refused(run: Path) -> None:
    a, b = (run / "checkpoint-4" / f"dataflex/{name}" for name in ("arrays.npz", "state.json"))
    contents = a.read_bytes(), b.read_bytes()
    b.write_bytes(contents[0])
    a.write_bytes(contents[1])
    assert refusal(run / "checkpoint-4").exit_code == 4


def test_a_checkpoint_without_its_manifest_is_incomplete(run: Path) -> None:
    (run / "checkpoint-4" / MANIFEST).unlink()
    error = refusal(run / "checkpoint-4")
    assert error.exit_code == 2
    assert MANIFEST in str(error)
    assert resume_point(configured(run)) == run / "checkpoint-2"


def test_a_checkpoint_made_before_there_were_manifests_is_resumed(run: Path) -> None:
    state = run / "checkpoint-4" / "dataflex" / "state.json"
    (run / "checkpoint-4" / MANIFEST).unlink()
    state.write_text(json.dumps({**json.loads(state.read_text()), "schema": 2}))
    assert resume_point(configured(run)) == run / "checkpoint-4"


def test_a_moved_checkpoint_is_sound(run: Path, tmp_path: Path) -> None:
    moved = shutil.move(run / "checkpoint-4", tmp_path / "kept")
    assert resume_point(configured(run, str(moved))) == Path(moved)


def test_one_changed_on_purpose_can_be_sealed_again(run: Path) -> None:
    checkpoint = run / "checkpoint-4"
    (checkpoint / "README.md").write_text("another word\n")
    assert "README.md" in str(refusal(checkpoint))
    seal(checkpoint)
    check_sound(checkpoint)


def test_where_no_checkpoint_is_sound_the_run_does_not_begin_anew(run: Path) -> None:
    for step in (2, 4):
        cut_short(run / f"checkpoint-{step}" / "optimizer.pt")
    with pytest.raises(DamagedData, match=r"checkpoint-4/optimizer\.pt"):
        resume_point(configured(run))


def test_an_earlier_runs_checkpoints_are_not_resumed_from(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remember_identity(run, "run-b")
    with caplog.at_level(logging.WARNING):
        assert resume_point(configured(run)) is None
    assert len(caplog.messages) == 1
    assert caplog.messages[0].count("belongs to an earlier run") == 2


def test_an_export_takes_sound_checkpoints_and_needs_no_optimizer_of_them(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    both = [run / "checkpoint-2", run / "checkpoint-4"]
    assert find_checkpoints(configured(run)) == both
    of_another_run(run / "checkpoint-4" / "adapter_model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert find_checkpoints(configured(run)) == both[:1]
    assert "checkpoint-4/adapter_model.safetensors" in caplog.text
    with pytest.raises(DamagedData, match="adapter_model"):
        find_checkpoints(configured(run, str(both[1])))


def test_the_manifest_is_written_last_and_without_it_nothing_is_compared(tmp_path: Path) -> None:
    checkpoint = made(tmp_path / "checkpoint-4", 4)
    newest = max(files(checkpoint), key=lambda path: path.stat().st_mtime_ns)
    assert newest == checkpoint / MANIFEST
    newest.unlink()
    verify(checkpoint)


def test_a_manifest_of_a_later_version_is_refused_as_that(run: Path) -> None:
    from gradstore.format import canonical

    path = run / "checkpoint-4" / MANIFEST
    document = {**json.loads(path.read_text()), "schema": 9}
    path.write_bytes(canonical.canonical_json(canonical.seal(document)))
    error = refusal(run / "checkpoint-4")
    assert isinstance(error, BadInput)
    assert "schema 9" in str(error)
