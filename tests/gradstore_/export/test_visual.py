"""COINCIDE's features: tanh, means by kind of token, unit blocks; padding changes nothing."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradstore.export.visual import VisualStates, even_layers, modality_blocks, visual_token_ids

IMAGE = 7


class Tokens(nn.Module):
    """Hidden state of layer l at a token: its id's row, times l + 1; dropout where not in eval."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(
        self, input_ids: Any, attention_mask: Any, output_hidden_states: bool, logits_to_keep: int
    ) -> Any:
        assert logits_to_keep == 1
        states = self.dropout(self.table(input_ids))
        return SimpleNamespace(hidden_states=[states * (layer + 1) for layer in range(4)])


def batch(ids: list[list[int]], pad: int = 0, left: bool = False) -> dict[str, torch.Tensor]:
    width = max(map(len, ids)) + pad
    rows, mask = [], []
    for row in ids:
        gap = [IMAGE] * (width - len(row))  # padding that looks like an image
        ones, zeros = [1] * len(row), [0] * len(gap)
        rows.append([*gap, *row] if left else [*row, *gap])
        mask.append([*zeros, *ones] if left else [*ones, *zeros])
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask),
            "labels": torch.tensor(rows)}  # fmt: skip


def test_features_are_what_the_definition_says() -> None:
    torch.manual_seed(0)
    model = Tokens().train()
    found = VisualStates(model, [0, 2], [IMAGE])(batch([[1, IMAGE, IMAGE, 2, 3], [4, 5]]))
    table = model.table.weight.detach()
    blocks = []
    for scale in (2, 4):  # layers 0 and 2 are hidden states 1 and 3
        for ids in ([IMAGE, IMAGE], [1, 2, 3]):
            mean = (table[ids] * scale).tanh().mean(0)
            blocks.append(mean / mean.norm())
    assert torch.allclose(found[0], torch.cat(blocks) / math.sqrt(4), atol=1e-6)
    assert found[0].norm().item() == pytest.approx(1, abs=1e-6)
    assert not found[1, :4].any(), "a row without an image has an empty image block"
    assert found[1].norm().item() == pytest.approx(math.sqrt(0.5), abs=1e-6)
    assert model.training


def test_padding_on_either_side_changes_nothing() -> None:
    states = VisualStates(Tokens(), [1], [IMAGE])
    rows = [[1, IMAGE, 3], [IMAGE, IMAGE, 2, 2, 5]]
    plain = states(batch(rows))
    for pad, left in ((0, True), (6, False), (6, True)):
        assert torch.allclose(plain, states(batch(rows, pad, left)), atol=1e-6)


def test_states_that_are_not_finite_under_padding_do_not_spread() -> None:
    hidden = torch.ones(1, 3, 2)
    hidden[0, 2] = torch.inf
    seen = torch.tensor([[True, False, False]]), torch.tensor([[False, True, False]])
    assert torch.isfinite(modality_blocks(hidden, *seen)).all()


def test_five_layers_are_spread_as_the_authors_spread_them() -> None:
    assert even_layers(24) == (3, 7, 11, 15, 19)
    assert even_layers(1) == (0,)
    assert all(len(even_layers(n)) == 5 and max(even_layers(n)) < n for n in range(6, 90))


def test_a_config_of_text_alone_has_no_visual_token() -> None:
    assert visual_token_ids(SimpleNamespace(vocab_size=3)) == ()
    both = SimpleNamespace(image_token_id=5, image_token_index=5, video_token_id=6)
    assert visual_token_ids(both) == (5, 6)
