"""Error of a cosine after projection, against the exact one, and what it does to a selection.

    uv run python benchmarks/projection_noise.py        # a few minutes on two cores

Cosines between every training row of the embedded model (adam_marginal) and every single row of
the 8 target sets (plain gradient), exact and after projection to d=4096, as float32 and as the
float16 of a store. Theory (PERFORMANCE 4): the error has a standard deviation of
(1 - rho^2) / sqrt(d). Each error is divided by that; the figure is the root mean square of the
quotients over all pairs and projection seeds, at most 1.1. Beside it the largest quotient, and how
many of the exact top 5% rows are also in the top 5% of the projected scores (mean over the targets
and seeds). Prints one table, appends to results/projection_noise.csv, exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import ProjectionSpec, project
from report import RESULTS, append, echo, machine
from tinyrun import RowBatch, TinyRun, as_stored, gather

from gradstore.export.direct import TargetDirections, direct_products, target_directions
from gradstore.export.features import FeatureSpec
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import export_features
from gradstore.scoring.selection import rows_for_fraction, select_top

FRACTION = 0.05
LIMIT = 1.1
FloatArray = npt.NDArray[np.floating[Any]]


def single_rows(run: TinyRun) -> Iterator[list[RowBatch]]:
    """Every target row as a sub-task of its own, set by set."""
    for rows in run.data.targets:
        for i in range(len(rows)):
            yield [(np.array([i]), run.collate([rows.dataset[i]]))]


def cosines(left: npt.NDArray[np.float32], right: npt.NDArray[np.float32]) -> FloatArray:
    """(n, d), (m, d) -> (n, m) float64."""
    units = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, (left, right))]
    return np.asarray(units[0] @ units[1].T)


def overlap(found: FloatArray, exact: FloatArray, sets: int) -> float:
    """Share of the exact top 5% that is found, mean over the target sets; both (n, m)."""
    k = rows_for_fraction(FRACTION, len(exact))
    pairs = zip(np.split(found, sets, axis=1), np.split(exact, sets, axis=1), strict=True)
    tops = [[set(select_top(x.mean(axis=1), k).tolist()) for x in pair] for pair in pairs]
    return float(np.mean([len(ours & theirs) / k for ours, theirs in tops]))


def measure(
    run: TinyRun,
    moments: AdamMoments,
    targets: TargetDirections,
    exact: FloatArray,
    spec: ProjectionSpec,
) -> Iterator[tuple[str, FloatArray, float]]:
    """(storage, normalised errors (n, m), overlap) of one projection."""
    train = gather(
        export_features(
            run.model,
            run.batches(run.data.train),
            features=FeatureSpec("adam_marginal"),
            projection=spec,
            moments=moments,
        ),
        len(run.data.train),
        spec.d,
    )
    rows = project(targets.matrix, spec).numpy()
    for storage, pair in (("float32", (train, rows)), ("float16", map(as_stored, (train, rows)))):
        found = cosines(*pair)
        errors = (found - exact) * np.sqrt(spec.d) / (1 - np.square(exact))
        yield storage, errors, overlap(found, exact, len(run.data.targets))


def at_step(run: TinyRun, step: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One line per projection and storage."""
    moments = run.train_to(step)
    targets = target_directions(run.model, list(single_rows(run)), FeatureSpec("sgd"))
    train = run.data.train
    exact = direct_products(
        run.model, run.batches(train), len(train), targets, FeatureSpec("adam_marginal"), moments
    ).astype(np.float64)
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    methods: tuple[tuple[Literal["sjlt", "rademacher"], int], ...] = (
        ("sjlt", options.sjlt_seeds),
        ("rademacher", options.dense_seeds),
    )
    for method, seeds in methods:
        for seed in range(1, seeds + 1):
            echo(f"step {step}, {method}, seed {seed} ...")
            spec = ProjectionSpec(method, p=targets.matrix.shape[1], d=options.dim, seed=seed)
            for storage, errors, kept in measure(run, moments, targets, exact, spec):
                figures = float(np.square(errors).mean()), float(np.abs(errors).max()), kept
                found.setdefault((method, storage), []).append(figures)
    return [
        {
            "step": step,
            "p": targets.matrix.shape[1],
            "d": options.dim,
            "projection": method,
            "stored": storage,
            "pairs": exact.size,
            "seeds": len(figures),
            "std_over_theory": round(float(np.sqrt(np.mean([f[0] for f in figures]))), 4),
            "worst_seed": round(float(np.sqrt(max(f[0] for f in figures))), 4),
            "largest_over_theory": round(max(f[1] for f in figures), 2),
            "top5_overlap": round(float(np.mean([f[2] for f in figures])), 4),
            "limit": LIMIT,
        }
        for (method, storage), figures in found.items()
    ]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--dim", type=int, default=4096)
    parser.add_argument("--sjlt-seeds", type=int, default=4)
    parser.add_argument("--dense-seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="more help an idle machine only")
    parser.add_argument("--csv", type=Path, default=RESULTS / "projection_noise.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="projection-noise-") as folder:
        run = TinyRun.start(1, Path(folder))
        for step in options.steps:
            lines += at_step(run, step, options)
    shown = ("step", "projection", "stored", "seeds", "std_over_theory", "worst_seed",
             "largest_over_theory", "top5_overlap", "limit")  # fmt: skip
    echo("".join(f"{name:>21}" for name in shown))
    for line in lines:
        echo("".join(f"{line[name]!s:>21}" for name in shown))
    append(options.csv, [machine() | line for line in lines])
    return int(any(line["std_over_theory"] > LIMIT for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
