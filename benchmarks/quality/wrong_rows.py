"""Which product takes wrong answers: their share among the best rows of every score.

    uv run python benchmarks/quality/wrong_rows.py          # about ten minutes on one core

The rows of `rules_data.py`, of which a fifth have an answer that no rule gives, on the embedded
model after 10 and 60 steps; every rule as the target in turn (32 rows). A score takes the best 5%
(50 rows). Figures, means over the eight rules: `wrong`, the share of wrong answers among them (by
chance 0.20), and `share`, that of the right rule (by chance 0.10). Features are whole gradients'
after a projection (sjlt, d = 4096) and float16, as a store has them.

Appends to results/wrong_rows.csv, seed by seed; a seed that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from report import RESULTS, append, echo, machine, read
from rules import STATES, TARGETS
from rules_data import RULES, WRONG, write_data
from tinyrun import TinyRun
from world import World

from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.products import InnerProduct
from gradstore.scoring.selection import select_top

#: Feature and product of a score; `none` ranks as `target` does but for the target rows' weights.
SCORES = {
    f"{kind}, {normalize}": (kind, InnerProduct(normalize))
    for kind in ("adam_marginal", "adam_share", "sgd")
    for normalize in ("cosine", "target", "none")
} | {"sgd, fisher, cosine": ("sgd", InnerProduct("cosine", "fisher"))}


def measure(world: World) -> list[dict[str, Any]]:
    """One line a score."""
    run, lines = world.run, []
    for name, (kind, product) in SCORES.items():
        found = []
        for target, rule in enumerate(RULES):
            train = world.features(kind, run.data.train)
            queries = world.features("sgd", run.data.targets[target])
            pair = CheckpointFeatures(train, (queries,))
            scores = influence_scores([pair], product=product)
            skills = run.skills[select_top(scores.values, world.k, usable=scores.usable)]
            found.append((float((skills == WRONG).mean()), float((skills == rule).mean())))
        wrong, share = np.mean(found, axis=0)
        lines.append({
            "score": name, "step": run.step, "seed": run.seed,
            "wrong": round(float(wrong), 4), "share": round(float(share), 4),
        })  # fmt: skip
        echo(", ".join(f"{key} {value}" for key, value in lines[-1].items()))
    return lines


def one_seed(seed: int) -> list[dict[str, Any]]:
    """All scores on the rows of one seed."""
    with tempfile.TemporaryDirectory(prefix="wrong-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_data(data, seed)
        run = TinyRun.start(
            seed, Path(folder) / "run", data_dir=data, train="rules_train", targets=TARGETS
        )
    return [
        line
        for step, clip in STATES
        if not clip
        for line in measure(World(run, run.train_to(step), {}))
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--csv", type=Path, default=RESULTS / "wrong_rows.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        known = read(options.csv) if options.csv.exists() else []
        if str(seed) not in {line["seed"] for line in known}:
            append(options.csv, [machine() | line for line in one_seed(seed)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
