"""How far scores can be trusted: LDS and QLD on the embedded model, against retrained models.

    uv run python benchmarks/quality/lds.py                 # about forty minutes on one core

One epoch of the embedded rows, 32 queries (4 target rows of each of the 8 skills). *LDS*: 100
models retrained on random halves of the rows from the same adapter, and the rank correlation over
them of a score's sum with the loss. *QLD* (`--qld`): a model retrained for each query without its
top 1% and 5%, against 10 without as many rows at random. Retrained models are banked
(`gradstore.evaluation.bank`): a run that was stopped goes on, and another score costs LDS nothing.
Scores are taken at four steps of one epoch on all rows (50, 100, 150, 200) and averaged, features
through a projection (sjlt, d = 4096) and float16, as in a store; `--rerank 64` adds those of whole
gradients, and some forty minutes. `--replay` adds the derivatives of that epoch's end by every
row's weight, and two hours. Where those are at hand, every score's rank correlation with them over
the rows is a figure too (`replay`), which has no noise of retraining. These two are kept beside the
bank as they are found: remove its folder `scores` when their code has changed.

`--smooth` takes another run, on which replay can be a yardstick: a tenth of the learning rate, and
a model that leaves rows out keeps the steps of the others, with weight 0 for those. At the file's
own rate the end of the epoch is no smooth function of the weights, and rows that are left out
change who shares a step with whom. Appends to results/lds.csv, with the run's name.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import json

import numpy as np
import numpy.typing as npt
import torch
from report import RESULTS, append, echo, machine
from tinyrun import SKILLS, TINY, Held, TinyRun
from world import World, target_kind

from dataflex.data.rows import Rows
from dataflex.launch.recorded import logits_of, row_sums
from gradstore import CheckpointFeatures, bm25_scores
from gradstore.evaluation import (
    Estimate,
    draw_subsets,
    lds,
    query_loss_difference,
    rank_correlation,
    without_top,
)
from gradstore.evaluation.bank import Bank, Progress
from gradstore.replay import Limits, MicroBatch, Step, TrainingRun, replay_influence
from gradstore.replay.run import Parameters
from gradstore.scoring.influence import subtask_influence
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.storage.replace import replace_file

STEPS, QUERIES_OF_SKILL, SUBSETS, CONTROLS = (50, 100, 150, 200), 4, 100, 10
SHARES = (0.01, 0.05)
#: Learning rate of the smooth run, as a part of the file's.
SMOOTH = 0.1
Floats = npt.NDArray[np.float64]

FISHER = InnerProduct("cosine", "fisher")
#: Feature of the training rows (as `World.features` names it), and the product.
GRADIENTS: dict[str, tuple[str, InnerProduct]] = {
    "adam_marginal, cosine (default)": ("adam_marginal", COSINE),
    "adam_marginal, normalize: target": ("adam_marginal", InnerProduct("target")),
    "adam_marginal, normalize: none": ("adam_marginal", InnerProduct("none")),
    "adam_marginal, subspace, cosine": ("adam_marginal", InnerProduct("cosine", "subspace")),
    "adam (published), cosine": ("adam", COSINE),
    "sgd, cosine": ("sgd", COSINE),
    "sgd, normalize: none": ("sgd", InnerProduct("none")),
    "sgd, fisher, cosine": ("sgd", FISHER),
    "sgd, fisher, normalize: target": ("sgd", InnerProduct("target", "fisher")),
    "sgd, fisher, normalize: none": ("sgd", InnerProduct("none", "fisher")),
    "sgd, kfac, cosine": ("kfac", COSINE),
    "sgd, kfac, normalize: target": ("kfac", InnerProduct("target")),
    "sgd, kfac, normalize: none": ("kfac", InnerProduct("none")),
    "sgd, ekfac, cosine": ("ekfac", COSINE),
    "sgd, ekfac, normalize: target": ("ekfac", InnerProduct("target")),
    "sgd, ekfac, normalize: none": ("ekfac", InnerProduct("none")),
}


def query_losses(run: TinyRun) -> Floats:
    """(q,) loss of each query: the first rows of every target set."""
    return np.concatenate([run.losses(rows, QUERIES_OF_SKILL) for rows in run.data.targets])


def retraining(run: TinyRun, smooth: bool) -> Callable[[npt.NDArray[np.int64], int], Floats]:
    """One epoch from the run's present state on some of its rows, in the run's order."""

    def retrain(rows: npt.NDArray[np.int64], seed: int) -> Floats:
        kept = np.isin(run.order, rows)
        order = run.order if smooth else run.order[kept]
        with run.rewound():
            for start in range(0, len(order), run.batch_size):
                step = order[start : start + run.batch_size]
                if smooth:
                    counts = step[kept[start : start + run.batch_size]]
                    run.take_step(run.data.train, counts, among=step)
                else:
                    run.take_step(run.data.train, step)
            return query_losses(run)

    return retrain


def gradient_scores(world: World, wanted: Callable[[str], bool]) -> dict[str, Floats]:
    """(q, n) scores at one step, by every feature and product that is wanted."""
    train_rows, sets = world.run.data.train, world.run.data.targets
    found = {}
    for name, (kind, product) in GRADIENTS.items():
        if not wanted(name):
            continue
        train, parts = world.features(kind, train_rows), []
        for rows in sets:
            whole = world.features(target_kind(kind), rows)
            assert whole.norm is not None
            part = Held(whole.features[:QUERIES_OF_SKILL], whole.norm[:QUERIES_OF_SKILL])
            sizes = [1] * QUERIES_OF_SKILL
            pair = CheckpointFeatures(train, (part,))
            parts.append(subtask_influence([pair], subtask_sizes=sizes, product=product).values)
        found[name] = np.concatenate(parts, axis=1).T.astype(np.float64)
    return found


def embedding_scores(world: World) -> dict[str, Floats]:
    """(q, n) cosines of the model's own states at one step."""
    found = {}
    for name, pooling in (("near (hidden states)", "mean"), ("rds_plus", "position")):
        train = world.embeddings(pooling, world.run.data.train)  # type: ignore[arg-type]
        queries = np.concatenate([
            world.embeddings(pooling, rows)[:QUERIES_OF_SKILL]  # type: ignore[arg-type]
            for rows in world.run.data.targets
        ])  # fmt: skip
        found[name] = (queries @ train.T).astype(np.float64)
    return found


def kept(path: Path, make: Callable[[], Floats]) -> Floats:
    """Scores that an earlier run left at a path; else made, and left there."""
    if not path.exists():
        held = io.BytesIO()
        np.save(held, make())
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, held.getvalue())
        echo(f"kept {path}")
    found: Floats = np.load(path)
    return found


def whole_scores(world: World, curvature_rows: int, place: Path) -> dict[str, Floats]:
    """(q, n) scores of `rerank` at one step, of every row and not of the best alone."""
    queries = [
        Rows("query", rows.dataset.select([i]))
        for rows in world.run.data.targets
        for i in range(QUERIES_OF_SKILL)
    ]

    def scores(by: str) -> Floats:
        return world.whole_products(world.run.data.train, queries, by, curvature_rows).T

    return {
        f"rerank by {by}, every row": kept(
            place / f"{by}-{curvature_rows}-step-{world.run.step}.npy", partial(scores, by)
        )
        for by in ("exact", "cg")
    }


def replayed_run(run: TinyRun) -> TrainingRun:
    """Describe the epoch on all rows, which the scores' steps are of, in float64."""
    # In train mode it would recompute activations with its own parameters.
    model, train = run.model.double().eval(), run.data.train

    def loss(parameters: Parameters, batch: dict[str, Any], weights: torch.Tensor) -> torch.Tensor:
        tokens = (batch["labels"][:, 1:] >= 0).sum()
        total: torch.Tensor = (token_sums(model, parameters, batch) * weights).sum() / tokens
        return total

    chunks = np.split(run.order, range(run.batch_size, len(train), run.batch_size))
    steps = [Step([MicroBatch(rows, run.collate([train.dataset[int(i)] for i in rows]))],
                  run.learning_rate) for rows in chunks]  # fmt: skip
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return TrainingRun(start, loss, steps, len(train), max_grad_norm=run.max_grad_norm)


def token_sums(
    model: torch.nn.Module, parameters: Parameters, batch: dict[str, Any]
) -> torch.Tensor:
    """(b,) sums of token losses."""
    tensors = {key: value for key, value in batch.items() if key != "labels"}
    return row_sums(logits_of(model, parameters, tensors), batch["labels"])


def replay_scores(run: TinyRun) -> Floats:
    """(q, n) scores by replay, from the run's present state."""
    described = replayed_run(run)
    batches = [run.collate([rows.dataset[i] for i in range(QUERIES_OF_SKILL)])
               for rows in run.data.targets]  # fmt: skip

    def losses(parameters: Parameters) -> torch.Tensor:
        parts = [token_sums(run.model, parameters, each) / (each["labels"][:, 1:] >= 0).sum(1)
                 for each in batches]  # fmt: skip
        return torch.cat(parts)

    passed = 0

    def tell(steps: int) -> None:
        nonlocal passed
        passed += steps
        if passed // 1000 > (passed - steps) // 1000:
            echo(f"replay: {passed} passes over a step")

    try:
        return -replay_influence(described, losses, limits=Limits(math.inf, sys.maxsize), tell=tell)
    finally:
        run.model.float()


def texts() -> tuple[list[str], list[str]]:
    """Questions and answers of the training rows, and of the queries."""

    def of(path: Path) -> list[str]:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]

    targets = [of(TINY / "data" / "targets" / f"{skill}.json") for skill in SKILLS]
    return of(TINY / "data" / "train.json"), [text for rows in targets
                                              for text in rows[:QUERIES_OF_SKILL]]  # fmt: skip


def all_scores(
    run: TinyRun, curvature_rows: int, place: Path, wanted: Callable[[str], bool]
) -> dict[str, Floats]:
    """(q, n) scores of every method: means over the steps, of what a step changes."""
    found: dict[str, Floats] = {}
    with run.rewound():
        for step in STEPS:
            world = World(run, run.train_to(step), {})
            made = gradient_scores(world, wanted) | embedding_scores(world)
            if curvature_rows:
                made |= whole_scores(world, curvature_rows, place)
            for name, scores in made.items():
                found[name] = found.get(name, 0) + scores / len(STEPS)
    run.step = 0
    found["bm25"] = bm25_scores(*texts()).astype(np.float64)
    shape = found["bm25"].shape
    found["random"] = np.random.default_rng(0).normal(size=shape)
    return {name: scores for name, scores in found.items() if wanted(name)}


def told(progress: Progress) -> None:
    """Print how far the bank is."""
    echo(str(progress))


def line_of(name: str, figure: str, found: Estimate) -> dict[str, Any]:
    """One line of the CSV."""
    echo(f"{figure:10}{name:36}{found}")
    assert found.low is not None  # there are several queries
    assert found.high is not None
    return {"score": name, "figure": figure, "mean": round(found.mean, 4),
            "low": round(found.low, 4), "high": round(found.high, 4)}  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, default=Path("runs/lds-bank"))
    parser.add_argument("--subsets", type=int, default=SUBSETS)
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of scores; the others are left out"
    )
    parser.add_argument("--qld", nargs="*", default=[], help="names of scores")
    parser.add_argument("--rerank", type=int, default=0, metavar="ROWS",
                        help="score by whole gradients too, cg's matrix of ROWS")  # fmt: skip
    parser.add_argument("--replay", action="store_true", help="score by replay too")
    parser.add_argument("--smooth", action="store_true", help="on the smooth run")
    parser.add_argument("--csv", type=Path, default=RESULTS / "lds.csv")
    options = parser.parse_args()
    if options.only and (missing := set(options.qld) - set(options.only)):
        parser.error(f"--qld asks for what --only leaves out: {', '.join(sorted(missing))}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lds-") as folder:
        run = TinyRun.start(1, Path(folder) / "run")
    if options.smooth:
        run.learning_rate *= SMOOTH
    run.train_to(0)
    n, retrain = len(run.data.train), retraining(run, options.smooth)
    queries = QUERIES_OF_SKILL * len(SKILLS)
    setting: dict[str, Any] = {"model": "examples/tiny", "epochs": 1, "seed": 1}
    place = options.bank
    if options.smooth:
        setting, place = setting | {"rate": SMOOTH, "left out": "weight 0"}, place / "smooth"
    bank = Bank(place, setting, n, queries)
    subsets = draw_subsets(n, options.subsets, 0.5)
    losses = bank.fill(subsets, retrain, budget=len(subsets), tell=told)
    only, scored = set(options.only), place / "scores"
    scores = all_scores(run, options.rerank, scored, lambda name: not only or name in only)
    if options.replay:
        scores["replay, one epoch"] = kept(scored / "replay.npy", lambda: replay_scores(run))
    replayed = scored / "replay.npy"
    exact = np.load(replayed) if replayed.exists() else None
    where = machine() | {"subsets": options.subsets, "run": "smooth" if options.smooth else ""}
    lines = [line_of(name, "lds", lds(each, losses, subsets)) for name, each in scores.items()]
    if exact is not None:
        lines += [line_of(name, "replay", rank_correlation(each, exact))
                  for name, each in scores.items()]  # fmt: skip
    append(options.csv, [where | line for line in lines])
    for share in SHARES if options.qld else ():
        random = ~draw_subsets(n, CONTROLS, share, seed=1)
        controls = bank.fill(random, retrain, budget=CONTROLS, tell=told)
        for name in options.qld:
            masks = without_top(scores[name], share)
            removed = bank.fill(masks, retrain, budget=len(masks), tell=told)
            found = query_loss_difference(np.diagonal(removed), controls)
            append(options.csv, [where | line_of(name, f"qld {share:.0%}", found)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
