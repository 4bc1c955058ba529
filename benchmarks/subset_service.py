"""Which target rows a subset rule serves, where the target is of several kinds.

    python benchmarks/subset_service.py                    # about five minutes

The embedded model after 10 and 100 steps, its 1,600 training rows (8 skills and 20% noise), and one
target set of 32 rows, 4 of each skill; exact adam_marginal cosines. Each rule takes 80 rows (5%).
Figures: rows that are noise, rows of the skill that gets fewest (10 would be even), and how many
skills are served as if evenly (the exponential of the entropy, 8 at most). Prints one line each and
appends to results/subset_service.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from report import RESULTS, append, echo, machine
from tinyrun import SKILLS, TinyRun

from gradstore.export.direct import direct_products, target_directions
from gradstore.export.features import FeatureSpec
from gradstore.scoring.best_rows import HeldTable
from gradstore.scoring.rules import SUBSETS, Rule

STEPS = (10, 100)
EACH, CHOSEN = 4, 80
RULES = {name: Rule(name) for name in SUBSETS} | {
    "knn_uniform, neighbours 20": Rule("knn_uniform", 20)
}


def similarities(run: TinyRun, step: int) -> npt.NDArray[np.float32]:
    """(n, t) cosines of every training row with 4 target rows of each skill."""
    moments = run.train_to(step)
    subtasks = [list(run.batches(rows)) for rows in run.data.targets]
    sgd, n = FeatureSpec("sgd"), len(run.data.train)
    directions = target_directions(run.model, subtasks, sgd, each_row=True)
    every = direct_products(
        run.model, run.batches(run.data.train), n, directions, FeatureSpec("adam_marginal"), moments
    )[:, len(subtasks) :]
    starts = np.cumsum([0, *directions.rows[:-1]])
    return every[:, (starts[:, None] + np.arange(EACH)).ravel()]


def served(chosen: npt.NDArray[np.int64], skills: npt.NDArray[np.str_]) -> dict[str, float]:
    """Count what a choice is made of."""
    counts = np.array([(skills[chosen] == skill).sum() for skill in SKILLS])
    shares = counts[counts > 0] / max(counts.sum(), 1)
    return {
        "noise": int((skills[chosen] == "noise").sum()),
        "fewest": int(counts.min()),
        "skills": round(float(np.exp(-(shares * np.log(shares)).sum())), 3),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="subset-service-") as folder:
        for seed in options.seeds:
            run = TinyRun.start(seed, Path(folder))
            for step in STEPS:
                table = similarities(run, step)
                scores, usable = table.mean(axis=1), np.ones(len(table), dtype=bool)
                for name, rule in RULES.items():
                    rows = rule.choose(CHOSEN, scores, HeldTable(table), usable=usable)
                    line = {"rule": name, "step": step, "seed": seed} | served(rows, run.skills)
                    lines.append(machine() | line)
                    echo(", ".join(f"{key} {value}" for key, value in line.items()))
    append(RESULTS / "subset_service.csv", lines)


if __name__ == "__main__":
    main()
