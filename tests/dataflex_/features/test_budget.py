"""Tokens of a gradient batch that all ranks of a run agree on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gradkernels import ProjectionSpec
from torch import nn

from dataflex.features import shared
from dataflex.features.shared import gradient_budget
from gradstore.capture.limits import CPU_TOKENS
from gradstore.export import budget

WAYS = ProjectionSpec("sjlt", p=1, d=64)


class Ranks:
    """Of some processes, of which the others found these."""

    leads = True

    def __init__(self, *others: int) -> None:
        self.others = others

    def gather(self, work: Callable[[], int]) -> list[int]:
        return [self.others[0], work(), *self.others[1:]]


def run_of(*others: int) -> Any:
    rows = SimpleNamespace(dataset=[1, 2], lengths=np.array([3, 4]), name="train")
    return SimpleNamespace(
        model=nn.Linear(1, 1), collate=dict, autocast="bf16", ranks=Ranks(*others),
        data=SimpleNamespace(train=rows),
    )  # fmt: skip


def settings_of(asked: int | None) -> Any:
    return SimpleNamespace(tokens_per_batch=asked, train_features=None, unit_rows=256)


@pytest.mark.parametrize(
    ("asked", "others", "tokens"),
    [(None, (4096, 2048), 2048), (None, (1 << 16, 1 << 17), 8192), (96, (1, 2), 96)],
)
def test_ranks_agree_on_the_least_of_what_they_found_unless_told_otherwise(
    asked: int | None, others: tuple[int, ...], tokens: int, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    def found(*_: object) -> int:
        assert torch.is_autocast_enabled("cpu"), "as the pass will be"
        return 8192

    monkeypatch.setattr(budget, "MEASURED", ("cpu",))
    monkeypatch.setattr(shared, "found_budget", found)
    with caplog.at_level(logging.INFO, "gradstore"):
        assert gradient_budget(run_of(*others), settings_of(asked), WAYS) == tokens
    assert [f"at most {tokens} padded" in line for line in caplog.messages] == [True] * (not asked)


def test_a_cpu_has_its_constant_and_nobody_waits_for_the_others() -> None:
    run = run_of()
    run.ranks = None
    assert gradient_budget(run, settings_of(None), WAYS) == CPU_TOKENS
