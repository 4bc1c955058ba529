"""Which score predicts what a row really does: rank correlation with the effect of real steps.

    uv run python benchmarks/quality/effect.py              # an hour on one core; resumable
    uv run python benchmarks/quality/effect.py --states grid --seeds 1

The embedded model, paused in four states: after 12 and 36 steps, after 106 steps looking at rows
that it was trained on, and after 36 steps clipped at a tenth of the gradient's usual norm; the
grid varies steps, learning rate, rows of a step and clipping one by one. Accumulated steps are
rows of a step: the Trainer divides by the tokens of all of them. Of 64 training rows the true
effect on the loss of the target (32 rows of `date`) is measured by optimizer steps that are taken
back: `one`, a step on the row alone; `batch`, a step on B rows against the same step without the
row (its part of the loss left out, the denominator kept), mean over three batches of others by lot.
Scores are exact, without projection, by the library's own features; `off mean` leaves out the
component along the mean gradient, which is the derivative of a clipped step.

Prints and appends to results/effect.csv Spearman's correlation with a 95% bootstrap interval over
the rows; `ceiling`, what a perfect score would reach beside the luck of the draw of three batches
(Spearman and Brown's formula on the correlations between batches); and `crossed`, the share of
coordinates in which a row's own square outweighs the second moment, (1 - beta2) g^2 > beta2 v.
A state and seed that the CSV has is not measured again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from report import RESULTS, append, echo, machine, read
from scipy.stats import rankdata, spearmanr
from tinyrun import TinyRun

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.moments import AdamMoments
from gradstore.export.share import OptimizerStep, StepShare, expected_share
from gradstore.export.units import Batches

ROWS, BATCHES, LATEST = 64, 3, 10
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """Where training is paused.

    Attributes:
        name: for tables.
        step: optimizer steps before.
        clip: max_grad_norm, as a multiple of the usual norm; 0 takes the Trainer's 1.0.
        learnt: whether the rows looked at are those trained on.
        rate: learning rate, as a multiple of the example's.
        rows: B, rows of a step.
    """

    name: str
    step: int
    clip: float = 0.0
    learnt: bool = False
    rate: float = 1.0
    rows: int = 8


STATES = {
    "default": (
        State("12", 12),
        State("36", 36),
        State("106, learnt rows", 106, learnt=True),
        State("36, clipped", 36, clip=0.1),
    ),
    "grid": (
        State("36, rate x 4", 36, rate=4.0),
        State("36, B = 32", 36, rows=32),
        State("36, rate / 4", 36, rate=0.25),
        State("36, B = 2", 36, rows=2),
        State("36, clipped to a third", 36, clip=0.33),
        State("400", 400, learnt=True),
        State("100, clipped", 100, clip=0.1, learnt=True),
    ),
}


def gradients(run: TinyRun, rows: Any, chosen: npt.NDArray[np.int64]) -> tuple[torch.Tensor, Any]:  # noqa: ANN401 - slots
    """(b, p) gradients of rows' mean token losses, and their layout."""
    with GradientCapture(run.model) as capture:
        found = torch.empty(len(chosen), capture.p)
        for start in range(0, len(chosen), 32):
            here = chosen[start : start + 32]

            def sink(slot: ParameterSlot, g: torch.Tensor, start: int = start) -> None:
                found[start : start + len(g), slot.start : slot.start + slot.numel] = g

            capture.capture(run.collate([rows.dataset[int(i)] for i in here]), sink)
        return found, capture.slots


def target_loss(run: TinyRun) -> float:
    """Mean loss of the target rows."""
    return float(run.losses(run.data.targets[0]).mean())


def loss_after(run: TinyRun, rows: npt.NDArray[np.int64], without: int | None = None) -> float:
    """Target loss after one step on these rows, then taken back; `without` leaves a row out."""
    batch = run.collate([run.data.train.dataset[int(i)] for i in rows])
    labels = batch["labels"]
    count = (labels[:, 1:] != -100).sum()
    if without is not None:
        labels = labels.clone()
        labels[without] = -100
    with run.rewound():
        run.model.train()
        logits = run.model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum"
        )
        (losses / count).backward()
        torch.nn.utils.clip_grad_norm_(run.trained, run.max_grad_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()
        return target_loss(run)


def true_effects(
    run: TinyRun, rows: npt.NDArray[np.int64], seed: int
) -> tuple[dict[str, Floats], float]:
    """How far each row lowers the target's loss, by real steps, and the ceiling of `batch`."""
    rng = np.random.default_rng(seed)
    one = np.array([-loss_after(run, np.array([row])) for row in rows])
    batch = np.zeros((len(rows), BATCHES))
    for number, row in enumerate(rows):
        for draw in range(BATCHES):
            others = rng.choice(np.setdiff1d(np.arange(len(run.data.train)), [row]),
                                run.batch_size - 1, replace=False)  # fmt: skip
            together = np.concatenate([[row], others])
            batch[number, draw] = (
                loss_after(run, together, without=0) - loss_after(run, together)
            )  # fmt: skip
    pairs = spearmanr(batch).statistic[np.triu_indices(BATCHES, 1)]
    alike = float(np.mean(pairs))
    ceiling = (BATCHES * alike / (1 + (BATCHES - 1) * alike)) ** 0.5
    return {"one": one, "batch": batch.mean(axis=1)}, ceiling


@dataclass(frozen=True)
class Exact:
    """What scores are made of: (b, p) gradients of the rows, (m, p) of the target."""

    train: torch.Tensor
    targets: torch.Tensor
    tokens: torch.Tensor
    slots: Any
    moments: AdamMoments
    share: StepShare

    def feature(self, kind: str, gradients: torch.Tensor | None = None) -> torch.Tensor:
        """Map the rows' gradients, or others of as many tokens, to features (b, p)."""
        spec = FeatureSpec(kind, share=self.share)  # type: ignore[arg-type]
        mapped = FeatureMap(spec, self.slots, self.moments)
        out = (self.train if gradients is None else gradients).clone()
        for slot in self.slots:
            span = slice(slot.start, slot.start + slot.numel)
            out[:, span] = mapped.apply_(slot, out[:, span].contiguous(), self.tokens)
        return out

    @property
    def crossed(self) -> float:
        """Share of coordinates with (1 - beta2) g^2 > beta2 v, mean over the rows."""
        found = 0.0
        for slot in self.slots:
            state = self.moments.of(slot)
            beta = state.constants.beta2
            own = (1 - beta) * self.train[:, slot.start : slot.start + slot.numel].square()
            found += float((own > beta * state.v.reshape(-1)).float().mean(dim=0).sum())
        return found / self.train.shape[1]


def exact(
    run: TinyRun, moments: AdamMoments, rows: npt.NDArray[np.int64]
) -> tuple[Exact, torch.Tensor]:
    """Gradients and shares of the rows, and the mean gradient (p,) of rows by lot."""
    train, slots = gradients(run, run.data.train, rows)
    targets, _ = gradients(run, run.data.targets[0], np.arange(len(run.data.targets[0])))
    some = Batches(run.data.train.dataset, run.collate, run.data.train.lengths)
    step = OptimizerStep(run.batch_size, run.max_grad_norm)
    share = expected_share(run.model, some.sample(0), step)
    counts = torch.as_tensor(np.asarray(run.data.train.target_tokens))
    sample = np.random.default_rng(0).choice(len(run.data.train), 256, replace=False)
    others, _ = gradients(run, run.data.train, sample)
    mean = (others * counts[sample, None]).mean(dim=0)
    return Exact(train, targets, counts[rows], slots, moments, share), mean


def scores(made: Exact, mean: torch.Tensor) -> Iterator[tuple[str, Floats]]:
    """Every score of the rows, by name."""
    unit_targets = torch.nn.functional.normalize(made.targets, dim=1).mean(dim=0)
    target = made.targets.mean(dim=0)
    ahead = mean / mean.norm()
    off = made.train - (made.train @ ahead)[:, None] * ahead

    def both(name: str, x: torch.Tensor) -> Iterator[tuple[str, Floats]]:
        cosine = torch.nn.functional.normalize(x, dim=1) @ unit_targets
        yield f"{name}, cosine", cosine.double().numpy()
        yield f"{name}, dot", (x @ target).double().numpy()

    for kind in ("adam", "adam_marginal", "adam_share", "sgd"):
        yield from both(kind, made.feature(kind))
    yield from both("adam_share off mean", made.feature("adam_share", off))
    tokens = made.tokens.double().numpy()
    for kind in ("adam_marginal", "sgd"):
        dot = (made.feature(kind) @ target).double().numpy()
        yield f"{kind}, dot x tokens", dot * tokens
    yield "sgd, fisher cosine", _fisher(made.train, made.targets)


def _fisher(train: torch.Tensor, targets: torch.Tensor) -> Floats:
    """Damped cosines with R of the rows looked at; d stands for the 4,096 of a projection."""
    x = torch.nn.functional.normalize(train, dim=1).double()
    t = torch.nn.functional.normalize(targets, dim=1).double()
    level = len(x) / 4096
    cross = x @ t.T
    inner = torch.linalg.solve(x @ x.T + level * torch.eye(len(x), dtype=torch.float64), cross)
    lengths = (1 - (cross * inner).sum(dim=0)).clamp(min=0).sqrt()
    found: Floats = (inner / lengths).mean(dim=1).numpy()
    return found


def interval(score: Floats, effect: Floats) -> tuple[float, float, float]:
    """Spearman's correlation, and its 95% bootstrap interval over the rows."""
    picks = np.random.default_rng(0).integers(0, len(score), (999, len(score)))
    ranks = [rankdata(values[picks], axis=1) for values in (score, effect)]
    x, y = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    draws = (x * y).sum(axis=1) / np.sqrt((x * x).sum(axis=1) * (y * y).sum(axis=1))
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(spearmanr(score, effect).statistic), float(low), float(high)


def paused(
    state: State, seed: int, targets: Sequence[str] = ("tiny_target",)
) -> tuple[TinyRun, AdamMoments]:
    """Train a run with these target sets to a state."""
    with tempfile.TemporaryDirectory(prefix="effect-") as folder:
        run = TinyRun.start(seed, Path(folder) / "run", targets=targets)
    run.learning_rate *= state.rate
    run.batch_size = state.rows
    if state.clip:
        run.train_to(LATEST)
        run.max_grad_norm = state.clip * float(np.median(run.norms))
    return run, run.train_to(state.step)


def one_state(state: State, seed: int, bank: Path | None) -> list[dict[str, Any]]:
    """One line for every score and effect."""
    run, moments = paused(state, seed)
    order, seen = run.order, state.step * run.batch_size
    pool = order[:seen] if state.learnt else order[seen:]
    rows = np.random.default_rng(seed).choice(pool, min(ROWS, len(pool)), replace=False)
    kept = None if bank is None else bank / f"{state.name}-{seed}.npz"
    if kept is not None and kept.exists():
        held = dict(np.load(kept))
        ceiling = float(held.pop("ceiling"))
        effects: dict[str, Floats] = held
    else:
        effects, ceiling = true_effects(run, rows, seed)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            np.savez(kept, ceiling=ceiling, **effects)  # type: ignore[arg-type]
    made, mean = exact(run, moments, rows)
    lines = []
    for name, score in scores(made, mean):
        for effect, values in effects.items():
            middle, low, high = interval(score, values)
            lines.append({
                "state": state.name, "seed": seed, "score": name, "effect": effect,
                "spearman": round(middle, 4), "low": round(low, 4), "high": round(high, 4),
                "ceiling": round(ceiling, 4), "clip": round(made.share.clip, 4),
                "crossed": round(made.crossed, 4),
            })  # fmt: skip
        echo(f"{state.name:18} {name:34} " + "  ".join(
            f"{line['effect']} {line['spearman']:.3f} [{line['low']:.3f}, {line['high']:.3f}]"
            for line in lines[-len(effects):]
        ))  # fmt: skip
    return lines


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--states", choices=STATES, nargs="+", default=["default"])
    parser.add_argument("--csv", type=Path, default=RESULTS / "effect.csv")
    parser.add_argument("--bank", type=Path, help="folder that keeps the measured effects")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for state in (state for name in options.states for state in STATES[name]):
            known = read(options.csv) if options.csv.exists() else []
            if (state.name, str(seed)) in {(line["state"], line["seed"]) for line in known}:
                continue
            lines = one_state(state, seed, options.bank)
            append(options.csv, [machine() | line for line in lines])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
