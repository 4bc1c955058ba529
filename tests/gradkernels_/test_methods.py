"""The table of projections: whole, pinned, and loud about what it does not hold."""

from __future__ import annotations

import dataclasses
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec, canary, methods, project, project_reference
from gradkernels.dispatch import BACKENDS, Accumulator, choose_backend
from gradkernels.methods import TABLE, Entry
from gradkernels.reference import matrix_rows, scale
from gradkernels.spec import Method

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-a-projection.md").read_text()
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_methods_stream_never_changes() -> None:
    """Each decides every bit of a matrix that stores were made with."""
    streams = {method: entry.stream for method, entry in TABLE.items()}
    assert streams == {"rademacher": 0, "gaussian": 1, "sjlt": 2, "trak": 3}


def test_a_user_may_ask_for_what_the_table_holds() -> None:
    assert get_args(Method) == tuple(TABLE)


@pytest.mark.parametrize("method", TABLE)
def test_everything_that_the_table_names_is_there(method: str) -> None:
    assert callable(methods.rows_of(method))
    assert set(TABLE[method].sums) <= set(BACKENDS)
    for backend in TABLE[method].sums:
        if backend == "triton":
            pytest.importorskip("triton", reason="Triton comes with torch on Linux alone")
        assert callable(methods.sums_of(method, backend))


@pytest.fixture
def fjlt(monkeypatch: pytest.MonkeyPatch) -> ProjectionSpec:
    """A spec of a method that has a line of the table, and nothing behind it."""
    entry = Entry(stream=9, rows="gradkernels.reference:fjlt_rows", scale=lambda d, s: 1.0,
                  sparse=False, whole=False, sums={})  # fmt: skip
    monkeypatch.setitem(TABLE, "fjlt", entry)
    return ProjectionSpec("fjlt", p=50, d=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", [None, *BACKENDS])
def test_a_method_of_the_table_alone_is_refused_by_each_backend(
    fjlt: ProjectionSpec, backend: Any
) -> None:
    """By its name, and never projected as another one."""
    with pytest.raises(ValueError, match="fjlt"):
        project(torch.ones(2, 50), fjlt, backend=backend)
    with pytest.raises(ValueError, match=r"fjlt|numba"):
        choose_backend(fjlt, CUDA, backend)
    for each in BACKENDS:
        with pytest.raises(ValueError, match="fjlt"):
            methods.sums_of("fjlt", each)


def test_a_method_of_the_table_alone_has_no_oracle_and_no_fingerprint(fjlt: ProjectionSpec) -> None:
    for ask in (lambda: project_reference(np.ones((2, 50)), fjlt), lambda: canary(fjlt)):
        with pytest.raises(AttributeError, match="fjlt_rows"):
            ask()


@pytest.mark.parametrize("backend", ["numba", "torch", "triton", "trak", "int8"])
def test_a_backend_names_the_methods_that_it_does(backend: str) -> None:
    for method in TABLE.keys() - set(methods.doing(backend)):
        with pytest.raises(ValueError, match=f"does {', '.join(methods.doing(backend))}, not "
                                             f"method='{method}'"):  # fmt: skip
            methods.sums_of(method, backend)


def test_a_spec_of_an_unknown_method_is_projected_by_nobody() -> None:
    spec = ProjectionSpec("sjlt", p=50, d=8)
    object.__setattr__(spec, "method", "fjlt")
    asks = (
        lambda: matrix_rows(spec, np.arange(3)), lambda: scale(spec), lambda: canary(spec),
        lambda: Accumulator(spec, 1), lambda: choose_backend(spec, CPU, "torch"),
    )  # fmt: skip
    for ask in asks:
        with pytest.raises(ValueError, match="method='fjlt' is not one of rademacher, gaussian"):
            ask()


def test_the_page_on_adding_a_projection_names_what_exists() -> None:
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|md))`", PAGE):
        assert (ROOT / path).exists(), path
    dotted = re.findall(r"`(gradkernels(?:\.\w+)+)`", PAGE)
    assert len(dotted) >= 6
    for module, _, name in (each.rpartition(".") for each in dotted):
        if not module.startswith("gradkernels.gpu"):
            assert hasattr(import_module(module), name), f"{module}.{name}"
        else:  # Triton need not be there
            text = (ROOT / "kernels" / f"{module.replace('.', '/')}.py").read_text()
            assert f"def {name}(" in text
    told = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert told == [field.name for field in dataclasses.fields(Entry)]
    assert "\nPATHS = [" in (ROOT / "tests/gradkernels_/test_projection_paths.py").read_text()


def test_the_projection_on_the_page_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and a line: projected on a CPU as its oracle says, and squared lengths are kept."""
    code, line = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    module = ModuleType("gradkernels.ternary")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "gradkernels.ternary", module)
    added: dict[str, Entry] = eval("{" + line + "}", dict(vars(methods)))
    assert added["ternary"].stream == 1 + max(entry.stream for entry in TABLE.values())
    monkeypatch.setitem(TABLE, "ternary", added["ternary"])
    spec = ProjectionSpec("ternary", p=3000, d=500, seed=3)  # type: ignore[arg-type]
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
    exact = project_reference(x, spec)
    assert Accumulator(spec, 5).backend == "torch"
    np.testing.assert_allclose(project(x, spec).numpy(), exact, rtol=0, atol=1e-4)
    kept = np.square(exact).sum(axis=1) / x.double().square().sum(dim=1).numpy()
    assert np.abs(kept - 1).max() < 6 * (2 / 500) ** 0.5
    with pytest.raises(ValueError, match=r"backend='numba' does .*, not method='ternary'"):
        project(x, spec, backend="numba")
