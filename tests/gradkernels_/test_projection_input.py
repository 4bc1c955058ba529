"""What users may meet at the edges: bad input, light imports, read-only folders, threads, forks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gradkernels
import numpy as np
import pytest
import torch
from gradkernels import Accumulator, ProjectionSpec, dispatch, project, project_reference
from gradkernels.dispatch import choose_backend

SPEC = ProjectionSpec("sjlt", p=100, d=16)


class Elsewhere(torch.Tensor):
    """A tensor that says it is on the second CUDA device."""

    device = torch.device("cuda", 1)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 99), ValueError, r"shape \(2, 99\), not \(b, p=100\)"),
        (torch.zeros(100), ValueError, r"shape \(100,\)"),
        (torch.zeros(2, 100, dtype=torch.int64), TypeError, r"got torch\.int64"),
        (np.zeros((2, 100), np.float32), TypeError, r"got ndarray"),
    ],
)
def test_a_wrong_input_is_named(x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        project(x, SPEC)


def test_a_block_of_another_device_of_the_same_kind_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels would read its addresses in their own device's memory."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(dispatch, "choose_backend", lambda *_: "triton")
    block = torch.zeros(0, 10).as_subclass(Elsewhere)  # type: ignore[no-untyped-call]
    for device in ("cuda:0", "cpu", "meta"):
        with pytest.raises(ValueError, match=rf"block is on cuda:1, the accumulator on {device};"):
            Accumulator(SPEC, 0, device=device).add(block, 0)
    for device in ("cuda:1", "cuda"):  # the latter is the current one
        sums = Accumulator(SPEC, 0, device=device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)  # and stays what it was
        sums.add(block, 0)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    Accumulator(SPEC, 0, device="cpu:0").add(torch.zeros(0, 10), 0)


def test_the_oracle_checks_its_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5\), not \(b, p=100\)"):
        project_reference(np.zeros((3, 5)), SPEC)


@pytest.mark.parametrize(
    ("block", "start", "message"),
    [
        (torch.zeros(2, 10), 0, r"shape \(2, 10\), not \(b=3, parameters\)"),
        (torch.zeros(3, 10), 91, r"covers \[91, 101\), outside \[0, p=100\)"),
        (torch.zeros(3, 10), -1, r"covers \[-1, 9\)"),
        (torch.zeros(3, 10, device="meta"), 0, r"block is on meta, the accumulator on cpu"),
    ],
)
def test_a_block_that_does_not_fit_is_named(block: torch.Tensor, start: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Accumulator(SPEC, 3).add(block, start)


def test_rows_are_checked() -> None:
    with pytest.raises(ValueError, match="rows=-1 is below 0"):
        Accumulator(SPEC, -1)
    with pytest.raises(TypeError, match=r"rows=2\.0 is a float"):
        Accumulator(SPEC, 2.0)  # type: ignore[arg-type]


def test_backends_are_checked() -> None:
    with pytest.raises(ValueError, match="backend='cuda' is not one of numba, torch, triton"):
        Accumulator(SPEC, 1, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not on cuda; choose backend='torch'"):
        choose_backend(SPEC, torch.device("cuda"), "numba")


def test_an_empty_block_adds_nothing() -> None:
    accumulator = Accumulator(SPEC, 2)
    accumulator.add(torch.empty(2, 0), 100)
    assert not accumulator.result().any()


def _python(code: str, folder: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _package_folder() -> Path:
    assert gradkernels.__file__ is not None
    return Path(gradkernels.__file__).parent


def test_import_needs_only_numpy_and_torch() -> None:
    code = (
        "import sys, numpy.typing, torch; before = set(sys.modules); import gradkernels; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    assert _python(code, _package_folder().parent).strip() == "{'gradkernels'}"


def test_a_read_only_install_compiles_in_memory(tmp_path: Path) -> None:
    # The cache folders are files here: unusable even for root, whom permissions do not stop.
    shutil.copytree(
        _package_folder(), tmp_path / "gradkernels", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "gradkernels" / "cpu" / "__pycache__").touch()
    (tmp_path / "home").touch()
    code = (
        "import torch; from gradkernels import *; "
        "spec = ProjectionSpec('sjlt', p=50, d=16); x = torch.ones(1, 50); "
        "print(abs(project(x, spec).numpy() - project_reference(x, spec)).max() < 1e-5)"
    )
    home = str(tmp_path / "home")
    assert _python(code, tmp_path, HOME=home, XDG_CACHE_HOME=home).strip() == "True"


def test_concurrent_callers_get_the_right_numbers() -> None:
    spec = ProjectionSpec("rademacher", p=3000, d=512)
    blocks = [torch.randn(4, 3000, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    expected = [project(x, spec) for x in blocks]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda x: project(x, spec), blocks))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_threads_of_its_own() -> None:
    code = """
import os, torch
from gradkernels import ProjectionSpec, project
torch.set_num_threads(2)
spec = ProjectionSpec("sjlt", p=60_000, d=64)
x = torch.ones(4, 60_000)
expected = project(x, spec)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(project(x, spec), expected) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert _python(code, _package_folder().parent).strip() == "0"
