"""Padded tokens of a gradient batch, by the memory that a device has free.

One forward of the longest row says what a token keeps for its backward. A batch then takes a part
of what is free, rounded down to a power of two, so that memory which is a little fuller the next
time cuts the same batches.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from gradkernels import ProjectionSpec
from torch import nn

from gradstore.capture.limits import free_on, ran_out_of_memory, release_memory, token_budget
from gradstore.capture.per_sample import GradientCapture
from gradstore.export.features import FeatureSpec
from gradstore.export.memory import longest_batch, pass_memory
from gradstore.export.units import Batches
from gradstore.format.layout import UNIT_ROWS

_log = logging.getLogger(__name__)

#: Types of devices whose memory is looked at. A CPU has cores enough for few tokens at once.
MEASURED = ("cuda",)
#: Part of the free memory that activations may take: a dense projection gathers gradients in a
#: fourth of it (`gradstore.export.projected`), and a backward makes more than a forward keeps.
SHARE = 0.6
#: Bounds: more tokens make no pass faster; fewer are cut where memory really runs out.
FEWEST, MOST = 1 << 10, 1 << 17


def found_budget(
    model: nn.Module,
    batches: Batches,
    features: FeatureSpec,
    projection: ProjectionSpec,
    unit_rows: int = UNIT_ROWS,
) -> int:
    """Find the padded tokens of a gradient batch that suit the memory of the model's device.

    Args:
        model: the model; inside `torch.autocast` as the pass would be.
        batches: rows; the longest one is passed through the model.
        features: how a gradient becomes a feature.
        projection: of the model's p.
        unit_rows: rows of a unit, whose features wait until all are made.

    Returns:
        A power of two on a CUDA device; elsewhere, and without a row that has a target, the
        device's constant (`gradstore.capture.limits.token_budget`).
    """
    device = next(model.parameters()).device
    probe = longest_batch(batches, device) if is_measured(model) else None
    if probe is None:
        return token_budget(model)
    free, tokens = free_on(device), FEWEST
    try:
        with GradientCapture(model, features.modules) as capture:
            each = max(1, sum(capture.kept_bytes(probe)) // probe["labels"].shape[1])

        def besides(tokens: int) -> int:
            some = replace(batches, token_budget=tokens)
            need = pass_memory(model, some, features, projection, unit_rows)
            return 0 if need is None else need.on_device - need.activations

        tokens = 1 << (min(MOST, max(FEWEST, int(SHARE * free) // each)).bit_length() - 1)
        # The rows of a batch, and so what their gradients take, go by its tokens.
        while tokens > FEWEST and int(SHARE * max(0, free - besides(tokens))) // each < tokens:
            tokens //= 2
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        tokens = FEWEST
    release_memory()  # a forward of the longest row left it to torch
    return tokens


def is_measured(model: nn.Module) -> bool:
    """Return whether the memory of a model's device says how many tokens a batch has."""
    return next(model.parameters()).device.type in MEASURED


def tell_budget(tokens: int) -> None:
    """Say what was found."""
    _log.info("gradient batches of at most %d padded tokens (tokens_per_batch sets it)", tokens)
