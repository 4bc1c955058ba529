"""`gradstore eval --metric tail_patch`: one more step on a row, and what the answers gain by it.

Source: tail-patch score of TrackStar, 2410.17413. Letters: n training rows, q queries, k rows of a
query.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from dataflex.bridge.running import ExportInputs
from dataflex.checkpoints.weights import check_moments, checkpoint_moments
from dataflex.config.keys import RunConfig
from dataflex.data.rows import Rows
from dataflex.launch.dry_run import DRY_RUN, context_of
from dataflex.models.passes import batches, fitting, own_labels
from dataflex.models.precision import autocast
from dataflex.models.trained import ShortTraining, trained_on
from dataflex.models.vocabulary import check_vocabulary
from dataflex.run.context import RunContext
from dataflex.run.log import progress
from gradstore.capture.limits import token_budget
from gradstore.capture.per_sample import batch_losses
from gradstore.errors import BadInput
from gradstore.evaluation import Estimate, tail_patch_log
from gradstore.scoring.selection import select_top

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Patched:
    """Rows that are stepped on, for each query.

    Attributes:
        top: (q, k) the rows that score highest, best first.
        random: (q, k) distinct rows, drawn for each query anew.
    """

    top: Positions
    random: Positions


def checkpoint_of(folders: Sequence[Path]) -> Path | None:
    """Return the checkpoint that steps start from, the newest; None where there is none.

    Raises:
        BadInput: it has no Adam moments, without which its next step is not the run's.
        DamagedData: they are not those that were saved.
    """
    if not folders:
        return None
    check_moments(folders[-1])
    return folders[-1]


def patch(
    config: RunConfig,
    loaded: ExportInputs,
    checkpoint: Path | None,
    scores: Floats,
    scored: Positions,
    *,
    k: int,
    seed: int,
) -> Estimate:
    """Take one step on each of a query's k top rows, and on k random ones; compare their gains.

    Every step starts from the checkpoint: its adapter, its Adam moments, `learning_rate` and
    `max_grad_norm` of the configuration, one row. A row of several queries is stepped on once.

    Args:
        config: of the run.
        loaded: its rows, and its model at the checkpoint.
        checkpoint: whose moments the step has; None for new ones, at the model as configured.
        scores: (q, n).
        scored: (q,) positions among the queries (target rows with a target token).
        k: rows of a query.
        seed: of the random rows.

    Raises:
        BadInput: fewer than k rows can be trained on; a learning rate of 0; moments that do not
            fit the model.
    """
    run = replace(
        context_of(config, loaded, DRY_RUN),
        collate=own_labels(loaded.collate),
        shows_progress=False,
    )
    check_vocabulary(run.model, run.data)
    rate = float(loaded.training_args.learning_rate)
    if rate <= 0:
        raise BadInput(f"learning_rate is {rate:g}, a step of which changes nothing; set it.")
    training = ShortTraining(
        1, rate, 1,
        moments=None if checkpoint is None else checkpoint_moments(checkpoint, run.model),
        max_grad_norm=max(float(loaded.training_args.max_grad_norm or 0.0), 0.0),
    )  # fmt: skip
    rows = rows_to_patch(scores, trainable(run), k, seed)
    queries = [_queries(run)[number] for number in scored]
    told = "the model as it is configured" if checkpoint is None else str(checkpoint)
    _log.info("tail_patch: steps from %s, learning rate %g", told, rate)
    with autocast(run.model, run.autocast):
        before = answer_log_probabilities(run, queries)
    after, random = _after_steps(run, rows, queries, training)
    return tail_patch_log(before, after, random, seed=seed)


def rows_to_patch(scores: Floats, usable: npt.NDArray[np.bool_], k: int, seed: int) -> Patched:
    """Choose each query's k rows of highest score, and k at random, among usable rows (n,)."""
    top = np.stack([select_top(row, k, usable=usable) for row in scores])
    pool, rng = np.flatnonzero(usable), np.random.default_rng(seed)
    return Patched(top, np.stack([rng.choice(pool, k, replace=False) for _ in scores]))


def trainable(run: RunContext) -> npt.NDArray[np.bool_]:
    """Mark the training rows (n,) that have a target token and fit into the model."""
    train = run.data.train
    found = np.zeros(len(train), dtype=np.bool_)
    found[fitting(run, train, np.flatnonzero(train.target_tokens > 0))] = True
    return found


def answer_log_probabilities(run: RunContext, queries: Sequence[tuple[Rows, int]]) -> Floats:
    """Compute log p of each query's answer, (m,): minus the sum of its token losses."""
    found = np.empty(len(queries))
    budget = 2 * token_budget(run.model)
    with torch.no_grad():
        for rows in run.data.targets:
            mine = np.array([i for i, (each, _) in enumerate(queries) if each is rows], np.int64)
            at = np.array([queries[i][1] for i in mine], np.int64)
            if not len(at):
                continue
            own = {int(row): number for number, row in zip(mine, at, strict=True)}
            for where, batch in batches(run, rows, at, budget, lambda done: None):
                stats = batch_losses(run.model, batch)
                sums = stats.loss.double() * stats.target_tokens
                found[[own[int(row)] for row in where]] = -sums.cpu().numpy()
    return found


def _after_steps(
    run: RunContext, rows: Patched, queries: list[tuple[Rows, int]], training: ShortTraining
) -> tuple[Floats, Floats]:
    """Measure (q, k) log-probabilities after a step on each top row, and on each random one."""
    chosen = np.concatenate([rows.top, rows.random], axis=1)
    found = np.empty(chosen.shape)
    stepped = np.unique(chosen)
    with progress("tail_patch", len(stepped), told=True, unit="step") as advance:
        for row in stepped:
            asks = np.flatnonzero((chosen == row).any(axis=1))
            with (
                autocast(run.model, run.autocast),
                trained_on(run, run.data.train, np.array([row]), training, [0]),
            ):
                gained = answer_log_probabilities(run, [queries[query] for query in asks])
            for query, value in zip(asks, gained, strict=True):
                found[query, chosen[query] == row] = value
            advance(1)
    k = rows.top.shape[1]
    return found[:, :k], found[:, k:]


def _queries(run: RunContext) -> list[tuple[Rows, int]]:
    """List the target rows that have a target token, all sets in a row."""
    return [
        (rows, int(row))
        for rows in run.data.targets
        for row in np.flatnonzero(rows.target_tokens > 0)
    ]
