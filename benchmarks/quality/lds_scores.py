"""Scores that lds.py judges: of stored features, embeddings, whole gradients, replay and words.

Letters: n training rows, q queries.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from report import echo
from tinyrun import SKILLS, TINY, Held, TinyRun
from world import World, target_kind

from dataflex.data.rows import Rows
from dataflex.launch.recorded import logits_of, row_sums
from gradstore import CheckpointFeatures, bm25_scores
from gradstore.replay import Limits, MicroBatch, Step, TrainingRun, replay_influence
from gradstore.replay.run import Parameters
from gradstore.scoring.influence import subtask_influence
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.storage.replace import replace_file

#: Steps of the epoch whose scores are averaged, and queries of each skill.
STEPS, QUERIES_OF_SKILL = (50, 100, 150, 200), 4
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


def texts(chosen: npt.NDArray[np.int64]) -> tuple[list[str], list[str]]:
    """Questions and answers of the chosen training rows, and of the queries."""

    def of(path: Path) -> list[str]:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]

    targets = [of(TINY / "data" / "targets" / f"{skill}.json") for skill in SKILLS]
    every = of(TINY / "data" / "train.json")
    asked = [text for rows in targets for text in rows[:QUERIES_OF_SKILL]]
    return [every[row] for row in chosen], asked


def all_scores(
    run: TinyRun,
    chosen: npt.NDArray[np.int64],
    curvature_rows: int,
    place: Path,
    wanted: Callable[[str], bool],
) -> dict[str, Floats]:
    """(q, n) scores of every method: means over the steps, of what a step changes."""
    found: dict[str, Floats] = {}
    began = run.step
    steps = (began,) if began else STEPS
    with run.rewound():
        for step in steps:
            world = World(run, run.train_to(step), {})
            made = gradient_scores(world, wanted) | embedding_scores(world)
            if curvature_rows:
                made |= whole_scores(world, curvature_rows, place)
            for name, scores in made.items():
                found[name] = found.get(name, 0) + scores / len(steps)
    run.step = began
    found["bm25"] = bm25_scores(*texts(chosen)).astype(np.float64)
    shape = found["bm25"].shape
    found["random"] = np.random.default_rng(0).normal(size=shape)
    return {name: scores for name, scores in found.items() if wanted(name)}
