"""Models and rows that benchmarks of passes share: the embedded example, and a larger model.

The larger one is a Llama of 20 M parameters with random weights and rows of 128 tokens, a quarter
to three quarters of them targets: enough arithmetic that the Python around it hardly counts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.data.rows import IGNORED, Rows, RunData
from dataflex.run.context import RunContext

TOKENS, VOCABULARY = 128, 16384


@dataclass(frozen=True)
class Workload:
    """A model with a LoRA adapter that trains, and rows for it.

    Attributes:
        name: for tables.
        model: the model.
        data: its rows.
        collate: rows -> padded batch.
    """

    name: str
    model: Any
    data: RunData
    collate: Callable[[list[Any]], Any]

    def config(self, output_dir: Path) -> RunConfig:
        """Of a run that weights samples."""
        ours = DataFlexConfig(train_type="dynamic_weight")
        return RunConfig(ours, {"output_dir": str(output_dir)}, output_dir / "run.yaml")

    def context(self, output_dir: Path) -> RunContext:
        """Return the settings of a pass over the rows, without progress bars."""
        return RunContext(
            config=self.config(output_dir),
            data=self.data,
            collate=self.collate,
            model=self.model,
            output_dir=output_dir,
            run_id="benchmark",
            seed=0,
            shows_progress=False,
        )


def tiny() -> Workload:
    """Load the embedded model and its training rows, about 26 tokens each."""
    from tinyrun import TinyRun

    with tempfile.TemporaryDirectory() as folder:
        run = TinyRun.start(1, Path(folder) / "run")
    return Workload("tiny, 26 tokens", run.model, run.data, run.collate)


def llama(rows: int) -> Workload:
    """20 M random parameters, rows of 128 tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCABULARY, (rows, TOKENS))
    prompts = rng.integers(TOKENS // 4, 3 * TOKENS // 4, rows)
    labels = np.where(np.arange(TOKENS) < prompts[:, None], IGNORED, ids)
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})

    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        stacked = {
            key: torch.tensor([row[key] for row in batch]) for key in ("input_ids", "labels")
        }
        return {**stacked, "attention_mask": torch.ones_like(stacked["input_ids"])}

    data = RunData(Rows("train", dataset), (), None, "default", None, "sft")
    return Workload("20 M, 128 tokens", model, data, collate)
