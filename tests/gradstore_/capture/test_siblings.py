"""Gradients of layers that share an input, in one product, against each layer's own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from gradstore.capture import hooks
from gradstore.capture.adapters import HookedModule, watched_linears
from gradstore.capture.hooks import HookedPass
from gradstore.capture.lora import fused_layers
from gradstore.capture.losses import Targets
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.recomputing import checkpointed
from gradstore.capture.siblings import Group, Product, Siblings
from gradstore.capture.slots import ParameterSlot, trainable_slots

#: Of a layer: q, k and v; o; gate and up; down.
INPUTS, LAYERS = 4, 2


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """(outputs, inputs) of each product that gradients are made of."""
    found: list[tuple[int, ...]] = []
    plain = hooks.outer_sums

    def noted(gradient: Tensor, x: Tensor) -> Tensor:
        found.append((gradient.shape[2], x.shape[2]))
        return plain(gradient, x)

    monkeypatch.setattr(hooks, "outer_sums", noted)
    return found


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """All groups that were begun."""
    found: list[Group] = []
    begin = Group.__init__

    def noted(self: Group, *args: Any) -> None:
        begin(self, *args)
        found.append(self)

    monkeypatch.setattr(Group, "__init__", noted)
    return found


def layer_of(model: Any, part: str, name: str) -> Any:
    """A layer of the first block."""
    return getattr(getattr(model.base_model.model.model.layers[0], part), name)


def taken(model: Any, batch: Any, twice: bool = False) -> Tensor:
    """Gradients (b, p); `twice` with gradient checkpointing."""
    with (
        GradientCapture(model) as capture,
        checkpointed(model) if twice else nullcontext(),
    ):
        found = torch.full((len(batch["labels"]), capture.p), torch.nan)

        def sink(slot: ParameterSlot, block: Tensor) -> None:
            found[:, slot.start : slot.start + slot.numel] = block

        capture.capture(batch, sink)
    return found


def right(found: Tensor, expected: Tensor) -> None:
    """To 1e-5 of each row's length."""
    assert expected.norm(dim=1).min() > 0
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 1e-5


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_matrices_of_one_input_take_one_product(
    llama: Any, made: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype, rounding: float,
) -> None:  # fmt: skip
    model, batch = llama.model().to(dtype), llama.collate(llama.rows(6))
    found = taken(model, batch)
    assert sum(inputs > 4 for _, inputs in made) == INPUTS * LAYERS  # of A; r = 4 enter B
    assert made.count((3 * 4, 32)) == made.count((2 * 4, 32)) == LAYERS
    monkeypatch.setattr(Group, "takes", lambda *_: False)
    made.clear()
    alone = taken(model, batch)
    assert len(made) == 2 * 7 * LAYERS
    assert (found - alone).abs().max() <= rounding * alone.abs().max()


def other_rank(model: Any) -> None:
    key = layer_of(model, "self_attn", "k_proj")
    key.lora_A["default"] = nn.Linear(32, 3, bias=False)
    key.lora_B["default"] = nn.Linear(3, 16, bias=False)


def tie(model: Any) -> None:
    query, key = (layer_of(model, "self_attn", name) for name in ("q_proj", "k_proj"))
    key.lora_A["default"].weight = query.lora_A["default"].weight


def tie_apart(model: Any) -> None:
    query, gate = layer_of(model, "self_attn", "q_proj"), layer_of(model, "mlp", "gate_proj")
    gate.lora_A["default"].weight = query.lora_A["default"].weight


def freeze(model: Any) -> None:
    layer_of(model, "self_attn", "k_proj").lora_A["default"].weight.requires_grad_(False)


def freeze_up(model: Any) -> None:
    layer_of(model, "self_attn", "q_proj").lora_B["default"].weight.requires_grad_(False)


def leave_to_peft(model: Any) -> None:
    layer_of(model, "self_attn", "k_proj").base_layer.register_forward_hook(lambda *_: None)


CHANGES = [other_rank, tie, tie_apart, freeze, freeze_up, leave_to_peft]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("twice", [False, True], ids=["", "checkpointed"])
def test_siblings_of_any_kind_give_the_gradients_of_rows_alone(
    llama: Any, change: Callable[[Any], None], twice: bool
) -> None:
    model, rows = llama.model(), llama.rows(4)
    change(model)
    expected = llama.gradients(model, rows).float()
    right(taken(model, llama.collate(rows), twice), expected)


def test_layers_that_are_computed_again_are_still_one_product(
    llama: Any, made: list[tuple[int, ...]], groups: list[Group]
) -> None:
    taken(llama.model(), llama.collate(llama.rows(4)), twice=True)
    assert made.count((3 * 4, 32)) == made.count((2 * 4, 32)) == LAYERS
    assert len(groups) == INPUTS * LAYERS


def test_only_the_group_that_the_backward_is_at_holds_memory(
    llama: Any, groups: list[Group]
) -> None:
    model, most = llama.model(), 0

    def sink(_slot: ParameterSlot, _block: Tensor) -> None:
        nonlocal most
        most = max(most, sum(group.numbers is not None for group in groups))

    with GradientCapture(model) as capture:
        capture.capture(llama.collate(llama.rows(4)), sink)
    assert most == 1
    assert all(group.numbers is None for group in groups)


# ---- outputs that are not in the loss --------------------------------------------------------


class Layers(nn.Module):
    """Some layers one behind another; of each pair of siblings one may not be in the loss."""

    def __init__(self, model: Any, unused: bool) -> None:
        super().__init__()
        found = [each for each in model.modules() if isinstance(each, peft_layer.Linear)]
        wide = [each for each in found if each.in_features == each.out_features == 32]
        self.layers, self.unused = nn.ModuleList(wide), unused

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for first, second in (self.layers[:2], self.layers[2:]):
            ours, other = first(x), second(x)
            again = first(x)  # a third call of the same input
            x = ours.tanh() + again.sin()
            total = total + (other.square().sum() if not self.unused else 0)
        return total + x.square().sum()


@pytest.fixture
def through(llama: Any) -> Callable[[bool, bool], Any]:
    """Blocks (b, numel) of `Layers` as a backward gives them, rows' gradients, the pass's end."""

    def run(unused: bool, follows: bool) -> Any:
        module = Layers(llama.model().eval(), unused)
        x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))
        parameters = trainable_slots(module)
        rows = [
            torch.autograd.grad(module(row[None]), list(parameters.values()), allow_unused=True)
            for row in x
        ]
        expected = {
            slot.name: torch.stack([
                torch.zeros(slot.numel) if row[i] is None else row[i].reshape(-1) for row in rows
            ])
            for i, slot in enumerate(parameters)
        }  # fmt: skip
        matrices, blocks = watched_linears(module, parameters), dict[str, Tensor]()
        targets = Targets.of({"labels": torch.ones(3, 5, dtype=torch.long)})
        seen = HookedPass(targets, lambda slot, block: blocks.update({slot.name: block}))
        module.requires_grad_(False)
        with fused_layers(module, matrices, lambda: seen):
            for each in matrices:
                each.module.register_forward_hook(lambda *_: None)  # as capture's
            total = module(x.requires_grad_(follows))
            seen.await_only(set(parameters))
            total.backward()
        return blocks, expected, lambda: seen.finish(parameters)

    return run


@pytest.mark.parametrize("follows", [False, True])
@pytest.mark.parametrize("unused", [False, True])
def test_a_sibling_that_is_not_in_the_loss_keeps_nothing_from_the_others(
    through: Callable[[bool, bool], Any], unused: bool, follows: bool, groups: list[Group]
) -> None:
    """And a layer that is called twice with one input is added up; also where that has a graph."""
    blocks, expected, finish = through(unused, follows)
    waiting = [group for group in groups if group.numbers is not None]
    assert len(waiting) == int(unused)  # the lowest layers', until the end
    finish()
    assert blocks.keys() == expected.keys()
    assert not any(block.requires_grad for block in blocks.values())
    assert not any(group.numbers is not None for group in groups)
    for name, rows in expected.items():
        assert (blocks[name] - rows).abs().max() <= 1e-5 * rows.abs().max(), name


# ---- which calls belong together -------------------------------------------------------------


def matrix(rank: int = 4) -> HookedModule:
    """A matrix that nobody reads."""
    return HookedModule(nn.Linear(8, rank, bias=False), None, None)


def test_calls_belong_together_by_the_very_tensor_unchanged_and_one_dtype() -> None:
    siblings, x, y = Siblings(), torch.randn(3, 8), torch.randn(3, 8)
    first, second = (siblings.join(matrix(), x, torch.float32) for _ in range(2))
    other_dtype = siblings.join(matrix(), x, torch.bfloat16)
    of_a_view = siblings.join(matrix(), x.view(3, 8), torch.bfloat16)
    between = siblings.join(matrix(), y, torch.float32)
    later = siblings.join(matrix(), x, torch.float32)
    x.add_(1)
    changed = siblings.join(matrix(), x, torch.float32)
    places = [first, other_dtype, of_a_view, between, later, changed]
    assert first.group is second.group
    assert len({id(place.group) for place in places}) == len(places)


def test_an_input_is_not_held() -> None:
    siblings = Siblings()
    x = torch.randn(3, 8)
    first = siblings.join(matrix(), x, torch.float32)
    assert first.group.input() is x
    del x
    assert first.group.input() is None
    assert siblings.join(matrix(), torch.randn(3, 8), torch.float32).group is not first.group


def filled(place: Any, value: float) -> tuple[Any, Tensor, Tensor]:
    """What a backward gives of a call, in the memory of its place."""
    room = place.room(torch.empty(3, 9))
    return place, torch.zeros(3, 8), room.fill_(value)


def values(products: list[Product]) -> list[list[float]]:
    """One number for each matrix of each product."""
    return [product.gradient[0].unique().tolist() for product in products]


def test_what_comes_is_given_on_when_the_last_of_its_group_is_there() -> None:
    siblings, x = Siblings(), torch.randn(3, 8)
    first, second, third = (siblings.join(matrix(r), x, torch.float32) for r in (4, 2, 3))
    assert siblings.arrive(*filled(third, 3.0)) == []
    assert siblings.arrive(*filled(first, 1.0)) == []
    (product,) = siblings.arrive(*filled(second, 2.0))
    assert product.gradient[0].tolist() == [1.0] * 4 + [2.0] * 2 + [3.0] * 3
    assert [each.module.out_features for each in product.watched] == [4, 2, 3]
    assert siblings.rest() == []
    assert siblings.join(matrix(), x, torch.float32).group is not first.group  # begun, and over


def test_a_group_that_another_one_overtakes_is_taken_apart() -> None:
    siblings, x, y = Siblings(), torch.randn(3, 8), torch.randn(3, 8)
    first, second, third = (siblings.join(matrix(), x, torch.float32) for _ in range(3))
    pair = [siblings.join(matrix(), y, torch.float32) for _ in range(2)]
    assert siblings.arrive(*filled(third, 3.0)) == []
    assert siblings.arrive(*filled(second, 2.0)) == []
    assert values(siblings.arrive(*filled(pair[1], 5.0))) == [[3.0], [2.0]]
    assert values(siblings.arrive(*filled(first, 1.0))) == [[1.0]]
    assert values(siblings.arrive(*filled(pair[0], 4.0))) == [[4.0, 5.0]]
    assert siblings.rest() == []


def test_a_call_by_itself_overtakes_a_group_too() -> None:
    siblings, x, y = Siblings(), torch.randn(3, 8), torch.randn(3, 8)
    alone = siblings.join(matrix(), y, torch.float32)
    _, late = (siblings.join(matrix(), x, torch.float32) for _ in range(2))
    assert siblings.arrive(*filled(late, 2.0)) == []
    assert values(siblings.arrive(*filled(alone, 5.0))) == [[2.0], [5.0]]
    assert siblings.rest() == []
