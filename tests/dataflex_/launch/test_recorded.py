"""What is read off a trainer: the rule of its optimizer, a model's precision, a row's losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from dataflex.data.rows import Rows, RunData
from dataflex.launch.recorded import (
    _check_model,
    _optimizer_of,
    _RecordedTrainer,
    _Session,
    row_sums,
)
from gradstore.errors import BadInput


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_a_rows_sum_is_the_model_librarys_loss_of_that_row() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(0, 11, (3, 6))
    labels[0, :4] = labels[2, 1] = -100
    sums = row_sums(logits, labels)
    for row in range(3):
        one = ForCausalLMLoss(logits[[row]], labels[[row]], 11, num_items_in_batch=torch.tensor(1))
        torch.testing.assert_close(sums[row], one)


def test_an_optimizers_rule_and_moments_are_read_by_name(model: nn.Sequential) -> None:
    groups = [
        {"params": [model[0].weight, model[1].weight], "weight_decay": 0.1},
        {"params": [model[0].bias, model[1].bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9), eps=1e-6)
    rule, moments = _optimizer_of(optimizer, model)
    assert (rule.betas, rule.eps, rule.weight_decay) == ((0.8, 0.9), 1e-6, 0.1)
    assert rule.undecayed == {"0.bias", "1.bias"}
    assert moments is None
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    _, moments = _optimizer_of(optimizer, model)
    assert moments is not None
    assert moments.steps == 3
    state = optimizer.state[model[1].weight]
    torch.testing.assert_close(moments.first["1.weight"], state["exp_avg"])
    torch.testing.assert_close(moments.second["1.weight"], state["exp_avg_sq"])


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
        lambda m: torch.optim.Adam(m.parameters()),
        lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True),
        lambda m: torch.optim.AdamW(m.parameters(), maximize=True),
        lambda m: torch.optim.AdamW([{"params": [m[0].weight], "lr": 1e-3},
                                     {"params": [m[1].weight], "lr": 2e-3}]),
        lambda m: torch.optim.AdamW([{"params": [m[0].weight], "weight_decay": 0.1},
                                     {"params": [m[1].weight], "weight_decay": 0.2}]),
    ],
)  # fmt: skip
def test_another_rule_than_plain_adamw_is_refused(make: Any, model: nn.Sequential) -> None:
    with pytest.raises(BadInput, match=r"optim: adamw_torch"):
        _optimizer_of(make(model), model)


def test_dropout_and_fewer_bits_are_refused(model: nn.Sequential) -> None:
    _check_model(model, "no")
    with pytest.raises(BadInput, match=r"dropout \(2: 0.5\).*config.json"):
        _check_model(nn.Sequential(*model, nn.Dropout(0.5)), "no")
    with pytest.raises(BadInput, match="mixed precision bf16"):
        _check_model(model, "bf16")
    with pytest.raises(BadInput, match=r"torch.bfloat16.*float32"):
        _check_model(model.bfloat16(), "no")


@pytest.mark.parametrize(("accepts", "items"), [(True, 7), (False, 7), (True, None), (False, None)])
def test_a_step_is_divided_as_the_trainer_divides_it(accepts: bool, items: int | None) -> None:
    """By the step's target tokens, or by a micro-batch's own and the number of micro-batches."""
    trainer: Any = object.__new__(_RecordedTrainer)
    trainer.args = SimpleNamespace(device=torch.device("cpu"))
    trainer.model_accepts_loss_kwargs = accepts
    labels = torch.tensor([[5, -100, 1, 2], [-100, -100, 3, -100]])
    made = trainer._noted(torch.tensor([8, 3]), {"input_ids": labels, "labels": labels}, items, 2)
    assert made.rows.tolist() == [8, 3]
    assert set(made.inputs.tensors) == {"input_ids"}
    # The first token is never predicted: three targets.
    assert made.inputs.denominator == (7 if accepts and items else 3 * 2)


def test_several_devices_are_refused_before_a_model_is_loaded() -> None:
    rows = Rows("t", Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]}))
    nothing: Any = None
    data = RunData(rows, (rows,), nothing, "default", nothing, "sft")
    session = _Session({}, lambda begun: None, lambda steps: None)
    session.take_data(data, SimpleNamespace(world_size=1, n_gpu=0), None)
    for world, gpus in ((2, 1), (1, 2)):
        with pytest.raises(BadInput, match=r"2 devices.*CUDA_VISIBLE_DEVICES=0"):
            session.take_data(data, SimpleNamespace(world_size=world, n_gpu=gpus), None)
