"""What it costs to ask for losses: `row_losses` over a plain evaluation pass on the same batches.

    uv run python benchmarks/loss_pass.py               # about four minutes

*Losses* is `dataflex.models.passes.row_losses`, the pass behind the loss selector and every other
strategy that reads losses. *Plain* is what a Trainer's evaluation does with the same collated
batches: eval mode, no gradients, the model's own loss from its labels. Passes alternate A B A B
after a warm-up; the ratio is the median over the pairs. Prints one table, appends to
results/loss_pass.csv, and exits 1 if a ratio is above 1.05.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from report import RESULTS, append, compared, echo, machine, timed
from workloads import Workload, llama, tiny

from dataflex.models.passes import batches, row_losses
from dataflex.run.context import RunContext
from gradstore.capture.limits import token_budget

LIMIT = 1.05


def plain_pass(run: RunContext) -> None:
    """Every row once, in the batches of `row_losses`, with the model's own loss."""
    model = run.model
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _, batch in batches(run, run.data.train, None, 2 * token_budget(model), lambda _: None):
            float(model(**batch).loss)
    model.train(was_training)


def measure(workload: Workload, pairs: int, folder: Path) -> dict[str, object]:
    """Median seconds of both passes, and the median ratio of a pair."""
    run = workload.context(folder)
    found = row_losses(run)
    plain_pass(run)
    if not np.isfinite(found).all():
        raise SystemExit("not every row has a loss")
    ours, plain = [], []
    for _ in range(pairs):
        ours.append(timed(lambda: row_losses(run)))
        plain.append(timed(lambda: plain_pass(run)))
    return {
        "workload": workload.name,
        "rows": len(run.data.train),
        **compared(ours, plain, ("losses", "plain")),
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--csv", type=Path, default=RESULTS / "loss_pass.csv")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="loss-pass-") as folder:
        for workload in (tiny(), llama(96)):
            lines.append(measure(workload, options.pairs, Path(folder)))
            echo(", ".join(f"{key} {value}" for key, value in lines[-1].items()))
    append(options.csv, [machine() | line for line in lines])
    return int(max(float(str(line["ratio"])) for line in lines) > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
