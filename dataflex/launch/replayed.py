"""`dataflex-cli gradstore replay`: every training row's exact influence, by differentiating a run.

```
from dataflex.launch.configuration import read
from dataflex.launch.replayed import replay_run

table = replay_run(read(Path("run.yaml"), []))
table.scores  # (targets, training rows)
```

Letters: n training rows, q targets.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dataflex import __version__
from dataflex.bridge.quiet import on_stderr
from dataflex.config.keys import RunConfig
from dataflex.data.rows import Rows, RunData
from dataflex.launch.plain_run import deciding, plain_arguments
from dataflex.launch.preflight import check_replay
from dataflex.launch.recorded import Recording, logits_of, record, row_sums
from dataflex.launch.replay_states import States, check_states
from dataflex.models.passes import longest_row, own_labels
from dataflex.run.log import progress
from gradstore.capture.limits import token_budget
from gradstore.capture.losses import IGNORED_LABEL
from gradstore.errors import expect
from gradstore.export.units import plan_batches
from gradstore.replay.influence import QueryLoss, replay_forwards, replay_influence
from gradstore.replay.price import (
    Limits,
    ReplayCost,
    forecast,
    refuse_above,
    segment_steps,
    step_passes,
)
from gradstore.replay.run import Parameters, TrainingRun
from gradstore.replay.table import ReplayTable, Target

_log = logging.getLogger(__name__)

TARGETS = ("sets", "rows")

_MAX_ROWS = 256

_SIGNS = (
    "Adam's first step is close to the sign of the gradient: scores of the first steps' rows hold "
    "for tiny changes of weight alone, and may be large; warmup_steps makes the run smooth"
)

#: Of a run that was trained already: its price was known before.
_DECIDED = Limits(math.inf, sys.maxsize)

OnForecast = Callable[[TrainingRun, ReplayCost], None]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Choices of a replay.

    Attributes:
        targets: "sets", the mean loss over each target set's rows; or "rows", each target row.
        float64: differentiate in float64 what was trained in float32. Where a gradient is near 0
            Adam's step has a slope of learning rate / eps, by which float32 multiplies its
            rounding.
        segment: steps between kept states; None keeps the fewest.
        limits: refuse above them.
        states: folder of what is finished, from which a later call goes on; None keeps nothing.
    """

    targets: str = "sets"
    float64: bool = True
    segment: int | None = None
    limits: Limits = field(default_factory=Limits)
    states: Path | None = None

    def __post_init__(self) -> None:
        expect(self.targets in TARGETS, "--targets", self.targets, " or ".join(TARGETS))


def replay_run(
    config: RunConfig,
    asked: Replay | None = None,
    *,
    told: OnForecast = lambda run, cost: None,
    shows_progress: bool = False,
) -> ReplayTable:
    """Train a configuration's run once, as LlamaFactory does, and differentiate it.

    The training, AdamW, clipping, schedule and accumulation included, is the one that
    `dataflex-cli train` makes of the same configuration with `train_type: static`; what another
    train_type does with the rows is left out, its steps are kept. It starts anew, or from the
    adapter and the moments of `resume_from_checkpoint`. Nothing is written but `asked.states`,
    which the caller removes once it has the table.

    Args:
        config: a deterministic LoRA run in float32, stage sft, with target rows.
        asked: of which losses, in which precision, at what cost; None for the defaults.
        told: called with the price before the first step; what it raises ends the run.
        shows_progress: show bars on stderr.

    Raises:
        BadInput: before a model is loaded, keys that no replay follows (`check_replay`); before the
            first step, a model with dropout or of less than float32, another optimizer than AdamW,
            a price above the limits; after it, whatever `replay_influence` refuses, a replay that
            does not end where the training did among it.
        ProvenanceMismatch: `asked.states` are those of another replay.
        DamagedData: they are not as they were written.
        StoreIOError: they can't be read or written.
    """
    asked = Replay() if asked is None else asked
    check_replay(config)
    if config.dataflex.train_type != "static":
        _log.warning("train_type is %s: replayed is plain training on every row, which is what "
                     "train_type static does", config.dataflex.train_type)  # fmt: skip
    with contextlib.ExitStack() as stack:
        stack.enter_context(on_stderr())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # stdout is for the answer
        bar = stack.enter_context(contextlib.ExitStack())
        advances: list[Callable[[int], object]] = []  # empty until the number of steps is known

        def begin(recording: Recording) -> None:
            run, cost = recording.run, _cost(recording, asked)
            if not is_smooth(run):
                _log.warning("%s", _SIGNS)
            told(run, cost)
            refuse_above(asked.limits, cost, run)
            if asked.states is not None:
                check_states(asked.states, _description(config, recording, asked))
            advances.append(bar.enter_context(progress(
                "training", len(run.steps), shown=shows_progress, told=False, unit="step"
            )))  # fmt: skip

        recording = record(config, begin, lambda steps: [tell(steps) for tell in advances])
        bar.close()
        return _replayed(recording, asked, _states(config, recording, asked), shows_progress)


def is_smooth(run: TrainingRun) -> bool:
    """Return whether a change of weights of some hundredths changes the end in proportion.

    Adam's first step from moments of 0 is learning rate x sign(gradient), but where the gradient
    is within eps of 0: there the derivative is a slope of learning rate / eps that soon ends.
    """
    return run.moments is not None or run.steps[0].learning_rate == 0


def _cost(recording: Recording, asked: Replay) -> ReplayCost:
    """Measure a replay's price between two steps of the training."""
    queries = len(targets_of(recording.data, asked.targets))
    run = recording.in_float64().run if asked.float64 else recording.run
    try:
        return forecast(run, queries=queries, segment=asked.segment)
    finally:
        recording.model.float()  # as it was: all of it is float32


def _states(config: RunConfig, recording: Recording, asked: Replay) -> States | None:
    """Open the folder of states, if there shall be one."""
    if asked.states is None:
        return None
    assert recording.run.ended is not None
    device = next(recording.model.parameters()).device
    described = _description(config, recording, asked)
    return States(asked.states, described, recording.run.ended, device)


def _description(config: RunConfig, recording: Recording, asked: Replay) -> dict[str, object]:
    """Return what decides a replay's result, to the bit, as plain JSON."""
    args, known = plain_arguments(config), config.known
    device = next(recording.model.parameters()).device.type
    return {
        **deciding(args, recording.data, device),
        "seed": args.get("seed"),
        "resume_from_checkpoint": known.resume_from_checkpoint,
        "targets": asked.targets,
        "float64": asked.float64,
        "segment": segment_steps(recording.run, asked.segment),
        "dataflex": __version__,
    }


def _replayed(
    recording: Recording, asked: Replay, kept: States | None, shows_progress: bool
) -> ReplayTable:
    end = recording.run.ended
    assert end is not None
    if asked.float64 and (kept is None or kept.state(1) is None):
        replay_forwards(recording.run)  # in the precision of the real run: does it end there?
    if asked.float64:
        recording = recording.in_float64()
        end = {name: value.double() for name, value in end.items()}
    run, targets = recording.run, targets_of(recording.data, asked.targets)
    if kept is not None and (done := kept.backwards()) is not None:
        _log.info("replay goes on from %s: %d of %d segments are left", asked.states, done.segments,
                  -(-len(run.steps) // segment_steps(run, asked.segment)))  # fmt: skip
    losses = target_losses(recording, asked.targets)
    with progress("replay, passes over a step", step_passes(run, queries=len(targets)),
                  shown=shows_progress, told=False, unit="step") as advance:  # fmt: skip
        derivatives = replay_influence(
            run, losses, segment=asked.segment, limits=_DECIDED, tell=advance, kept=kept
        )
    with torch.no_grad():
        before, after = (losses(at).double().cpu().numpy() for at in (run.parameters, end))
    trained = [batch.rows for step in run.steps for batch in step.batches]
    return ReplayTable(
        targets,
        derivatives,
        np.bincount(np.concatenate(trained), minlength=run.row_count).astype(np.int64),
        recording.data.train.row_set.hashes,
        before,
        after,
        len(run.steps),
    )


def targets_of(data: RunData, kind: str) -> tuple[Target, ...]:
    """List the losses to differentiate: sets, or their rows that have a target token."""
    if kind == "sets":
        return tuple(Target(rows.name) for rows in data.targets)
    return tuple(
        Target(rows.name, int(row))
        for rows in data.targets
        for row in np.flatnonzero(rows.target_tokens > 0)
    )


def target_losses(recording: Recording, kind: str) -> QueryLoss:
    """Make the function that computes the targets' losses, (q,), at given parameters.

    A row's loss is its mean over target tokens, a set's the mean over its rows that have one. Of
    its activations only those of one batch are alive at once.
    """
    batches = [_set_batches(recording, rows) for rows in recording.data.targets]

    def losses(parameters: Parameters) -> Tensor:
        found = []
        for parts in batches:
            means = [checkpoint(_row_means, recording, parameters, batch, use_reentrant=False,
                                preserve_rng_state=False) for _, batch in parts]  # fmt: skip
            order = np.argsort(np.concatenate([rows for rows, _ in parts]))
            rows = torch.cat(means)[torch.from_numpy(order).to(means[0].device)]
            found.append(rows if kind == "rows" else rows.mean(0, keepdim=True))
        return torch.cat(found)

    return losses


def _set_batches(recording: Recording, rows: Rows) -> list[tuple[Any, dict[str, Any]]]:
    """Collate the rows of a set that have a target token; each batch with their positions."""
    longest_row(recording.model, rows)  # refuses rows whose losses would depend on their batch
    collate = own_labels(recording.collate)
    device = next(recording.model.parameters()).device
    used = np.flatnonzero(rows.target_tokens > 0)
    found = []
    for part in plan_batches(rows.lengths[used], token_budget(recording.model), _MAX_ROWS):
        batch = collate([rows.dataset[int(row)] for row in used[part]])
        held = {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}
        found.append((used[part], held))
    return found


def _row_means(recording: Recording, parameters: Parameters, batch: dict[str, Any]) -> Tensor:
    tensors = {key: value for key, value in batch.items() if key != "labels"}
    sums = row_sums(logits_of(recording.model, parameters, tensors), batch["labels"])
    means: Tensor = sums / (batch["labels"][:, 1:] != IGNORED_LABEL).sum(1)
    return means
