"""What a store is told of a run: fields that must be equal for features to be compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradkernels import ProjectionSpec, canary
from torch import nn

from dataflex.data.rows import ROW_FIELDS, RunData
from dataflex.features.fields import space_fields
from gradstore.capture.slots import trainable_slots
from gradstore.errors import ProvenanceMismatch
from gradstore.export.gradient_space import GradientSpace, adapter_hash
from gradstore.store.writer import StoreWriter

SPEC = ProjectionSpec("sjlt", p=12, d=8, seed=3)


class Saved:
    """A tokenizer, as far as its files go."""

    def __init__(self, content: str = "{}") -> None:
        self.content = content

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "tokenizer.json").write_text(self.content)


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3, bias=False))
    for parameter in made[0].parameters():
        parameter.requires_grad = False
    return made


def fields(
    net: nn.Module | None = None, spec: ProjectionSpec = SPEC, tokenizer: Any = None, **rows: Any
) -> dict[str, Any]:
    net = net or model()
    arguments = SimpleNamespace(**{name: 1 for name in ROW_FIELDS} | rows)
    nothing: Any = None
    data = RunData(nothing, (), tokenizer or Saved(), "default", arguments, "sft")
    return space_fields(net, data, GradientSpace(list(trainable_slots(net)), spec, "float16"))


def test_the_projection_is_told_with_its_canary() -> None:
    told = fields()["projection"]
    assert told == {**SPEC.to_dict(), "canary": canary(SPEC).tolist()}
    assert any(told["canary"])


def test_fault_12_another_random_stream_is_refused_by_its_canary_alone(tmp_path: Path) -> None:
    told = fields()
    StoreWriter(tmp_path / "s", provenance=told).close()
    moved = [value + 0.5 for value in told["projection"]["canary"]]
    other = {**told, "projection": {**told["projection"], "canary": moved}}
    with pytest.raises(ProvenanceMismatch, match="same seed, another random stream"):
        StoreWriter(tmp_path / "s", provenance=other)


@pytest.mark.parametrize("part", ["frozen", "tokenizer", "rows", "seed"])
def test_what_moves_features_is_told(part: str) -> None:
    usual, net = fields(), model()
    with torch.no_grad():
        net[0].weight[0, 0] += 1  # type: ignore[index]
    others = {
        "frozen": lambda: fields(net),
        "tokenizer": lambda: fields(tokenizer=Saved("[]")),
        "rows": lambda: fields(cutoff_len=2),
        "seed": lambda: fields(spec=SPEC.with_seed(4)),
    }
    assert fields() == usual
    assert others[part]() != usual


def test_trained_weights_are_told_of_a_generation_not_of_the_store() -> None:
    net = model()
    before, names = fields(net), [slot.name for slot in trainable_slots(net)]
    hashed = adapter_hash(net, names)
    with torch.no_grad():
        net[1].weight[0, 0] += 1  # type: ignore[index]
    assert fields(net) == before
    assert adapter_hash(net, names) != hashed
