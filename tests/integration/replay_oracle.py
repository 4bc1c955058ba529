"""Compare a replay with the real run, and with runs of reweighted rows; print it as JSON.

A process of its own, because LlamaFactory configures a whole process: `replay_oracle.py CONFIG
CHECKPOINT ADAPTER TABLE`. CHECKPOINT is where the run goes on, ADAPTER what the real run wrote at
its end, TABLE what the command said of the second half in float64.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from dataflex.launch.configuration import read
from dataflex.launch.recorded import Recording, record
from dataflex.launch.replayed import target_losses
from gradstore.replay.influence import replay_forwards
from gradstore.replay.run import TrainingRun

STEP = 1e-4


def deviation(found: dict[str, torch.Tensor], adapter: Path) -> float:
    """Largest difference of a parameter from the adapter on disk."""
    written = load_file(adapter / "adapter_model.safetensors")
    named = {name.replace(".default.", "."): value for name, value in found.items()}
    assert named.keys() == written.keys()
    return max(float((named[name] - written[name]).abs().max()) for name in named)


def reweighted(run: TrainingRun, weights: torch.Tensor) -> TrainingRun:
    """The run in which row i counts weights[i] times."""

    def loss(parameters: Any, inputs: Any, ones: torch.Tensor) -> torch.Tensor:
        rows, batch = inputs
        return run.loss(parameters, batch, ones * weights[rows])

    steps = [
        dataclasses.replace(step, batches=[
            dataclasses.replace(batch, inputs=(batch.rows, batch.inputs)) for batch in step.batches
        ])
        for step in run.steps
    ]  # fmt: skip
    return dataclasses.replace(run, steps=steps, loss=loss, ended=None)


def judged(run: TrainingRun) -> list[int]:
    """A row of every micro-batch, in turn the first, second, ... of it, and all of the last."""
    batches = [batch.rows.tolist() for step in run.steps for batch in step.batches]
    return sorted({rows[i % len(rows)] for i, rows in enumerate(batches)} | {*batches[-1]})


def quotients(recording: Recording, rows: list[int]) -> list[float]:
    """Central difference of the target's loss by the weight of each of some rows."""
    weights = torch.ones(recording.run.row_count, dtype=torch.float64)
    run, loss = reweighted(recording.run, weights), target_losses(recording, "sets")
    found = []
    for row in rows:
        sides = []
        for change in (STEP, -STEP):
            weights[row] = 1 + change
            with torch.no_grad():
                sides.append(float(loss(replay_forwards(run))[0]))
        weights[row] = 1
        found.append((sides[0] - sides[1]) / (2 * STEP))
    return found


def main(config: Path, checkpoint: Path, adapter: Path, table: Path) -> dict[str, Any]:
    """Compare."""
    whole = record(read(config, []), lambda begun: None)
    rest = record(read(config, [f"resume_from_checkpoint={checkpoint}"]), lambda begun: None)
    # LlamaFactory's default, whose kernel rounds otherwise than torch's plain AdamW.
    fused = record(read(config, ["optim=adamw_torch_fused"]), lambda begun: None).run
    end, ended = replay_forwards(fused), fused.ended
    assert rest.run.moments is not None
    assert ended is not None
    found = {
        "steps": [len(whole.run.steps), len(rest.run.steps)],
        "sizes": [[len(b.rows) for b in step.batches] for step in whole.run.steps],
        "rates": [step.learning_rate for step in whole.run.steps],
        "taken": rest.run.moments.steps,
        "whole": deviation(replay_forwards(whole.run), adapter),
        "rest": deviation(replay_forwards(rest.run), adapter),
        "fused": max(float((end[name] - ended[name]).abs().max()) for name in end),
    }
    told = pq.read_table(table).to_pydict()
    rows = judged(rest.run)
    slopes = np.array(quotients(rest.in_float64(), rows))
    scores = np.array(told["score"])[rows]
    found["relative"] = (np.abs(-scores - slopes) / np.abs(slopes)).tolist()
    return found


if __name__ == "__main__":
    answer = main(*map(Path, sys.argv[1:]))
    print("\n" + json.dumps(answer))
