"""Which checkpoint a resume takes, and in which order its optimizer's moments are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments

from dataflex.checkpoints.folders import (
    check_sound,
    checkpoints,
    find_checkpoints,
    newest_sound,
    resume_point,
)
from dataflex.checkpoints.seal import seal
from dataflex.checkpoints.state import RunState
from dataflex.checkpoints.weights import optimizer_order
from dataflex.config.keys import DataFlexConfig, RunConfig
from gradstore.errors import BadInput, DamagedData
from gradstore.export.moments import AdamMoments


def make(folder: Path, step: int, run_id: str = "mine", complete: bool = True) -> Path:
    """A checkpoint with an optimizer in files of DeepSpeed's, which are not looked into."""
    made = folder / f"checkpoint-{step}"
    (made / "global_step").mkdir(parents=True)
    RunState(step, run_id, (1, 2, 3), "sha").save(made)
    if complete:
        (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal(made)
    return made


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    made = [make(tmp_path, step) for step in (2, 10, 9)]
    (tmp_path / "checkpoint-3.tmp").mkdir()
    assert checkpoints(tmp_path) == [made[0], made[2], made[1]]


def test_a_resume_takes_the_newest_whole_one(tmp_path: Path) -> None:
    make(tmp_path, 2)
    newest = make(tmp_path, 10)
    make(tmp_path, 12, complete=False)
    assert newest_sound(tmp_path, None)[0] == newest
    assert newest_sound(tmp_path, "mine")[0] == newest


def test_states_of_two_checkpoints_in_one_folder_are_refused_by_name(tmp_path: Path) -> None:
    sound, mixed = make(tmp_path, 2), make(tmp_path, 4)
    (mixed / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    (mixed / "dataflex" / "manifest.json").unlink()
    seal(mixed)
    says = r"checkpoint-4/dataflex/state\.json is of step 4, trainer_state\.json .* of step 2"
    with pytest.raises(DamagedData, match=says):
        check_sound(mixed)
    found, (passed,), _ = newest_sound(tmp_path, None)
    assert found == sound
    assert "is of step 4" in passed
    (mixed / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    seal(mixed)
    config = RunConfig(DataFlexConfig(gradstore_checkpoints=(str(mixed),)),
                       {"output_dir": str(tmp_path)}, tmp_path)  # fmt: skip
    with pytest.raises(DamagedData, match=says):
        find_checkpoints(config)


def test_where_no_checkpoint_can_be_resumed_from_the_reason_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of `save_only_model` all lack the same."""
    for step in (2, 4, 6):
        made = make(tmp_path, step, complete=False)
        (made / "global_step").rmdir()
        save_file({"a": torch.ones(2)}, made / "model.safetensors")
        (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        seal(made)
    with pytest.raises(BadInput) as refused:
        resume_point(RunConfig(DataFlexConfig(), {"output_dir": str(tmp_path)}, tmp_path))
    said = f"{refused.value}{caplog.text}"
    assert said.count("has no optimizer.pt (save_only_model, or deleted)") == 1
    assert "checkpoint-6' has no" in said
    assert said.endswith(f"2 more in {str(tmp_path)!r} cannot be resumed from either.")


def test_a_resume_never_takes_another_runs(tmp_path: Path) -> None:
    mine = make(tmp_path, 2)
    make(tmp_path, 10, run_id="another")
    assert newest_sound(tmp_path, "mine")[0] == mine
    assert newest_sound(tmp_path, "a third")[0] is None


class Decayed(nn.Module):
    """Weights that decay between others that do not, so that neither order is that of names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.last = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.first(x)))
        return out


@pytest.mark.parametrize("frozen", [(), ("first.weight", "last.bias")])
def test_moments_of_an_optimizers_file_belong_to_the_trainers_groups(
    frozen: tuple[str, ...], tmp_path: Path
) -> None:
    """The Trainer gives its optimizer decayed parameters first: numbers, not names, are saved."""
    torch.manual_seed(0)
    model = Decayed()
    for name in frozen:
        model.get_parameter(name).requires_grad = False
    args = TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.1, report_to="none")
    optimizer = Trainer(model, args).create_optimizer()
    model(torch.randn(4, 3)).pow(2).sum().backward()
    optimizer.step()
    by_name = AdamMoments.from_optimizer(optimizer, model)
    by_number = AdamMoments.from_state_dict(optimizer.state_dict(), optimizer_order(model))
    assert by_number.sha256() == by_name.sha256()
    assert len({tuple(m.m.flatten().tolist()) for m in by_name.parameters.values()}) > 1
