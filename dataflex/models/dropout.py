"""Dropout whose masks are those of a row, whatever process and batch it is trained in.

torch draws masks from one stream of a process, in the order of its batches: the same rows on two
processes get other masks than on one, and after some steps other features. Here a mask is a
function of (seed, step, place of the row in the step, module), drawn for the row's own tokens
alone, so that padding does not count. It is drawn again, the same, where gradient checkpointing
repeats a forward; no global random state is read or moved.

Letters: b rows of a micro-batch, t tokens, h features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class PlacedRows:
    """Rows of a micro-batch, each with its place.

    Attributes:
        step: g, optimizer steps finished.
        first: place of the first row among all rows of the step, over micro-batches and processes.
        spans: (b,) start and stop of each row's own tokens.
        width: t.
    """

    step: int
    first: int
    spans: tuple[tuple[int, int], ...]
    width: int

    @staticmethod
    def of(inputs: Mapping[str, Any], step: int, first: int) -> PlacedRows | None:
        """Find the rows of a batch; None where it has no `input_ids` (b, t).

        A row's tokens go from the first that its mask attends to, to the last; without a mask
        (b, t), as in sequences of several packed rows, all are its own.
        """
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            return None
        b, t = ids.shape
        spans = [(0, t)] * b
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            attended = (mask != 0).int()
            starts = attended.argmax(1).tolist()
            stops = (t - attended.flip(1).argmax(1)).tolist()
            spans = list(zip(starts, stops, strict=True))
        return PlacedRows(step, first, tuple(spans), t)


class RowDropout(nn.Dropout):
    """Stand-in for a module's dropout.

    Inputs of another shape than (b, t, h), such as the tokens that reach one expert or scores of
    attention, have no rows: they get torch's own dropout, and so does everything while no
    micro-batch is placed.

    Args:
        p: probability of a zero.
        name: of the module; others have other masks.
        dropout: of the whole model, which knows the rows.
    """

    def __init__(self, p: float, name: str, dropout: ModelDropout) -> None:
        super().__init__(p)
        self._name = name
        self._dropout = dropout

    def forward(self, input: Tensor) -> Tensor:
        """Zero entries of (b, t, h) with probability p and scale the others by 1 / (1 - p)."""
        rows = self._dropout.rows
        if not self.training:
            return input
        if rows is None or tuple(input.shape[:-1]) != (len(rows.spans), rows.width) or self.p == 1:
            return functional.dropout(input, self.p, training=True)
        keep = torch.zeros(input.shape, dtype=torch.bool, device=input.device)
        generator = self._dropout.generator(input.device)
        for i, (start, stop) in enumerate(rows.spans):
            generator.manual_seed(self._seed(rows, i))
            keep[i, start:stop].bernoulli_(1 - self.p, generator=generator)
        return input * keep * (1 / (1 - self.p))

    def _seed(self, rows: PlacedRows, i: int) -> int:
        key = f"{self._dropout.seed}:{rows.step}:{rows.first + i}:{self._name}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1


def dropouts(model: nn.Module) -> dict[str, float]:
    """Find what drops features in training: modules, and probabilities that modules keep.

    Returns:
        Name of the module, or of its number, -> probability above 0.
    """
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            found[name] = float(module.p)
        for key, value in vars(module).items():  # such as an attention's own
            if "dropout" in key and isinstance(value, float) and value > 0:
                found[f"{name}.{key}".lstrip(".")] = value
    return found


class ModelDropout:
    """The dropout of a model in training.

    Attributes:
        seed: of the run.
        rows: of the micro-batch that is being trained on, its backward included; None outside.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rows: PlacedRows | None = None
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._generators: dict[torch.device, torch.Generator] = {}

    def install(self, model: nn.Module) -> int:
        """Put a `RowDropout` in the place of every active `nn.Dropout`; return their number.

        One that has several places in the model, as in layers that share it, gets one in each.
        """
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if type(module) is nn.Dropout and module.p > 0:
                parent = model.get_submodule(name.rpartition(".")[0])
                own = RowDropout(module.p, name, self).train(module.training)
                self._replaced.append((parent, name.rpartition(".")[2], module))
                setattr(parent, name.rpartition(".")[2], own)
        return len(self._replaced)

    def remove(self) -> None:
        """Put the model's own modules back."""
        for parent, name, module in self._replaced:
            module.train(getattr(parent, name).training)
            setattr(parent, name, module)
        self._replaced = []

    @contextmanager
    def placed(self, inputs: Mapping[str, Any], step: int, first: int) -> Iterator[None]:
        """Draw masks for the rows of a micro-batch, in its forward and its backward.

        Args:
            inputs: the batch, its `input_ids` (b, t).
            step: g, optimizer steps finished.
            first: place of its first row in the step.
        """
        if self._replaced:
            self.rows = PlacedRows.of(inputs, step, first)
        try:
            yield
        finally:
            self.rows = None

    def generator(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device, to be seeded before each use."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device]
