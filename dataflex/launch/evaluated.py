"""`dataflex-cli gradstore eval`: how far scores can be trusted, measured by retraining.

Letters: n training rows, q queries, s subsets, c random controls.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dataflex.bridge import running
from dataflex.bridge.quiet import on_stderr
from dataflex.checkpoints.folders import find_checkpoints
from dataflex.config.keys import RunConfig
from dataflex.data.rows import RunData, check_rows
from dataflex.launch.judged_scores import Component, Scored, component_of, influence, read_scores
from dataflex.launch.known_rows import (
    EXACT,
    PLANTED,
    against_exact,
    against_planted,
    planted_rows,
    read_truth,
)
from dataflex.launch.patched import PATCHED, checkpoint_of, patch
from dataflex.launch.preflight import OF_LORA, check_gradients
from dataflex.launch.retraining import IN_RUNS_ORDER, ORDERS, Retrainer, queries_of
from gradstore.cli.options import print_json, print_table
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.evaluation import (
    Estimate,
    Resamples,
    draw_subsets,
    lds,
    query_loss_difference,
    resampled_lds,
    resampled_qld,
    without_top,
)
from gradstore.evaluation.bank import Bank, Progress
from gradstore.evaluation.retraining import LEAST_SUBSETS
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.selection import rows_for_fraction

_log = logging.getLogger(__name__)

RETRAINED = ("lds", "qld")
METRICS = (*RETRAINED, PATCHED, *EXACT, *PLANTED)

#: What an interval is over: queries, or queries and retrained models.
INTERVALS = ("queries", "both")

Losses = npt.NDArray[np.float64]
Masks = npt.NDArray[np.bool_]

#: In the place of a store that nothing is asked of.
NO_STORE = Path("-")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One call of the command.

    Attributes:
        store: whose influence is judged, unless `scores` names others: then it is not opened, and
            may be `NO_STORE`.
        bank: folder of the losses of retrained models, of lds and qld; of what steps did, of
            tail_patch, which needs none.
        budget: retrainings that may be made now.
        metric: one of `METRICS`.
        subsets: s, of lds.
        fraction: of the rows in a subset, of lds.
        share: of the rows that is removed, of qld (default .01), or selected, of overlap (.05).
        controls: c, of qld.
        seeds: trainings of each subset, of lds and qld: with the configuration's seed, the next one
            and so on; losses are their means.
        order: of the rows of a retraining, of lds and qld; one of `ORDERS`.
        interval: what it is over, one of `INTERVALS`; `both` of lds and qld.
        seed: of subsets, controls and random rows; the training's is the configuration's.
        checkpoints: of the store to combine, as text.
        normalize, preconditioner, damping: of the store's influence, as of `InnerProduct`; None
            for what the configured component selects by.
        scores: file of other scores.
        truth: table of `gradstore replay`, of spearman, ndcg and overlap.
        planted: column of the files that says which rows are planted, of recall, mrr and auprc.
        k: rows at the top, of recall (default 50), ndcg and tail_patch (20).
        as_json: print JSON.
    """

    store: Path
    bank: Path | None = None
    budget: int = 0
    metric: str = "lds"
    subsets: int = 100
    fraction: float = 0.5
    share: float | None = None
    controls: int = 10
    seeds: int = 1
    order: str = IN_RUNS_ORDER
    interval: str = "queries"
    seed: int = 0
    checkpoints: str = "last"
    normalize: str | None = None
    preconditioner: str | None = None
    damping: float | None = None
    scores: Path | None = None
    truth: Path | None = None
    planted: str = ""
    k: int | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        """Refuse, before anything is loaded, what could only fail later."""
        expect(self.metric in METRICS, "--metric", self.metric, " or ".join(METRICS))
        needs = {"--bank FOLDER": RETRAINED, "--truth replay.parquet": EXACT,
                 "--planted COLUMN": PLANTED}  # fmt: skip
        given = (self.bank, self.truth, self.planted)
        for (option, metrics), value in zip(needs.items(), given, strict=True):
            if self.metric in metrics and not value:
                raise BadInput(f"--metric {self.metric} needs {option}.")
        if self.scores is None and self.store == NO_STORE:
            raise BadInput("STORE is -, so there is no influence to judge: name a store, or scores "
                           "with --scores.")  # fmt: skip
        expect(self.order in ORDERS, "--order", self.order, " or ".join(ORDERS))
        expect(self.interval in INTERVALS, "--interval", self.interval, " or ".join(INTERVALS))
        if self.interval == "both" and self.metric not in RETRAINED:
            raise BadInput(f"--interval both is of --metric {' and '.join(RETRAINED)}; "
                           f"{self.metric} retrains no model.")  # fmt: skip
        expect_whole(self.at_top, "--k")
        expect_whole(self.seeds, "--seeds")
        expect_whole(self.budget, "--budget", 0)
        expect_whole(self.subsets, "--subsets", LEAST_SUBSETS)
        expect_whole(self.controls, "--controls")
        expect_whole(self.seed, "--seed", 0)
        for fraction in (self.fraction, self.taken):
            rows_for_fraction(fraction, 1)
        self.product(COSINE)
        if self.scores is not None and self.scores.suffix not in (".parquet", ".npy"):
            raise BadInput(
                f"scores is {str(self.scores)!r}; give a .parquet file with the columns row and "
                "score, or a .npy file of (queries, training rows)."
            )
        if self.scores is not None and self.product(COSINE) != COSINE:
            raise BadInput("--normalize, --preconditioner and --damping are of the store's "
                           "influence; --scores are judged as they are.")  # fmt: skip

    @property
    def at_top(self) -> int:
        """The rows at the top that the metric looks at."""
        default = 50 if self.metric == "recall" else 20
        return default if self.k is None else self.k

    @property
    def taken(self) -> float:
        """The share of the rows that the metric takes."""
        default = 0.05 if self.metric == "overlap" else 0.01
        return default if self.share is None else self.share

    def product(self, own: InnerProduct) -> InnerProduct:
        """Return the product asked for; where nothing is, that of the component, `own`.

        Raises:
            BadInput: an unknown name, or damping out of range.
        """
        normalize = own.normalize if self.normalize is None else self.normalize
        preconditioner = own.preconditioner if self.preconditioner is None else self.preconditioner
        damping = own.damping if self.damping is None else self.damping
        return InnerProduct(normalize, preconditioner, damping)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Judged:
    """An answer of the command.

    Attributes:
        figures: by name, that of the metric asked for among them.
        retrainings: distinct retrained models that it took.
        made: of them, those that were trained now.
    """

    figures: Mapping[str, Estimate]
    retrainings: int = 0
    made: int = 0


def evaluate(config: RunConfig, asked: Evaluation) -> None:
    """Retrain what the bank lacks, or take steps, as the metric needs; print it with its interval.

    Raises:
        BadInput: as `check_gradients`; more retrainings are missing than the budget allows; scores
            that do not fit the rows.
        ProvenanceMismatch: store or bank are of other rows, or of another training.
        DamagedData: of store or bank.
        StoreIOError: of store or bank.
    """
    check_gradients(config, "gradstore eval", lora_alone=OF_LORA)
    with on_stderr(), contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        component = component_of(config) if asked.scores is None else Component()
        for line in component.left_out:
            _log.warning("%s", line)
        product = asked.product(component.product)
        found = _judged(config, asked, product)
    name = str(asked.scores or f"influence of {asked.store}{_told(product)}")
    if asked.as_json:
        of_product = {} if asked.scores else {"product": asdict(product)}
        figures = {key: one.as_json() for key, one in found.figures.items()}
        print_json({"scores": name, **of_product, "metric": asked.metric,
                    "retrainings": found.retrainings, "retrained_now": found.made,
                    **figures.pop(asked.metric), **figures})  # fmt: skip
        return
    print_table(
        ("scores", "metric", "mean and 95% interval", "queries", "retrainings", "made now"),
        [(name, key, _interval(one), len(one.values), found.retrainings, found.made)
         for key, one in found.figures.items()],
    )  # fmt: skip


def _interval(found: Estimate) -> str:
    """Write a figure: three digits, or as many as a small one needs."""
    digits = ".3f" if abs(found.mean) >= 0.01 or not found.mean else ".2e"
    if found.low is None:
        return f"{found.mean:{digits}}"
    return f"{found.mean:{digits}} [{found.low:{digits}}, {found.high:{digits}}]"


def _told(product: InnerProduct) -> str:
    """Name what is not the default of a product."""
    default = asdict(COSINE)
    parts = [f"{key} {value}" for key, value in asdict(product).items() if value != default[key]]
    return f" ({', '.join(parts)})" if parts else ""


def _judged(config: RunConfig, asked: Evaluation, product: InnerProduct) -> Judged:
    """Load rows and scores, then measure."""

    def check(data: RunData, *_: object) -> None:
        check_rows(data, needs_targets=True, subtask_sizes=None)

    metric = asked.metric
    checkpoint = checkpoint_of(find_checkpoints(config)) if metric == PATCHED else None
    loaded = running.load_run(config, checkpoint, check)
    data, training_args = loaded.data, loaded.training_args
    queries = queries_of(data)
    if asked.scores is None:
        scored = influence(asked.store, asked.checkpoints, config.store_run, data, queries, product)
    else:
        scored = read_scores(asked.scores, len(data.train), int(queries.sum()))
    if metric == PATCHED:
        return Judged(
            patch(config, loaded, checkpoint, scored, k=asked.at_top, seed=asked.seed,
                  bank=asked.bank)
        )  # fmt: skip
    del loaded  # each retraining loads a model of its own
    if metric in EXACT:
        assert asked.truth is not None
        truth = read_truth(asked.truth, data, queries)
        return Judged({metric: against_exact(
            metric, truth, scored.values, scored.queries, k=asked.at_top, share=asked.taken
        )})  # fmt: skip
    if metric in PLANTED:
        planted = planted_rows(data, asked.planted, queries)[scored.queries]
        k = asked.at_top if asked.k is not None else min(asked.at_top, len(data.train))
        return Judged({metric: against_planted(metric, planted, scored.values, k=k)})
    assert asked.bank is not None
    retrainer = Retrainer(config, data, training_args.device.type, asked.order)
    bank = Bank(asked.bank, retrainer.configuration, len(data.train), int(queries.sum()))
    return _measured(asked, bank, retrainer, int(training_args.seed), scored)


def _measured(
    asked: Evaluation, bank: Bank, retrainer: Retrainer, seed: int, scored: Scored
) -> Judged:
    """Fill the bank for the metric and compute it."""
    rows, made = scored.values.shape[1], 0
    if asked.metric == "lds":
        masks = draw_subsets(rows, asked.subsets, asked.fraction, seed=asked.seed)
    else:
        # Random scores lose their top just as these do: as many rows, whatever is rounded.
        noise = np.random.default_rng(asked.seed).random((asked.controls, rows))
        masks = np.concatenate([
            without_top(each, asked.taken) for each in (scored.values, noise)
        ])  # fmt: skip

    def tell(progress: Progress) -> None:
        nonlocal made
        made += 1
        _log.info("%s", progress)

    losses = bank.fill(
        masks,
        retrainer,
        budget=asked.budget,
        seed=range(seed, seed + asked.seeds),
        tell=tell,
        forecast=lambda mask: retrainer.seconds(np.flatnonzero(mask), seed),
    )[:, scored.queries]
    found = _figure(asked, losses, masks, scored)
    distinct = len(np.unique(masks, axis=0)) * asked.seeds
    return Judged({asked.metric: found}, distinct, made)


def _figure(asked: Evaluation, losses: Losses, masks: Masks, scored: Scored) -> Estimate:
    """Compute LDS or QLD of (m, q) losses after training on each of (m, n) masks."""
    queries = len(scored.queries)
    if asked.metric == "lds":
        if asked.interval == "queries":
            return lds(scored.values, losses, masks)
        drawn = Resamples.draw(queries, len(masks))
        return resampled_lds(scored.values, losses, masks, drawn).estimate()
    own, controls = np.split(losses, [queries])
    removed = np.diagonal(own).copy()
    if asked.interval == "queries":
        return query_loss_difference(removed, controls)
    return resampled_qld(removed, controls, Resamples.draw(queries, len(controls))).estimate()
