"""One of two processes that train a small model under DeepSpeed and keep the moments they read.

Run by `python -m torch.distributed.run --nproc-per-node 2 zero_worker.py FOLDER`, for every stage
in turn: DeepSpeed takes its time to import.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

STAGES, STEPS, ROWS, RATE = (1, 2), 3, 4, 1e-2


def small_model() -> nn.Module:
    """Odd sizes: where a flat buffer is cut in two, it is cut within a parameter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False), nn.LayerNorm(3))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices decay and vectors do not, as transformers' Trainer groups them."""
    each = list(model.parameters())
    return [
        {"params": [p for p in each if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in each if p.dim() == 1], "weight_decay": 0.0},
    ]


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups(model), lr=RATE, betas=(0.8, 0.95))


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a step, of all processes."""
    generator = torch.Generator().manual_seed(step)
    return tuple(torch.randn(2 * ROWS, k, generator=generator) for k in (5, 3))  # type: ignore[return-value]


def main() -> None:
    """Train at each stage."""
    import deepspeed.comm.torch

    # It would be compiled, and makes sums on one machine faster.
    deepspeed.comm.torch.build_shm_op = lambda: None
    for stage in STAGES:
        train(stage, Path(sys.argv[1]) / str(stage), int(os.environ["RANK"]))


def train(stage: int, folder: Path, rank: int) -> None:
    """Save moments before and after some steps, and those of an engine that loads a checkpoint."""
    import deepspeed

    from gradstore.export.moments import AdamMoments

    config = {"train_micro_batch_size_per_gpu": ROWS, "zero_allow_untested_optimizer": True,
              "zero_optimization": {"stage": stage}}  # fmt: skip

    def engine() -> Any:
        model = small_model()
        return deepspeed.initialize(model=model, optimizer=optimizer(model), config=config)[0]

    def keep(made: Any, name: str) -> None:
        found = AdamMoments.from_optimizer(made.optimizer, made.module)
        found.save(folder / f"{name}.{rank}")

    trained = engine()
    keep(trained, "before")
    for step in range(STEPS):
        x, y = (part[rank * ROWS : (rank + 1) * ROWS] for part in rows(step))
        trained.backward(nn.functional.mse_loss(trained(x), y))
        trained.step()
    keep(trained, "trained")
    trained.save_checkpoint(str(folder / "checkpoint"))
    resumed = engine()
    resumed.load_checkpoint(str(folder / "checkpoint"))
    keep(resumed, "resumed")


if __name__ == "__main__":
    main()
