"""A paused training run as files that any Python with torch and peft reads.

    adapter/        peft's own; it names the base model's folder
    optimizer.pt    {parameter name: {"step", "exp_avg", "exp_avg_sq"}}
    train.json, target.json    [{"input_ids": [...], "labels": [...]}, ...]

Whoever measures writes its result beside them, by `result`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

IGNORED = -100
PADDING = 2

Row = dict[str, list[int]]
Scores = npt.ArrayLike


@dataclass
class Paused:
    """One run between two optimizer steps.

    Attributes:
        model: float32, its adapter trains.
        optimizer: AdamW with the state of the run.
        train: its training rows.
        target: the rows that selection is for.
    """

    model: Any
    optimizer: torch.optim.AdamW
    train: list[Row]
    target: list[Row]


def save(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **rows: list[Row]
) -> None:
    """Write a run to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder / "adapter")  # type: ignore[operator]
    state = {name: optimizer.state[p] for name, p in trained(model).items()}
    torch.save(state, folder / "optimizer.pt")
    for name, each in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(each), encoding="utf-8")


def load(folder: Path, train_rows: int | None = None) -> Paused:
    """Read a run, with its first `train_rows` rows or all of them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = folder / "adapter"
    base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(
            base["base_model_name_or_path"], torch_dtype=torch.float32
        ),
        str(adapter),
        is_trainable=True,
    ).eval()
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    named = trained(model)
    optimizer = torch.optim.AdamW(named.values(), lr=2e-4)
    for name, parameter in named.items():
        optimizer.state[parameter] = state[name]
    train, target = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train", "target")
    )
    return Paused(model, optimizer, train[:train_rows], target)


def load_base(folder: Path) -> Any:  # noqa: ANN401 - a module, with methods of its class
    """Read the model below a run's adapter: float32, its linear layers train and nothing else.

    The output layer is none of them: it has the embedding's weights, or is as wide as those.
    """
    from transformers import AutoModelForCausalLM

    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    model: Any = AutoModelForCausalLM.from_pretrained(
        adapter["base_model_name_or_path"], torch_dtype=torch.float32
    ).eval()
    model.requires_grad_(False)
    for layer in linear_layers(model):
        layer.requires_grad_(True)
    return model


def linear_layers(model: Any) -> list[torch.nn.Linear]:  # noqa: ANN401 - as above
    """List a base model's linear layers, without its output layer."""
    head = model.get_output_embeddings()
    layers = (each for each in model.modules() if isinstance(each, torch.nn.Linear))
    return [each for each in layers if each is not head]


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that train, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def collate(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Pad rows on the right to one batch (b, t)."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([each + [filler] * (longest - len(each)) for each in lists])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], PADDING),
        "labels": padded([row["labels"] for row in rows], IGNORED),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def result(folder: Path, name: str, scores: Scores | None = None, **figures: float) -> None:
    """Write what was measured, and (n,) scores if there are any."""
    (folder / f"{name}.json").write_text(json.dumps(figures), encoding="utf-8")
    if scores is not None:
        np.save(folder / f"{name}.npy", np.asarray(scores, dtype=np.float64))
