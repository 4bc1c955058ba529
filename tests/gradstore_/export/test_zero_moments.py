"""Moments under DeepSpeed's ZeRO, where each process has a part: every one reads them whole.

DeepSpeed is no dependency, also not of the tests: CI runs this file once more with it.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gradstore.errors import BadInput
from gradstore.export.moments import AdamMoments
from gradstore.export.zero_moments import SpreadMoments

WORKER = Path(__file__).with_name("zero_worker.py")
with_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)


@pytest.fixture
def worker() -> Any:
    """The worker's own model, rows and optimizer."""
    return SimpleNamespace(**runpy.run_path(str(WORKER)))


def trained_alone(worker: Any) -> AdamMoments:
    """The moments of one process that takes the rows of both."""
    model = worker.small_model()
    optimizer = worker.optimizer(model)
    for step in range(worker.STEPS):
        x, y = worker.rows(step)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return AdamMoments.from_optimizer(optimizer, model)


@with_deepspeed
def test_each_of_two_processes_reads_the_moments_that_one_would_have(
    worker: Any, tmp_path: Path
) -> None:
    for stage in worker.STAGES:
        (tmp_path / str(stage)).mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(WORKER), str(tmp_path)]  # fmt: skip
    told = subprocess.run(command, env={**os.environ, "DS_ACCELERATOR": "cpu"}, check=False,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert told.returncode == 0, told.stderr[-3000:]
    expected = trained_alone(worker).parameters
    for stage, name in itertools.product(worker.STAGES, ("trained", "resumed")):
        files = [tmp_path / str(stage) / f"{name}.{rank}" for rank in (0, 1)]
        assert files[0].read_bytes() == files[1].read_bytes()
        found = AdamMoments.load(files[0]).parameters
        assert list(found) == sorted(expected)
        for parameter, moments in found.items():
            torch.testing.assert_close(moments.m, expected[parameter].m)
            torch.testing.assert_close(moments.v, expected[parameter].v)
            assert moments.constants == expected[parameter].constants
    for stage in worker.STAGES:
        untrained = AdamMoments.load(tmp_path / str(stage) / "before.1").parameters
        assert untrained.keys() == expected.keys()
        assert not any(moments.v.any() or moments.m.any() for moments in untrained.values())


def test_groups_of_different_constants_are_refused() -> None:
    groups = [{"betas": (0.9, 0.99), "eps": 1e-8}, {"betas": (0.9, 0.999), "eps": 1e-8}]
    with pytest.raises(BadInput, match="have different betas: give all parameters the same"):
        SpreadMoments(SimpleNamespace(param_groups=groups, state={}))


def test_an_optimizer_that_keeps_other_states_is_refused_by_name() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight._hp_mapping = None  # type: ignore[assignment]
    groups = [{"betas": (0.9, 0.99), "eps": 1e-8, "params": []}]
    other = SimpleNamespace(param_groups=groups, state={0: {"momentum_buffer": 1}})
    with pytest.raises(BadInput, match="keeps no exp_avg and exp_avg_sq for parameter weight"):
        AdamMoments.from_optimizer(other, model)
