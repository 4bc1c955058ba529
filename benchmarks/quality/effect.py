"""Which score predicts what a row really does: rank correlation with the effect of real steps.

    uv run python benchmarks/quality/effect.py              # about half an hour on one core

The embedded model, paused in four states: after 12 and 36 steps, after 106 steps looking at rows
that it was trained on, and after 36 steps clipped at a tenth of the gradient's usual norm. Of 160
training rows the true effect on the loss of the target (32 rows of `date`) is measured by
optimizer steps that are taken back: `one`, a step on the row alone; `batch`, a step on eight rows
against the same step without the row (its part of the loss left out, the denominator kept), mean
over two batches. Scores are exact, without projection; the feature of a row is taken of

- `g`: its gradient, as a store has it;
- `cg/B`: the share that enters a step: clipped by the last ten steps' mean factor, over B = 8;

`x tokens` multiplies a score by the row's target tokens over their mean: the Trainer's loss is a
mean over the tokens of a batch, so a long answer enters it with more weight.

Prints and appends to results/effect.csv Spearman's correlation with a 95% bootstrap interval over
the rows, mean over seeds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from report import RESULTS, append, echo, machine
from scipy.stats import spearmanr
from tinyrun import TinyRun

from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.slots import ParameterSlot
from gradstore.export.features import FeatureMap, FeatureSpec
from gradstore.export.moments import AdamMoments

ROWS, BATCHES, LATEST = 160, 2, 10
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class State:
    """Where training is paused.

    Attributes:
        name: for tables.
        step: optimizer steps before.
        clip: max_grad_norm, as a multiple of the usual norm; 0 takes the Trainer's 1.0.
        learnt: whether the rows looked at are those trained on.
    """

    name: str
    step: int
    clip: float = 0.0
    learnt: bool = False


STATES = (
    State("12", 12),
    State("36", 36),
    State("106, learnt rows", 106, learnt=True),
    State("36, clipped", 36, clip=0.1),
)


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


def true_effects(run: TinyRun, rows: npt.NDArray[np.int64], seed: int) -> dict[str, Floats]:
    """How far each row lowers the target's loss, by real steps."""
    rng = np.random.default_rng(seed)
    one = np.array([-loss_after(run, np.array([row])) for row in rows])
    batch = np.zeros(len(rows))
    for number, row in enumerate(rows):
        for _ in range(BATCHES):
            others = rng.choice(np.setdiff1d(np.arange(len(run.data.train)), [row]),
                                run.batch_size - 1, replace=False)  # fmt: skip
            together = np.concatenate([[row], others])
            batch[number] += loss_after(run, together, without=0) - loss_after(run, together)
    return {"one": one, "batch": batch / BATCHES}


def scores(
    run: TinyRun, moments: AdamMoments, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[str, Floats]]:
    """Every score of the rows, by name."""
    train, slots = gradients(run, run.data.train, rows)
    targets, _ = gradients(run, run.data.targets[0], np.arange(len(run.data.targets[0])))
    unit_targets = torch.nn.functional.normalize(targets, dim=1).mean(dim=0)
    tokens = np.asarray(run.data.train.target_tokens)[rows].astype(float)
    clip = np.mean([min(1.0, run.max_grad_norm / norm) for norm in run.norms[-LATEST:]])
    parts = {"g": train, "cg/B": train * float(clip) / run.batch_size}

    def feature(kind: str, part: torch.Tensor) -> torch.Tensor:
        mapped = FeatureMap(FeatureSpec(kind), slots, moments)  # type: ignore[arg-type]
        out = part.clone()
        for slot in slots:
            span = slice(slot.start, slot.start + slot.numel)
            out[:, span] = mapped.apply_(slot, out[:, span].contiguous())
        return out

    for kind in ("adam", "adam_marginal", "sgd"):
        for of, part in parts.items():
            if kind != "adam_marginal" and of != "g":
                continue
            x = feature(kind, part)
            cosine = (torch.nn.functional.normalize(x, dim=1) @ unit_targets).double().numpy()
            dot = (x @ targets.mean(dim=0)).double().numpy()
            yield f"{kind} of {of}, cosine", cosine
            yield f"{kind} of {of}, dot", dot
            yield f"{kind} of {of}, dot x tokens", dot * tokens / tokens.mean()
            del x
    yield "linear g/sqrt(v), dot", _linear(train, targets, slots, moments)
    yield "sgd of g, fisher cosine", _fisher(train, targets)


def _linear(train: torch.Tensor, targets: torch.Tensor, slots: Any, moments: AdamMoments) -> Floats:  # noqa: ANN401 - the capture's layout
    mean = targets.mean(dim=0)
    found = torch.zeros(len(train), dtype=torch.float64)
    for slot in slots:
        span = slice(slot.start, slot.start + slot.numel)
        state = moments.of(slot)
        root = (state.v.reshape(-1) + state.constants.eps).sqrt()
        found += (train[:, span] @ (mean[span] / root)).double()
    return found.numpy()


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
    rng = np.random.default_rng(0)
    draws = [
        spearmanr(score[pick], effect[pick]).statistic
        for pick in rng.integers(0, len(score), (999, len(score)))
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(spearmanr(score, effect).statistic), float(low), float(high)


def one_state(state: State, seed: int) -> list[dict[str, Any]]:
    """One line for every score and effect."""
    with tempfile.TemporaryDirectory(prefix="effect-") as folder:
        run = TinyRun.start(seed, Path(folder) / "run", targets=["tiny_target"])
    if state.clip:
        moments = run.train_to(LATEST)
        run.max_grad_norm = state.clip * float(np.median(run.norms))
    moments = run.train_to(state.step)
    seen = run.order[: state.step * run.batch_size]
    pool = seen if state.learnt else run.order[state.step * run.batch_size :]
    rows = np.random.default_rng(seed).choice(pool, min(ROWS, len(pool)), replace=False)
    effects = true_effects(run, rows, seed)
    lines = []
    for name, score in scores(run, moments, rows):
        for effect, values in effects.items():
            middle, low, high = interval(score, values)
            lines.append({
                "state": state.name, "seed": seed, "score": name, "effect": effect,
                "spearman": round(middle, 4), "low": round(low, 4), "high": round(high, 4),
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
    parser.add_argument("--csv", type=Path, default=RESULTS / "effect.csv")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for state in STATES:
            append(options.csv, [machine() | line for line in one_state(state, seed)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
