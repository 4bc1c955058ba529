"""Memory of a pass over gradients of whole weights, or through TRAK, known before it starts.

Letters: b batch, t tokens, p gradient length, d projected dimensions.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradkernels import ProjectionSpec
from gradkernels.published import BLOCK_OUTPUTS, published_bytes
from torch import Tensor, nn

from gradstore.capture.adapters import has_adapter
from gradstore.capture.dense import part_elements
from gradstore.capture.limits import free_on
from gradstore.capture.losses import IGNORED_LABEL
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import parameter_name, unwrap
from gradstore.errors import BadInput
from gradstore.export.features import FeatureSpec
from gradstore.export.projected import buffer_bytes_on, gathered_rows, waiting_rows
from gradstore.export.units import Batches
from gradstore.format.layout import UNIT_ROWS
from gradstore.pace import size

_log = logging.getLogger(__name__)

#: Vectors as long as the gradient that a feature is made with (`FeatureMap`).
_VECTORS = {"adam_marginal": 3, "adam_share": 3, "adam": 2}
#: Parts that count: one, its sum with another use of the weight, and what an allocator leaves free
#: between them.
_PARTS = 4
#: Rows that are looked at for the longest one with a target.
_PROBED_ROWS = 256
#: Bytes of sums that a projection keeps for each of d outputs of a row: float64, float32 while it
#: adds, the result and its copy on the host.
_BYTES_PER_SUM = 20
#: Rows that the sums are kept for side by side.
_LANES = 8


@dataclass(frozen=True)
class PassMemory:
    """Bytes that a pass over gradients takes beside the model, at its peak.

    Attributes:
        activations: that a batch's forward keeps for its backward, logits among them.
        parts: of gradients, as many as exist at once.
        vectors: that features are made with.
        moments: copy of the optimizer's moments, in RAM.
        sums: of the projection, and a unit's features.
        waiting: of whole gradients that a dense projection gathers.
        tokens: padded tokens of the batch.
    """

    activations: int
    parts: int
    vectors: int
    moments: int
    sums: int
    waiting: int
    tokens: int

    @property
    def on_device(self) -> int:
        """Bytes on the model's device."""
        return self.activations + self.parts + self.vectors + self.sums + self.waiting

    @property
    def total(self) -> int:
        """Bytes on the device and in RAM."""
        return self.on_device + self.moments


def pass_memory(
    model: nn.Module,
    batches: Batches,
    features: FeatureSpec,
    projection: ProjectionSpec,
    unit_rows: int = UNIT_ROWS,
) -> PassMemory | None:
    """Estimate the memory of a pass over rows.

    One forward of the longest row is measured; activations grow with the tokens of a batch.

    Args:
        model: the model; inside `torch.autocast` as the pass would be.
        batches: the rows.
        features: how a gradient becomes a feature.
        projection: of the model's p.
        unit_rows: rows of a unit, whose features wait until all are made.

    Returns:
        None of a model with an adapter, whose gradients are small, and where no row has a target.
    """
    if has_adapter(unwrap(model)):
        return None
    probe = longest_batch(batches, next(model.parameters()).device)
    if probe is None:
        return None
    with GradientCapture(model, features.modules) as capture:
        length = probe["labels"].shape[1]
        tokens = max(batches.token_budget, length)
        rows = most_rows(batches, unit_rows)
        kept, largest = capture.kept_bytes(probe)
        widest = max(rows * slot.width for slot in capture.slots)
        part = 4 * max(part_elements(probe["labels"].device), widest)
        further = 4 * capture.further_elements(rows)
        # Elements beyond what there is are not made.
        part = min(part, 4 * rows * max(slot.numel for slot in capture.slots))
        names = {slot.name for slot in capture.slots} | set(capture.left_out)
        lanes, d = -(-rows // _LANES) * _LANES, projection.d
        buffer_bytes = buffer_bytes_on(probe["labels"].device, projection)
        waiting = waiting_rows(projection, buffer_bytes, dense=capture.dense)
        return PassMemory(
            activations=(kept + largest) * tokens // length,
            parts=_PARTS * part + 2 * further,
            vectors=4 * capture.p * _VECTORS.get(features.kind, 0),
            moments=8 * _numel(model, names) if features.needs_moments else 0,
            sums=_BYTES_PER_SUM * lanes * d + 8 * unit_rows * d,
            waiting=4 * capture.p * waiting,
            tokens=tokens,
        )


def check_memory(
    model: nn.Module,
    batches: Batches,
    features: FeatureSpec,
    projection: ProjectionSpec,
    unit_rows: int = UNIT_ROWS,
) -> None:
    """Say what memory a pass over whole weights' gradients takes, and refuse one that does not fit.

    Args:
        model: the model; with an adapter nothing is said.
        batches: the rows.
        features: of the rows that need the most, training rows.
        projection: of the model's p.
        unit_rows: rows of a unit.

    Raises:
        BadInput: the memory that is free now is less than the estimate.
    """
    need = pass_memory(model, batches, features, projection, unit_rows)
    if need is None:
        return
    device = next(model.parameters()).device
    ram = _own_ram()
    where = [(need.total, "RAM", ram)]
    if device.type == "cuda":
        where = [(need.on_device, str(device), free_on(device)), (need.moments, "RAM", ram)]
    told = " and ".join(
        f"{size(wanted)} of {name}" + ("" if free is None else f" ({size(free)} are free)")
        for wanted, name, free in where
        if wanted
    )
    what = (
        f"gradients of whole weights take about {told} beside the model: "
        f"{size(need.activations)} for batches of {need.tokens:,} tokens, "
        f"{size(need.vectors + need.moments)} for {features.kind} features, "
        f"{size(need.parts + need.waiting + need.sums)} for gradients and their projection"
    )
    if any(free is not None and wanted > free for wanted, _, free in where):
        raise BadInput(
            f"{what}. Lower tokens_per_batch, take gradient_type sgd or sign (which need no "
            "moments), train fewer layers (finetuning_type freeze), or train a LoRA adapter."
        )
    _log.info("%s", what)


def check_published(projection: ProjectionSpec, rows: int) -> None:
    """Refuse a projection by TRAK's own code that takes more RAM than is free.

    Args:
        projection: of any method; nothing is asked of others.
        rows: of a batch, at most (`most_rows`).

    Raises:
        BadInput: it does not fit.
    """
    if projection.method != "trak":
        return
    kept = gathered_rows(projection.p)
    if rows > kept:  # such a batch is kept beside the rows that wait for others
        kept += rows
    need, free = published_bytes(projection, kept), _own_ram()
    what = (
        f"proj_method trak takes about {size(need)} of RAM"
        + ("" if free is None else f" ({size(free)} are free)")
        + f": TRAK's matrix, {projection.p:,} parameters x {min(projection.d, BLOCK_OUTPUTS)} "
        f"outputs, and whole gradients of {kept} rows"
    )
    if free is not None and need > free:
        raise BadInput(
            f"{what}. Take proj_method rademacher, whose matrix is never held, lower "
            "tokens_per_batch, or train a smaller LoRA adapter."
        )
    _log.info("%s", what)


def most_rows(batches: Batches, unit_rows: int = UNIT_ROWS) -> int:
    """Count the rows of the largest batch that a unit of so many rows can have."""
    lengths = np.asarray(batches.lengths)
    shortest = 1 if not lengths.size else max(1, int(lengths.min()))
    return min(unit_rows, batches.max_rows, max(1, batches.token_budget // shortest))


def free_ram(root: Path = Path("/")) -> int | None:
    """Return the bytes of RAM that this process may still take; None where the system says none.

    Args:
        root: where /proc and /sys are.
    """
    found = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for folder, limit, used in (
        ("sys/fs/cgroup", "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        limits, taken = _lines(root / folder / limit), _lines(root / folder / used)
        if limits and taken and limits[0].isdigit():
            idle = [
                int(line.split()[1])
                for line in _lines(root / folder / "memory.stat")
                if line.startswith(("inactive_file ", "active_file "))
            ]
            found.append(max(0, int(limits[0]) - int(taken[0]) + sum(idle)))
    return min(found, default=None)


def _own_ram() -> int | None:
    """Return the free RAM that falls to this process: the ranks of a machine share it."""
    ram = free_ram()
    return None if ram is None else ram // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def longest_batch(batches: Batches, device: torch.device) -> dict[str, Any] | None:
    """Make a batch of the longest row that has a target; None where none has."""
    lengths = np.asarray(batches.lengths)
    fits = lengths if batches.longest is None else np.where(lengths <= batches.longest, lengths, -1)
    for row in np.argsort(-fits, kind="stable")[:_PROBED_ROWS]:
        if fits[row] < 0:
            break
        batch: Mapping[str, Any] = batches.collate([batches.dataset[int(row)]])
        if bool((batch["labels"][:, 1:] != IGNORED_LABEL).any()):
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return None


def _numel(model: nn.Module, names: set[str]) -> int:
    return sum(p.numel() for n, p in unwrap(model).named_parameters() if parameter_name(n) in names)
