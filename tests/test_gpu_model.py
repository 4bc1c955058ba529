"""benchmarks/gpu_model.py counts every kernel that is launched; its times grow with the work."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")

GPU = Path(__file__).resolve().parent.parent / "kernels" / "gradkernels" / "gpu"


@pytest.fixture(scope="module")
def model(kept_script: Any) -> Any:
    """Compiles and reads each kernel once."""
    return kept_script("gpu_model")


@pytest.fixture(scope="module")
def case(kept_script: Any) -> Any:
    return kept_script("gpu").Case(p=4_000_000, d=512, rows=16)


def works(model: Any, case: Any, card: str, kind: str | None = None) -> list[Any]:
    return [
        work for passes in model.METHODS.values() for work in passes(case, kind, model.CARDS[card])
    ]


@pytest.mark.parametrize("card", ["H200", "A100"])
def test_every_kernel_that_is_launched_has_a_model(model: Any, case: Any, card: str) -> None:
    launched = {name for path in GPU.glob("*.py")
                for name in re.findall(r"(\w+)\[\(.*\)\]\(", path.read_text())}  # fmt: skip
    assert {"multiply", "scatter", "settle", "hadamard"} <= launched
    found = [*works(model, case, card), model.rotated(64, 512, model.CARDS[card])]
    assert {work.name for work in found} == launched
    for work in found:
        unit, bound, turns = work.bounds(model.CARDS[card])
        assert 0 < bound <= turns, f"{work.name} {unit}"


def test_time_grows_with_the_bytes_of_the_gradients(model: Any, case: Any) -> None:
    """Twice the parameters, twice the time of whatever reads them; the rest hardly grows."""
    card = model.CARDS["H200"]
    once, twice = (
        {work.name: work.bounds(card)[1] for work in works(model, each, "H200")}
        for each in (case, replace(case, p=2 * case.p))
    )
    for name in ("pack", "multiply", "measure", "scatter"):
        assert twice[name] == pytest.approx(2 * once[name], rel=0.2), name
    for name in once:
        assert once[name] <= twice[name] <= 2.01 * once[name], name
    wider = model.rotated(64, 512, card), model.rotated(128, 512, card)
    assert wider[1].bounds(card)[1] == pytest.approx(2 * wider[0].bounds(card)[1])


def test_bytes_are_those_of_the_type_and_of_a_features_vectors(model: Any, case: Any) -> None:
    def read(kind: str | None, dtype: torch.dtype) -> float:
        found = works(model, replace(case, dtype=dtype), "H200", kind)
        return float(next(work.memory for work in found if work.name == "measure"))

    numbers = case.rows * case.p
    assert read(None, torch.float32) == 4 * numbers
    assert read(None, torch.bfloat16) == 2 * numbers
    assert read("adam_marginal", torch.float32) == 4 * numbers + 3 * 4 * case.p


def test_an_older_card_takes_longer_where_no_cache_bounds_it(model: Any, case: Any) -> None:
    times = {
        card: {work.name: work.bounds(model.CARDS[card])[2] for work in works(model, case, card)}
        for card in ("H200", "A100")
    }
    for name in ("pack", "multiply", "measure"):
        assert times["A100"][name] > times["H200"][name], name
