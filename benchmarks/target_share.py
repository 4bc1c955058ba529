"""Share of the target skill among the top 5%, for every feature: which one finds the right rows.

    uv run python benchmarks/target_share.py            # about five minutes

The embedded model after 10 and after 100 optimizer steps on random rows, its 1,600 training rows,
and every skill as the target in turn (32 rows). A method scores all rows and the best 80 are taken;
the figure is the share of them that have the target's skill, mean over the 8 skills. By chance it
is 0.10. *Exact* means cosines of whole features; the projected ones go through float16 as in a
store. `loss` looks at no target: its figure is the mean of 200 draws of its own kind. One pass over
the rows per seed and step feeds every feature. Prints one table, appends to
results/target_share.csv, and exits 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import Accumulator, ProjectionSpec
from report import RESULTS, append, echo, machine
from tinyrun import SKILLS, Held, TinyRun, as_stored, gather

from dataflex.selectors.loss import band_weights, draw, tempered
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.export.direct import target_directions
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.gradient_space import effective_seed
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import export_features
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.selection import rows_for_fraction, select_top

FRACTION = 0.05
STEPS = (10, 100)
DRAWS = 200
EXACT = {
    "exact adam_marginal": FeatureSpec("adam_marginal"),
    "exact adam (published)": FeatureSpec("adam"),
    "exact adam (eps outside)": FeatureSpec("adam", "outside"),
    "exact sgd": FeatureSpec("sgd"),
    "exact sign": FeatureSpec("sign"),
}
PROJECTED = {"adam_marginal, sjlt 4096": "sjlt", "adam_marginal, rademacher 4096": "rademacher"}
DIM = 4096
BARS = {"exact adam_marginal": 0.90, "adam_marginal, sjlt 4096": 0.86}

FloatArray = npt.NDArray[np.floating[Any]]
Shares = dict[tuple[str, int, int], float]  # (method, step, seed)


@dataclass
class Features:
    """What one pass over the training rows leaves.

    Attributes:
        scores: exact cosines (n, q) per method.
        projected: features (n, d) float32 per method.
        losses: (n,) float64.
    """

    scores: dict[str, FloatArray]
    projected: dict[str, npt.NDArray[np.float32]]
    losses: npt.NDArray[np.float64]


def one_pass(run: TinyRun, moments: AdamMoments, specs: Mapping[str, ProjectionSpec]) -> Features:
    """Every feature of every training row, from one gradient each."""
    n = len(run.data.train)
    kinds = {kind: FeatureSpec(kind) for kind in ("sgd", "sign")}
    subtasks = run.data.targets
    directions = {
        kind: target_directions(run.model, [run.batches(rows) for rows in subtasks], spec).matrix
        for kind, spec in kinds.items()
    }
    found = Features(
        {name: np.empty((n, len(subtasks))) for name in EXACT},
        {name: np.empty((n, spec.d), np.float32) for name, spec in specs.items()},
        np.empty(n),
    )
    with GradientCapture(run.model) as capture:
        maps = {name: FeatureMap(spec, capture.slots, moments) for name, spec in EXACT.items()}
        for rows, batch in run.batches(run.data.train):
            dots = {name: torch.zeros(len(rows), len(subtasks)).double() for name in maps}
            squares = {name: torch.zeros(len(rows)).double() for name in maps}
            sums = {name: Accumulator(spec, len(rows)) for name, spec in specs.items()}

            def sink(
                slot: ParameterSlot,
                gradient: torch.Tensor,
                dots: dict[str, torch.Tensor] = dots,
                squares: dict[str, torch.Tensor] = squares,
                sums: dict[str, Accumulator] = sums,
            ) -> None:
                for name, feature_map in maps.items():
                    feature = feature_map.apply_(slot, gradient.clone())
                    targets = directions["sign" if EXACT[name].kind == "sign" else "sgd"]
                    block = targets[:, slot.start : slot.start + slot.numel]
                    dots[name] += feature @ block.T
                    squares[name] += feature.square().sum(dim=1)
                    if EXACT[name].kind == "adam_marginal":
                        for accumulator in sums.values():
                            accumulator.add(feature, slot.start)

            stats = capture.capture(batch, sink)
            found.losses[rows] = stats.loss.numpy()
            for name, products in dots.items():
                found.scores[name][rows] = (products / squares[name].sqrt()[:, None]).numpy()
            for name, accumulator in sums.items():
                found.projected[name][rows] = accumulator.result().numpy()
    return found


def projected_scores(
    run: TinyRun, train: npt.NDArray[np.float32], spec: ProjectionSpec
) -> FloatArray:
    """(n, q) scores as a store's reader gives them, one sub-task at a time."""
    checkpoint = Held(as_stored(train))
    columns = []
    for rows in run.data.targets:
        parts = export_features(
            run.model, run.batches(rows), features=FeatureSpec("sgd"), projection=spec
        )
        target = Held(as_stored(gather(parts, len(rows), spec.d)))
        columns.append(influence_scores([CheckpointFeatures(checkpoint, (target,))]).values)
    return np.stack(columns, axis=1)


def share_of_target(scores: FloatArray, skills: npt.NDArray[np.str_]) -> float:
    """Mean over the targets of their skill's share among the best 5%; scores (n, q)."""
    k = rows_for_fraction(FRACTION, len(skills))
    columns = zip(scores.T, SKILLS, strict=True)
    return float(np.mean([(skills[select_top(c, k)] == skill).mean() for c, skill in columns]))


def share_of_draws(losses: npt.NDArray[np.float64], focus: str, run: TinyRun) -> float:
    """Compute the loss selector's share, mean over the targets and over many draws."""
    chances = tempered(band_weights(losses, focus, 5.0, (0.33, 0.66)), 1.0)
    k = rows_for_fraction(FRACTION, len(losses))
    generator = np.random.default_rng(run.seed)
    shares = [
        (run.skills[draw(chances, k, generator, replacement=False)] != "noise").mean()
        for _ in range(DRAWS)
    ]
    return float(np.mean(shares)) / len(SKILLS)


def measure(run: TinyRun, step: int, with_dense: bool) -> dict[str, float]:
    """Every method's share at one step of one run."""
    moments = run.train_to(step)
    p = sum(parameter.numel() for parameter in run.model.parameters() if parameter.requires_grad)
    specs = {
        name: ProjectionSpec(method, p=p, d=DIM, seed=effective_seed(run.seed, step))  # type: ignore[arg-type]
        for name, method in PROJECTED.items()
        if with_dense or method == "sjlt"
    }
    found = one_pass(run, moments, specs)
    shares = {name: share_of_target(scores, run.skills) for name, scores in found.scores.items()}
    for name, spec in specs.items():
        shares[name] = share_of_target(
            projected_scores(run, found.projected[name], spec), run.skills
        )
    for focus in ("high", "medium"):
        shares[f"loss (focus {focus})"] = share_of_draws(found.losses, focus, run)
    shares["random (expected)"] = float((run.skills != "noise").mean()) / len(SKILLS)
    return shares


def show(shares: Shares, seeds: list[int]) -> list[dict[str, Any]]:
    """Print the table; return the lines of the CSV."""
    methods = list(dict.fromkeys(method for method, _, _ in shares))
    steps = sorted({step for _, step, _ in shares})
    head = "".join(f"{f'step {s}:':>10}{' '.join(map(str, seeds)):>14}   mean" for s in steps)
    echo(f"{'seeds':32}{head}   bar")
    lines = []
    for method in methods:
        text = f"{method:32}"
        for step in steps:
            values = [shares[method, step, seed] for seed in seeds]
            mean, bar = float(np.mean(values)), BARS.get(method)
            text += "  " + " ".join(f"{value:.3f}" for value in values).rjust(22)
            text += f"  {mean:.3f}"
            lines += [
                {"method": method, "step": step, "seed": seed, "share": round(share, 4)}
                | {"bar": bar, "met": None if bar is None else mean >= bar}
                for seed, share in [*zip(seeds, values, strict=True), ("mean", mean)]
            ]
        met = all(line["met"] for line in lines if line["method"] == method)
        echo(text + (f"   >= {BARS[method]}: {'met' if met else 'MISSED'}" if bar else ""))
    return lines


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--no-dense", action="store_true", help="leave out the dense projection")
    parser.add_argument("--threads", type=int, default=1, help="more help an idle machine only")
    parser.add_argument("--csv", type=Path, default=RESULTS / "target_share.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shares: Shares = {}
    with tempfile.TemporaryDirectory(prefix="target-share-") as folder:
        for seed in options.seeds:
            run = TinyRun.start(seed, Path(folder))
            for step in STEPS:
                echo(f"seed {seed}, step {step} ...")
                for method, share in measure(run, step, not options.no_dense).items():
                    shares[method, step, seed] = share
    lines = show(shares, options.seeds)
    append(options.csv, [machine() | line for line in lines])
    return int(any(line["met"] is False for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
