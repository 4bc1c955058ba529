"""A short training ends where an explicit loop ends, and leaves nothing behind."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from dataflex.data.rows import Rows
from dataflex.models.trained import ShortTraining, orders, trained_on
from dataflex.run.ranks import Ranks
from gradstore.errors import BadInput
from gradstore.export.token_rows import padded

TINY = Path(__file__).resolve().parents[3] / "examples" / "tiny" / "model"


def model_of(kind: str) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(str(TINY), dtype=torch.float32)
    if kind == "lora":
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.5,
                          init_lora_weights=False)  # fmt: skip
        model = get_peft_model(model, lora)
    return model.train()


def rows_of(*lengths: int) -> Rows:
    rng, rows = np.random.default_rng(5), []
    for length in lengths:
        ids = rng.integers(3, 60, length).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return Rows("target", Dataset.from_list(rows))


def run_of(model: Any) -> Any:
    return SimpleNamespace(model=model, collate=padded, ranks=Ranks(), shows_progress=False)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def state_of(model: Any, optimizer: Any) -> Any:
    """All that training goes on from, except gradients."""
    return (
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        copy.deepcopy(optimizer.state_dict()["state"]),
        torch.get_rng_state(), np.random.get_state(), random.getstate(),
        weights(model), model.config.use_cache,
    )  # fmt: skip


def check_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor | np.ndarray):
        assert (one == other).all()
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            check_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            check_equal(a, b)
    else:
        assert one == other


def explicit_loop(model: Any, rows: Rows, steps: list[list[int]], rate: float) -> list[float]:
    """Row by row, with the model's own loss and torch's AdamW; the losses of the steps."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0
    )
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = sum(model(**padded([rows.dataset[i]])).loss for i in step) / len(step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tokens", [None, 12])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_ends_where_an_explicit_loop_ends(kind: str, tokens: int | None) -> None:
    model, rows = model_of(kind), rows_of(9, 4, 12, 6, 7)
    own, positions = copy.deepcopy(model).eval(), np.array([0, 1, 2, 4])
    rate = 1e-3 if kind == "lora" else 1e-4
    steps: list[list[int]] = []
    for epoch in range(2):
        order = np.random.default_rng([7, 1, epoch]).permutation(positions).tolist()
        steps += [order[:3], order[3:]]
    losses = explicit_loop(own, rows, steps, rate)
    training = ShortTraining(2, rate, 3, tokens)
    with trained_on(run_of(model), rows, positions, training, [7, 1]) as first_and_last:
        found = weights(model)
    assert first_and_last == pytest.approx((np.mean(losses[:2]), np.mean(losses[2:])), rel=1e-5)
    moved = {name: (p - weights(model)[name]).norm() for name, p in own.named_parameters()}
    for name, p in own.named_parameters():
        # Adam divides by tiny second moments: where a gradient is nearly 0, rounding decides.
        difference = (found[name] - p).norm()
        assert difference <= 0.02 * moved[name] + 1e-9, name
    assert sum(moved.values()) > 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_run_is_as_it_was_to_the_bit(kind: str, fails: bool) -> None:
    model, rows = model_of(kind), rows_of(9, 4, 12, 6)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    model(**padded([rows.dataset[0]])).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    seen: list[int] = []
    for parameter in trained:  # what DDP reduces gradients by
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append(1))
    held = trained[0].grad = torch.full_like(trained[0], 0.25)
    before, training = state_of(model, optimizer), ShortTraining(3, 1e-2, 2)

    def go() -> None:
        with trained_on(run_of(model), rows, np.arange(4), training, [0]):
            assert any((p != before[6][n]).any() for n, p in model.named_parameters())
            assert all(p.grad is None for p in trained), "nothing is held while rows are scored"
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            go()
    else:
        go()
    check_equal(state_of(model, optimizer), before)
    assert trained[0].grad is held
    assert (held == 0.25).all()
    assert all(p.grad is None for p in trained[1:])
    assert not seen


def test_a_training_that_leaves_the_numbers_names_its_learning_rate_and_is_undone() -> None:
    model, rows = model_of("full"), rows_of(9, 4)
    before = weights(model)
    with (
        pytest.raises(BadInput, match=r"step \d of 4 .*'target' is nan with learning rate 1e\+30"),
        trained_on(run_of(model), rows, np.arange(2), ShortTraining(4, 1e30, 2), [0]),
    ):
        raise AssertionError("nothing is scored with it")
    check_equal(weights(model), before)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own_that_the_seed_fixes() -> None:
    positions, training = np.arange(3, 40), ShortTraining(3, 1e-3, 8)
    steps = [rows.tolist() for rows in orders(positions, training, [1, 2])]
    assert [len(rows) for rows in steps] == [8, 8, 8, 8, 5] * 3
    epochs = [[row for step in steps[i : i + 5] for row in step] for i in (0, 5, 10)]
    assert all(sorted(epoch) == positions.tolist() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps == [rows.tolist() for rows in orders(positions, training, [1, 2])]
    assert steps != [rows.tolist() for rows in orders(positions, training, [1, 3])]
