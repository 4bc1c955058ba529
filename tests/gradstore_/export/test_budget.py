"""Tokens of a batch, from what a device has free; a CPU stands in for one that is looked at."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gradkernels import ProjectionSpec
from transformers import LlamaConfig, LlamaForCausalLM

import gradstore
from gradstore.capture.limits import CPU_TOKENS
from gradstore.capture.per_sample import GradientCapture
from gradstore.export import budget
from gradstore.export.budget import FEWEST, MOST, SHARE, found_budget
from gradstore.export.features import FeatureSpec
from gradstore.export.memory import pass_memory
from gradstore.export.units import Batches
from gradstore.store import building

SPEC = FeatureSpec("sgd", modules="all")
WAYS = ProjectionSpec("sjlt", p=1, d=64)


def batches_of(llama: Any, rows: list[Any]) -> Batches:
    return Batches(rows, llama.collate, [len(row["input_ids"]) for row in rows])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the CPU be looked at, with so many bytes free."""

    def free(count: int) -> None:
        monkeypatch.setattr(budget, "MEASURED", ("cpu",))
        monkeypatch.setattr(budget, "free_on", lambda _: count)

    return free


def bytes_of_a_token(llama: Any, model: Any, rows: list[Any]) -> float:
    """What the longest row keeps for its backward, per token."""
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    with GradientCapture(model) as capture:
        return sum(capture.kept_bytes(llama.collate([longest]))) / len(longest["input_ids"])


def test_a_cpu_has_its_constant_whatever_is_free(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(_: torch.device) -> int:
        raise AssertionError("nobody asks a CPU")

    monkeypatch.setattr(budget, "free_on", asked)
    assert found_budget(llama.model(), batches_of(llama, llama.rows(4)), SPEC, WAYS) == CPU_TOKENS


@pytest.mark.parametrize("tokens", [1, 1500, 4096, 9000, 1 << 30])
def test_a_batch_keeps_a_part_of_what_is_free_rounded_down_to_a_power_of_two(
    llama: Any, tokens: int, measured: Callable[[int], None]
) -> None:
    model, rows = llama.model(), llama.rows(6)
    each = bytes_of_a_token(llama, model, rows)
    measured(int(1.02 * tokens * each / SHARE))
    found = found_budget(model, batches_of(llama, rows), SPEC, WAYS)
    assert found == {1: FEWEST, 1500: 1024, 4096: 4096, 9000: 8192, 1 << 30: MOST}[tokens]
    assert not any(p.grad is not None for p in model.parameters())


def test_what_a_pass_over_whole_weights_takes_besides_is_left_to_it(
    llama: Any, measured: Callable[[int], None]
) -> None:
    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4)  # fmt: skip
    model, rows = LlamaForCausalLM(config), llama.rows(6)  # type: ignore[no-untyped-call]
    need = pass_memory(model, batches_of(llama, rows), SPEC, WAYS)
    assert need is not None
    besides, each = need.on_device - need.activations, bytes_of_a_token(llama, model, rows)
    assert besides > 0
    measured(int(besides + 1.02 * 2048 * each / SHARE))
    assert found_budget(model, batches_of(llama, rows), SPEC, WAYS) == 2048
    measured(int(1.02 * 2048 * each / SHARE))
    assert found_budget(model, batches_of(llama, rows), SPEC, WAYS) == 1024


def test_a_row_that_does_not_fit_gives_the_fewest_tokens(
    llama: Any, measured: Callable[[int], None]
) -> None:
    model = llama.model()

    def full(_module: Any, _args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.get_base_model().lm_head.register_forward_pre_hook(full)
    measured(1 << 40)
    assert found_budget(model, batches_of(llama, llama.rows(4)), SPEC, WAYS) == FEWEST


def test_rows_without_a_target_give_the_constant(
    llama: Any, measured: Callable[[int], None]
) -> None:
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in llama.rows(3)]
    measured(1 << 40)
    assert found_budget(llama.model(), batches_of(llama, rows), SPEC, WAYS) == CPU_TOKENS


@pytest.mark.parametrize("asked", [None, 70])
def test_a_build_plans_with_it_once_unless_told_otherwise(
    llama: Any, asked: int | None, tmp_path: Path, measured: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model, rows = llama.model(), llama.rows(6)
    measured(int(1.02 * 4096 * bytes_of_a_token(llama, model, rows) / SHARE))
    planned: set[int] = set()
    made = Batches.__post_init__

    def noted(self: Batches) -> None:
        planned.add(self.token_budget)
        made(self)

    monkeypatch.setattr(building.Batches, "__post_init__", noted)
    with caplog.at_level(logging.INFO, "gradstore"):
        gradstore.build(
            model, None, rows, rows[:2], tmp_path / "store", gradient_type="sgd", proj_dim=32,
            tokens_per_batch=asked,
        )  # fmt: skip
    assert planned - {MOST} == {asked or 4096}
    told = [line for line in caplog.messages if "padded tokens" in line]
    said = ["gradient batches of at most 4096 padded tokens (tokens_per_batch sets it)"]
    assert told == ([] if asked else said)
