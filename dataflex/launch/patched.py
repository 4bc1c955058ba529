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
from dataflex.launch.judged_scores import Scored
from dataflex.launch.plain_run import deciding, plain_arguments
from dataflex.models.passes import batches, fitting, own_labels
from dataflex.models.precision import autocast
from dataflex.models.trained import ShortTraining, trained_on
from dataflex.models.vocabulary import check_vocabulary
from dataflex.run.context import RunContext
from dataflex.run.log import progress
from gradstore.capture.limits import token_budget
from gradstore.capture.per_sample import batch_losses
from gradstore.capture.slots import trainable_slots, unwrap
from gradstore.errors import BadInput
from gradstore.evaluation import Estimate, tail_patch, tail_patch_log
from gradstore.evaluation.steps import StepBank
from gradstore.export.gradient_space import adapter_hash
from gradstore.scoring.selection import select_top

_log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Positions = npt.NDArray[np.int64]

#: The published figure, and the one that is above random rows.
PATCHED, PATCHED_LOG = "tail_patch", "tail_patch_log"


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
    scored: Scored,
    *,
    k: int,
    seed: int,
    bank: Path | None = None,
) -> dict[str, Estimate]:
    """Take one step on each of a query's k top rows, and on k random ones; compare their gains.

    Every step starts from the checkpoint: its adapter, its Adam moments, `learning_rate` and
    `max_grad_norm` of the configuration, one row. A row of several queries is stepped on once.

    Args:
        config: of the run.
        loaded: its rows, and its model at the checkpoint.
        checkpoint: whose moments the step has; None for new ones, at the model as configured.
        scored: scores of the rows, and which queries (target rows with a target token) they are of.
        k: rows of a query.
        seed: of the random rows.
        bank: folder that keeps what steps did, from which a later call goes on; None keeps nothing.

    Returns:
        `tail_patch` and `tail_patch_log`, by name.

    Raises:
        BadInput: fewer than k rows can be trained on; a learning rate of 0; moments that do not
            fit the model.
        DamagedData: an entry of the bank is not as it was written.
        StoreIOError: the bank can't be read or written.
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
    told = "the model as it is configured" if checkpoint is None else str(checkpoint)
    _log.info("tail_patch: steps from %s, learning rate %g", told, rate)
    kept = None if bank is None else StepBank(bank, _described(config, run, training))
    steps = _Steps(run, training, scored.queries, kept)
    rows = rows_to_patch(scored.values, trainable(run), k, seed)
    before = steps.before()
    after, random = np.split(steps.after(np.concatenate([rows.top, rows.random], axis=1)), [k], 1)
    return {
        PATCHED: tail_patch(np.exp(before), np.exp(after), seed=seed),
        PATCHED_LOG: tail_patch_log(before, after, random, seed=seed),
    }


def _described(config: RunConfig, run: RunContext, training: ShortTraining) -> dict[str, object]:
    """Return what decides a query's log-probability after a step, as plain JSON."""
    model, moments = unwrap(run.model), training.moments
    trained = [slot.name for slot in trainable_slots(model)]
    return {
        **deciding(plain_arguments(config), run.data, next(model.parameters()).device.type),
        "trained_parameters": adapter_hash(model, trained),  # the checkpoint's, or fresh ones
        "moments": None if moments is None else moments.sha256(),
        "step_learning_rate": training.learning_rate,
        "step_max_grad_norm": training.max_grad_norm,
        "autocast": run.autocast,
    }


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


class _Steps:
    """Steps on rows, each from the same model, and what they do to queries.

    Args:
        run: with its model.
        training: of one step.
        scored: (q,) positions of the queries among all of them.
        kept: where what steps did is kept, if anywhere.
    """

    def __init__(
        self, run: RunContext, training: ShortTraining, scored: Positions, kept: StepBank | None
    ) -> None:
        everyone = _queries(run)
        self._queries = [everyone[number] for number in scored]
        self._run, self._training, self._scored, self._kept = run, training, scored, kept

    def before(self) -> Floats:
        """Measure the queries' log-probabilities, (q,), before any step."""
        with autocast(self._run.model, self._run.autocast):
            return answer_log_probabilities(self._run, self._queries)

    def after(self, chosen: Positions) -> Floats:
        """Measure the log-probabilities (q, m) after a step on each of a query's rows (q, m)."""
        found = np.empty(chosen.shape)
        stepped = np.unique(chosen)
        with progress("tail_patch", len(stepped), told=True, unit="step") as advance:
            for row in stepped:
                asks = np.flatnonzero((chosen == row).any(axis=1))
                for query, value in zip(asks, self._after(int(row), asks), strict=True):
                    found[query, chosen[query] == row] = value
                advance(1)
        return found

    def _after(self, row: int, asks: Positions) -> list[float]:
        """Measure after a step on a row what the bank does not know of these queries."""
        names = [int(self._scored[query]) for query in asks]
        known = {} if self._kept is None else self._kept.known(row)
        if not known.keys() >= set(names):
            run, rows = self._run, np.array([row])
            with (
                autocast(run.model, run.autocast),
                trained_on(run, run.data.train, rows, self._training, [0]),
            ):
                gained = answer_log_probabilities(run, [self._queries[query] for query in asks])
            known = dict(zip(names, gained.tolist(), strict=True))
            if self._kept is not None:
                self._kept.keep(row, known)
        return [known[name] for name in names]


def _queries(run: RunContext) -> list[tuple[Rows, int]]:
    """List the target rows that have a target token, all sets in a row."""
    return [
        (rows, int(row))
        for rows in run.data.targets
        for row in np.flatnonzero(rows.target_tokens > 0)
    ]
