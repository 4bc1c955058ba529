"""Checkpoints of a folder in the order of their steps, and of their moments by parameter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from dataflex.checkpoints.folders import checkpoints
from dataflex.checkpoints.weights import optimizer_order
from gradstore.export.moments import AdamMoments


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    made = [tmp_path / f"checkpoint-{step}" for step in (2, 10, 9)]
    for folder in (*made, tmp_path / "checkpoint-3.tmp"):
        folder.mkdir()
    assert checkpoints(tmp_path) == [made[0], made[2], made[1]]


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
