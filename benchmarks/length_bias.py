"""Do scores favour short answers, and what does taking the length out change.

    python benchmarks/length_bias.py                    # about six minutes

The embedded model after 10 and 100 steps, its 1,600 training rows, and every skill as the target in
turn (32 rows); exact adam_marginal gradients. Products: the cosine, which ranks by default, and the
dot product, which keeps the gradient's length; beside them that length alone (of a
4,096-dimensional sjlt). Spearman's correlation with a row's target tokens, over all rows and within
each skill (mean over the eight, so that it is not the target's own length that counts); then, for
every correction, the share of the target's skill among the best 5% (by chance 0.10), and the mean
tokens of these over those of the target skill's rows: 1 where the best are as long as what is
wanted. Figures are means over the eight targets. Prints one line each and appends to
results/length_bias.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gradkernels import ProjectionSpec
from report import RESULTS, append, echo, machine
from target_share import DIM, FRACTION, STEPS, one_pass
from tinyrun import SKILLS, TinyRun

from gradstore.export.gradient_space import effective_seed
from gradstore.scoring.length_bias import CORRECTIONS, length_correlation, without_length
from gradstore.scoring.selection import rows_for_fraction, select_top

Table = npt.NDArray[np.floating[Any]]


def products(run: TinyRun, step: int) -> dict[str, Table]:
    """(n, q) cosines and dot products at one step."""
    moments = run.train_to(step)
    p = sum(each.numel() for each in run.model.parameters() if each.requires_grad)
    spec = ProjectionSpec("sjlt", p=p, d=DIM, seed=effective_seed(run.seed, step))
    found = one_pass(run, moments, {"sjlt": spec})
    norms = np.linalg.norm(found.projected["sjlt"].astype(np.float64), axis=1)
    cosines = found.scores["exact adam_marginal"]
    return {
        "cosine": cosines,
        "dot product": cosines * norms[:, None],
        "gradient norm": np.broadcast_to(norms[:, None], cosines.shape),
    }


def measured(scores: Table, run: TinyRun, how: str) -> dict[str, float]:
    """Means over the eight targets: correlations and what the best 5% are."""
    tokens, every = run.data.train.target_tokens, np.ones(len(scores), dtype=bool)
    k = rows_for_fraction(FRACTION, len(scores))
    found: dict[str, list[float]] = {"all": [], "within": [], "share": [], "tokens": []}
    for column, skill in zip(scores.T, SKILLS, strict=True):
        values = without_length(column, tokens, how, usable=every)
        found["all"].append(length_correlation(values, tokens, usable=every))
        found["within"] += [
            length_correlation(values, tokens, usable=run.skills == other) for other in SKILLS
        ]
        best = select_top(values, k)
        found["share"].append(float((run.skills[best] == skill).mean()))
        found["tokens"].append(float(tokens[best].mean() / tokens[run.skills == skill].mean()))
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="length-bias-") as folder:
        for seed in options.seeds:
            run = TinyRun.start(seed, Path(folder))
            for step in STEPS:
                for product, scores in products(run, step).items():
                    for how in CORRECTIONS:
                        line = {"product": product, "step": step, "seed": seed, "correction": how}
                        lines.append(machine() | line | measured(scores, run, how))
                        echo(", ".join(f"{k} {v}" for k, v in list(lines[-1].items())[-8:]))
    append(RESULTS / "length_bias.csv", lines)


if __name__ == "__main__":
    main()
