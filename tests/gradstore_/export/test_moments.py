"""Adam moments read from optimizers, saved and loaded, by parameter name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn

from gradstore.capture.slots import ParameterSlot
from gradstore.errors import BadInput, DamagedData, StoreIOError
from gradstore.export.moments import AdamConstants, AdamMoments, ParameterMoments


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def stepped(model: nn.Module, optimizer: Any, steps: int = 3) -> Any:
    for step in range(steps):
        model(torch.ones(5, 3) * (step + 1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def slots_of(model: nn.Module) -> list[ParameterSlot]:
    found: list[ParameterSlot] = []
    for name, parameter in model.named_parameters():
        start = found[-1].start + found[-1].numel if found else 0
        found.append(ParameterSlot(name, tuple(parameter.shape), start, parameter.numel()))
    return found


@pytest.mark.parametrize(
    "options", [{}, {"foreach": True}, {"fused": True}, {"capturable": False, "amsgrad": True}]
)
def test_moments_are_the_optimizers_own_by_name(options: dict[str, Any]) -> None:
    model = small_model()
    optimizer = stepped(model, torch.optim.AdamW(model.parameters(), betas=(0.8, 0.95), **options))
    moments = AdamMoments.from_optimizer(optimizer, model)
    assert set(moments.parameters) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        found = moments.parameters[name]
        assert torch.equal(found.m, optimizer.state[parameter]["exp_avg"])
        assert torch.equal(found.v, optimizer.state[parameter]["exp_avg_sq"])
        assert found.constants == AdamConstants(0.8, 0.95, 1e-8, 3)
    before = moments.sha256()
    stepped(model, optimizer, 1)
    assert moments.sha256() == before  # a copy, not a view
    assert AdamMoments.from_optimizer(optimizer, model).sha256() != before


def test_groups_may_differ_and_names_have_no_prefixes() -> None:
    model = small_model()
    groups = [
        {"params": list(model[1].parameters()), "betas": (0.5, 0.6), "eps": 1e-3},
        {"params": list(model[0].parameters())},
    ]
    optimizer = stepped(model, torch.optim.Adam(groups))
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    try:
        prepared = Accelerator(cpu=True).prepare(optimizer)
        moments = AdamMoments.from_optimizer(prepared, wrapped)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert type(prepared).__name__ == "AcceleratedOptimizer"
    assert moments.parameters["1.weight"].constants == AdamConstants(0.5, 0.6, 1e-3, 3)
    assert moments.parameters["0.bias"].constants == AdamConstants(0.9, 0.999, 1e-8, 3)
    assert moments.sha256() == AdamMoments.from_optimizer(optimizer, model).sha256()


def test_an_optimizer_that_has_not_stepped_has_zeros() -> None:
    model = small_model()
    moments = AdamMoments.from_optimizer(torch.optim.AdamW(model.parameters()), model)
    for name, parameter in model.named_parameters():
        found = moments.parameters[name]
        assert found.m.shape == found.v.shape == parameter.shape
        assert not found.m.any()
        assert not found.v.any()
        assert found.constants.step == 0


def test_a_step_multiplies_a_small_gradient_with_the_scale() -> None:
    """Finite differences of torch's Adam without momentum, in a gradient small beside the root."""
    model = small_model()
    optimizer = stepped(model, torch.optim.Adam(model.parameters(), lr=1.0, betas=(0.0, 0.999)))
    scale = AdamMoments.from_optimizer(optimizer, model).step_scale(slots_of(model))
    with torch.no_grad():
        for parameter in model.parameters():
            root = optimizer.state[parameter]["exp_avg_sq"].sqrt()
            parameter.grad = 1e-2 * root
    grads = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    optimizer.step()
    moved = before - torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    known = scale > 0
    torch.testing.assert_close(moved[known], (scale * grads)[known], rtol=1e-3, atol=1e-6)


def test_a_coordinate_without_a_gradient_so_far_counts_nothing() -> None:
    model = small_model()
    parameters = list(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters())
    slots = slots_of(model)
    first = slots[0].numel
    at_first = AdamMoments.from_optimizer(optimizer, model).step_scale(slots)
    assert at_first.tolist() == [1.0] * (slots[-1].start + slots[-1].numel)
    for number, (_, parameter) in enumerate(parameters):
        parameter.grad = torch.ones_like(parameter) if number else torch.zeros_like(parameter)
    optimizer.step()
    scale = AdamMoments.from_optimizer(optimizer, model).step_scale(slots)
    assert not scale[:first].any()
    assert (scale[first:] > 0.99).all()


def test_frozen_parameters_outside_the_optimizer_have_no_moments() -> None:
    model = small_model()
    optimizer = torch.optim.Adam(model[0].parameters())
    names = set(AdamMoments.from_optimizer(optimizer, model).parameters)
    assert names == {"0.weight", "0.bias"}


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad])
def test_fault_13_optimizers_without_moments_are_refused_naming_sgd_and_sign(
    kind: Any, steps: int
) -> None:
    model = small_model()
    optimizer = stepped(model, kind(model.parameters(), lr=1e-3), steps)
    with pytest.raises(BadInput, match=rf"{kind.__name__}.*0\.weight.*`sgd` or `sign`"):
        AdamMoments.from_optimizer(optimizer, model)


def test_a_state_of_another_shape_is_refused_by_name() -> None:
    model = small_model()
    optimizer = stepped(model, torch.optim.Adam(model.parameters()))
    state = optimizer.state[model[1].weight]
    state["exp_avg"] = state["exp_avg"].reshape(-1)
    with pytest.raises(BadInput, match=r"exp_avg of parameter 1\.weight.*\(8,\).*\(2, 4\)"):
        AdamMoments.from_optimizer(optimizer, model)


def test_saving_and_loading_gives_the_same_bits(tmp_path: Path) -> None:
    model = small_model()
    optimizer = stepped(model, torch.optim.Adam(model.parameters(), betas=(0.85, 0.9)))
    moments = AdamMoments.from_optimizer(optimizer, model)
    path = tmp_path / "checkpoint-3" / "dataflex" / "moments.safetensors"
    moments.save(path)
    first = path.read_bytes()
    moments.save(path)
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["moments.safetensors"]
    loaded = AdamMoments.load(path)
    assert loaded.sha256() == moments.sha256()
    for name, own in moments.parameters.items():
        assert torch.equal(loaded.parameters[name].m, own.m)
        assert torch.equal(loaded.parameters[name].v, own.v)
        assert loaded.parameters[name].constants == own.constants


def test_moments_of_a_file_belong_to_parameters_by_name_whatever_their_order(
    tmp_path: Path,
) -> None:
    """Equal shapes throughout, and a file whose names lie in another order than the model's."""
    constants = AdamConstants(0.9, 0.999, 1e-8, 3)
    parts = {
        name: ParameterMoments(torch.full((2, 2), float(i)), torch.full((2, 2), i + 0.5), constants)
        for i, name in enumerate(("z.weight", "a.weight", "m.weight"))
    }
    path = tmp_path / "moments.safetensors"
    AdamMoments(parts).save(path)
    loaded = AdamMoments.load(path)
    for i, name in enumerate(("z.weight", "a.weight", "m.weight")):
        assert loaded.parameters[name].m.unique().tolist() == [float(i)]
        assert loaded.parameters[name].v.unique().tolist() == [i + 0.5]


def test_the_hash_depends_on_every_part_but_not_on_the_order() -> None:
    def make(step: int = 1, value: float = 0.0, swap: bool = False) -> str:
        m = torch.tensor([value, 1.0])
        one = ParameterMoments(m, m + 1, AdamConstants(0.9, 0.99, 1e-8, step))
        two = ParameterMoments(torch.ones(3), torch.ones(3), AdamConstants(0.9, 0.99, 1e-8, 1))
        pairs = [("a", one), ("b", two)]
        return AdamMoments(dict(reversed(pairs) if swap else pairs)).sha256()

    assert make() == make(swap=True)
    assert len({make(), make(step=2), make(value=0.5)}) == 3


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    moments = AdamMoments.from_optimizer(
        torch.optim.Adam((model := small_model()).parameters()), model
    )
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(StoreIOError, match="cannot write"):
        moments.save(blocked / "moments.safetensors")
    target = tmp_path / "moments.safetensors"
    target.mkdir()
    with pytest.raises(StoreIOError):
        moments.save(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "moments.safetensors"]


def test_files_that_are_no_moments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moments.safetensors"
    with pytest.raises(BadInput, match="no Adam moments at"):
        AdamMoments.load(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(BadInput, match="holds no Adam moments"):
        AdamMoments.load(path)
    model = small_model()
    AdamMoments.from_optimizer(torch.optim.Adam(model.parameters()), model).save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DamagedData, match="not a whole"):
        AdamMoments.load(path)
    for header, message in (("{", "parse"), ('{"a": {}}', "disagree"), ("[]", "disagree")):
        save_file({"m.b": torch.zeros(2)}, path, {"dataflex-adam-moments-1": header})
        with pytest.raises(DamagedData, match=message):
            AdamMoments.load(path)
