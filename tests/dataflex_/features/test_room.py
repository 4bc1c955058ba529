"""What memory has room for is found once in a run, not once a generation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from dataflex.data.rows import Rows, RunData
from dataflex.features.gradients import FeatureService
from dataflex.features.settings import FeatureSettings
from dataflex.models.passes import batches
from dataflex.run.context import RunContext
from dataflex.run.ranks import Ranks
from gradstore.export.direct import target_directions
from gradstore.export.features import FeatureSpec
from gradstore.export.room import Room
from gradstore.export.token_rows import padded
from gradstore.format.plans import UnitRange

#: Padded tokens that the stand-in for a small device has room for.
ROOM = 24


def rows_of(name: str, n: int, seed: int) -> Rows:
    """Rows of 5 to 10 tokens."""
    random, made = np.random.default_rng(seed), []
    for _ in range(n):
        ids = random.integers(3, 60, random.integers(5, 11)).tolist()
        made.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return Rows(name, datasets.Dataset.from_list(made))


@pytest.fixture
def run() -> RunContext:
    """A model with a small adapter, 12 training rows and a target set of 6."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    anything: Any = None
    data = RunData(rows_of("train", 12, 0), (rows_of("a", 6, 1),), anything, "default", anything,
                   "sft", anything)  # fmt: skip
    asked: Any = SimpleNamespace()
    return RunContext(asked, data, padded, model, Path(), "id", 0, shows_progress=False)


def test_a_second_generation_starts_at_the_size_that_the_first_found(
    run: RunContext, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def watch(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        sizes.append(inputs["input_ids"].numel())
        if sizes[-1] > ROOM:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    run.model.register_forward_pre_hook(watch, with_kwargs=True)
    settings = FeatureSettings(gradient_type="sgd", proj_dim=32, tokens_per_batch=40)
    service = FeatureService(run, settings, opens=False)
    for step in (1, 2):
        for rows in (*run.data.targets, run.data.train):
            recipe = service.space.recipe(FeatureSpec("sgd"), step, None)
            unit = UnitRange(0, 0, len(rows))
            done = service._compute(rows, recipe, None)(unit, lambda _: None)
            assert np.isfinite(done.features).all()
    # The exact scores of the same run know it, too.
    planned = batches(run, run.data.train, None, 40, lambda _: None, room=run.room)
    target_directions(run.model, [planned], FeatureSpec("sgd"))
    assert sum(size > ROOM for size in sizes) == 1
    assert sum("out of memory" in line for line in caplog.messages) == 1


def test_ranks_with_unlike_room_share_each_row_once(run: RunContext) -> None:
    found: list[int] = []
    for rank, tokens in enumerate((None, 10)):
        one = replace(run, ranks=Ranks(rank, 2), room=Room(tokens))
        given = batches(one, run.data.train, None, ROOM, lambda _: None, shared=True, room=one.room)
        found += np.unique(np.concatenate([rows for rows, _ in given])).tolist()
    assert sorted(found) == list(range(12))
