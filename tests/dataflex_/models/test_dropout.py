"""Dropout by rows: statistics, and what a mask depends on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dataflex.models.dropout import ModelDropout, RowDropout, dropouts

P = 0.3


class Net(nn.Module):
    """Two layers with a dropout before each, and one that drops nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.none = nn.Dropout(P), nn.Dropout(P), nn.Dropout(0.0)
        self.linear = nn.Linear(16, 16, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.none(self.second(self.linear(self.first(x))))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(*spans: tuple[int, int], width: int) -> dict[str, torch.Tensor]:
    mask = torch.zeros(len(spans), width, dtype=torch.long)
    for row, (start, stop) in enumerate(spans):
        mask[row, start:stop] = 1
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def masks(dropout: ModelDropout, module: nn.Module, inputs: Any, step: int = 0, first: int = 0,
          h: int = 16) -> torch.Tensor:  # fmt: skip
    """(b, t, h) of what a module makes of ones."""
    with dropout.placed(inputs, step, first):
        return module(torch.ones(*inputs["input_ids"].shape, h))


def test_masks_have_the_mean_and_variance_of_dropout_and_are_independent(net: Net) -> None:
    dropout = ModelDropout(seed=7)
    assert dropout.install(net) == 2
    inputs = batch(*[(0, 64)] * 8, width=64)
    drawn = [masks(dropout, module, inputs, step, h=128).numpy()
             for module in (net.first, net.second) for step in range(4)]  # fmt: skip
    x = np.stack(drawn)  # 8 draws, 8 rows, 64 tokens, 128 features
    assert set(np.unique(x)) == {np.float32(0), np.float32(1 / (1 - P))}
    n, variance = x.size, P / (1 - P)
    assert abs(x.mean() - 1) < 5 * (variance / n) ** 0.5
    assert x.var() == pytest.approx(variance, rel=0.01)
    each = (x - x.mean()) / x.std()
    pairs = {
        "modules": (each[:4], each[4:]),
        "steps": (each[:-1], each[1:]),
        "rows": (each[:, :-1], each[:, 1:]),
        "tokens": (each[:, :, :-1], each[:, :, 1:]),
        "features": (each[..., :-1], each[..., 1:]),
    }
    for name, (a, b) in pairs.items():
        assert abs(float((a * b).mean())) < 5 / a.size**0.5, name
    assert len({mask.tobytes() for draw in drawn for mask in draw}) == 64


def test_a_mask_depends_on_the_place_in_the_step_and_not_on_batch_or_padding(net: Net) -> None:
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    whole = masks(dropout, net.first, batch((0, 5), (0, 9), (0, 3), (0, 7), width=9))
    left = masks(dropout, net.first, batch((11, 16), (7, 16), width=16))  # rank 0, padded left
    right = masks(dropout, net.first, batch((0, 3), (0, 7), width=8), first=2)  # rank 1
    assert torch.equal(whole[0, :5], left[0, 11:])
    assert torch.equal(whole[1, :9], left[1, 7:])
    assert torch.equal(whole[2, :3], right[0, :3])
    assert torch.equal(whole[3, :7], right[1, :7])
    assert not torch.equal(whole[0, :5], whole[1, :5])
    packed = {"input_ids": torch.ones(1, 9, dtype=torch.long),
              "attention_mask": torch.ones(1, 1, 9, 9)}  # fmt: skip
    assert torch.equal(masks(dropout, net.first, packed, first=1)[0], whole[1])


def test_another_seed_step_or_module_has_another_mask(net: Net) -> None:
    inputs, found = batch((0, 9), width=9), []
    for seed in (7, 8):
        dropout = ModelDropout(seed)
        dropout.install(net)
        found += [masks(dropout, m, inputs, s) for m in (net.first, net.second) for s in (0, 1)]
        dropout.remove()
    assert len({mask.numpy().tobytes() for mask in found}) == 8


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_repeated_forward_has_the_same_masks(net: Net, reentrant: bool) -> None:
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    inputs, x = batch((0, 6), (0, 9), width=9), torch.randn(2, 9, 16, requires_grad=True)
    gradients = []
    for repeated in (False, True):
        net.zero_grad()
        with dropout.placed(inputs, 3, 4):
            y = checkpoint(net, x, use_reentrant=reentrant) if repeated else net(x)
            y.square().sum().backward()
        gradients.append(net.linear.weight.grad.clone())
    assert torch.equal(*gradients)


def test_the_global_random_state_is_neither_read_nor_moved(net: Net) -> None:
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    before, inputs = torch.get_rng_state(), batch((0, 9), width=9)
    once = masks(dropout, net.first, inputs)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(masks(dropout, net.first, inputs), once)


def test_what_has_no_rows_gets_torchs_own_dropout(net: Net) -> None:
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    tokens = torch.ones(18, 16)  # those of one expert, say
    with dropout.placed(batch((0, 9), (0, 9), width=9), 0, 0):
        torch.manual_seed(5)
        found = net.first(tokens)
    torch.manual_seed(5)
    assert torch.equal(found, nn.functional.dropout(tokens, P))
    scores = torch.ones(2, 9, 9, 9)  # of attention: b, as many heads as tokens, t, t
    with dropout.placed(batch((0, 4), (0, 9), width=9), 0, 0):
        assert net.first(scores)[0, 4:].any()
    assert torch.equal(net.eval().first(tokens), tokens)


def test_a_low_precision_input_keeps_its_dtype(net: Net) -> None:
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    inputs = batch((0, 9), width=9)
    with dropout.placed(inputs, 0, 0), torch.autocast("cpu", torch.bfloat16):
        low = net.first(torch.ones(1, 9, 16, dtype=torch.bfloat16))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low != 0, masks(dropout, net.first, inputs) != 0)


def test_the_models_own_modules_come_back(net: Net) -> None:
    own = dict(net.named_modules())
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    assert isinstance(net.first, RowDropout)
    assert net.none is own["none"]
    net.eval()
    dropout.remove()
    assert dict(net.named_modules()) == own
    assert not net.first.training


def test_a_dropout_with_two_places_in_the_model_is_replaced_in_both_and_comes_back(
    net: Net,
) -> None:
    shared = net.second = net.first
    dropout = ModelDropout(seed=7)
    dropout.install(net)
    assert isinstance(net.first, RowDropout)
    assert isinstance(net.second, RowDropout)
    dropout.remove()
    assert net.first is net.second is shared


class Attention(nn.Module):
    """Attention that passes a probability on, as those of transformers do."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.attention_dropout = p


def test_dropout_is_found_in_modules_and_in_what_they_pass_on(net: Net) -> None:
    model = nn.Sequential(net, Attention(0.1), Attention(0.0))
    assert dropouts(model) == {"0.first": P, "0.second": P, "1.attention_dropout": 0.1}
