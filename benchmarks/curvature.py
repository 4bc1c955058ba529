"""Cost of `preconditioner: fisher`: its fit, and the scan that follows beside a plain one.

    uv run python benchmarks/curvature.py                 # 2 GB of disk, a few minutes

A store of 200,000 x 4,096 float16 rows and one target set. *Fit*: the second moment of the rows it
takes and its Cholesky factor. *Solve*: 512 target rows. *Scan*: `influence_scores` with the fitted
product less its fit and solve, in turns with plain cosines (A B A B). Appends to
results/curvature.csv.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from report import RESULTS, Took, append, compared, echo, machine, timed
from serve import TARGET_ROWS, write

from gradstore import InnerProduct, checkpoint_features, influence_scores
from gradstore.scoring.curvature import FEWEST_ROWS, ROWS_PER_DIMENSION, Fisher
from gradstore.store.reader import open_store


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--folder", default=None, help="where the temporary store goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="curvature-") as folder:
        write(Path(folder, "store"), options.rows, options.dim)
        pairs = checkpoint_features(open_store(Path(folder, "store")))
        train = pairs[-1].train
        product = InnerProduct("cosine", "fisher")
        influence_scores(pairs)  # the page cache is warm from here on
        plain, whitened, fits, solves = [], [], [], []
        queries = np.random.default_rng(0).normal(size=(TARGET_ROWS, options.dim))
        for _ in range(options.pairs):
            plain.append(timed(lambda: influence_scores(pairs)))
            began = time.perf_counter()
            fisher = Fisher.of(train, unit=True)
            fits.append(time.perf_counter() - began)
            solves.append(timed(partial(fisher.whitened_unit, queries)).wall)
            del fisher
            whole = timed(lambda: influence_scores(pairs, product=product))
            whitened.append(Took(whole.wall - fits[-1] - solves[-1], 0.0))
    line = machine(torch.get_num_threads()) | {
        "rows": options.rows,
        "dim": options.dim,
        "fitted_on": min(options.rows, max(FEWEST_ROWS, ROWS_PER_DIMENSION * options.dim)),
        "fit_s": round(float(np.median(fits)), 2),
        "solve_s": round(float(np.median(solves)), 2),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        **compared(whitened, plain, ("fisher", "plain")),
    }
    for name, value in line.items():
        echo(f"{name:16}{value}")
    append(RESULTS / "curvature.csv", [line])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
