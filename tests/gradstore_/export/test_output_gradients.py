"""Gradients at the output layer against autograd, and what has none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradstore.errors import BadInput
from gradstore.export.output_gradients import SIDE, OutputGradients, target_tokens

WORDS, WIDTH = 17, 6


class Lm(nn.Module):
    """Words, a matrix in the place of LoRA's, the output layer."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.before = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.eye_(self.before.weight)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(WIDTH, WORDS) if head is None else head

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        states = self.dropout(self.words(input_ids).cumsum(1))
        return SimpleNamespace(logits=self.head(self.before(states)))


def batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, WORDS, (4, 9))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    labels[2] = -100  # no target token
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def test_a_rows_vector_is_the_projected_gradient_of_a_matrix_before_the_output_layer() -> None:
    torch.manual_seed(0)
    model, given = Lm(), batch()
    model.train()
    embed = OutputGradients(model, 5)
    found = embed(given)
    assert found.shape == (4, SIDE * SIDE)
    assert model.training
    left, right = embed._sides
    model.eval()
    for row in (0, 1, 3):
        logits = model(given["input_ids"][row : row + 1]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, given["labels"][row, 1:])
        (gradient,) = torch.autograd.grad(loss, model.before.weight)
        torch.testing.assert_close(
            found[row], (left.T @ gradient @ right).flatten(), rtol=1e-4, atol=1e-6
        )
    assert (found[2] == 0).all()
    assert target_tokens(given).tolist() == [6, 3, 0, 6]


def test_the_seed_decides_the_projection() -> None:
    torch.manual_seed(0)
    model, given = Lm(), batch()
    one, same, other = (OutputGradients(model, seed)(given) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_model_whose_output_layer_is_not_linear_is_refused() -> None:
    with pytest.raises(BadInput, match="output layer is Sequential, not linear"):
        OutputGradients(Lm(nn.Sequential(nn.Linear(WIDTH, WORDS))), 0)
    with pytest.raises(BadInput, match="NoneType"):
        OutputGradients(nn.Linear(2, 2), 0)


def test_the_output_layer_runs_on_target_tokens_alone() -> None:
    """Its outputs, a vocabulary wide, are the most that a pass holds."""
    model, given = Lm(), batch()
    embed = OutputGradients(model, 5)
    embed(given)  # the first batch shows that it may
    seen: list[int] = []
    model.head.register_forward_hook(lambda _, __, output: seen.append(output[..., 0].numel()))
    embed(given)
    assert seen == [int(target_tokens(given).sum())]
