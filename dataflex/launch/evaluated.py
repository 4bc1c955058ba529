"""`dataflex-cli gradstore eval`: how far scores can be trusted, measured by retraining.

Letters: n training rows, q queries, s subsets, c random controls.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dataflex.bridge import running
from dataflex.bridge.quiet import on_stderr
from dataflex.checkpoints.folders import find_checkpoints
from dataflex.config.keys import RunConfig
from dataflex.data.rows import RunData, check_rows
from dataflex.launch.known_rows import (
    EXACT,
    PLANTED,
    against_exact,
    against_planted,
    planted_rows,
    read_truth,
)
from dataflex.launch.patched import checkpoint_of, patch
from dataflex.launch.preflight import OF_LORA, check_gradients
from dataflex.launch.retraining import (
    IN_RUNS_ORDER,
    ORDERS,
    Floats,
    Retrainer,
    queries_of,
    store_differs,
)
from dataflex.pipelines.pipeline import build_strategy
from gradstore.cli.options import print_json, print_table
from gradstore.errors import BadInput, expect, expect_whole
from gradstore.evaluation import Estimate, draw_subsets, lds, query_loss_difference, without_top
from gradstore.evaluation.bank import Bank
from gradstore.evaluation.estimates import score_matrix
from gradstore.evaluation.retraining import LEAST_SUBSETS
from gradstore.format.layout import RowStatus
from gradstore.scoring.best_rows import usable_targets
from gradstore.scoring.combine import CHUNK_ROWS, combine
from gradstore.scoring.pairing import checkpoint_features, parse_which
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.scan import as_device
from gradstore.scoring.selection import rows_for_fraction
from gradstore.store.reader import open_store

if TYPE_CHECKING:
    import pyarrow as pa

_log = logging.getLogger(__name__)

RETRAINED = ("lds", "qld")
PATCHED = "tail_patch"
METRICS = (*RETRAINED, PATCHED, *EXACT, *PLANTED)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One call of the command.

    Attributes:
        store: whose influence is judged, unless `scores` names others.
        bank: folder of the losses of retrained models, of lds and qld.
        budget: retrainings that may be made now.
        metric: one of `METRICS`.
        subsets: s, of lds.
        fraction: of the rows in a subset, of lds.
        share: of the rows that is removed, of qld (default .01), or selected, of overlap (.05).
        controls: c, of qld.
        seeds: trainings of each subset, of lds and qld: with the configuration's seed, the next one
            and so on; losses are their means.
        order: of the rows of a retraining, of lds and qld; one of `ORDERS`.
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
        expect(self.order in ORDERS, "--order", self.order, " or ".join(ORDERS))
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
        product = asked.product(component_product(config))
        found, retrainings = _judged(config, asked, product)
    name = str(asked.scores or f"influence of {asked.store}{_told(product)}")
    if asked.as_json:
        judged = {} if asked.scores else {"product": asdict(product)}
        print_json({"scores": name, **judged, "metric": asked.metric, "retrainings": retrainings,
                    **found.as_json()})  # fmt: skip
        return
    interval = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    print_table(
        ("scores", "metric", "mean and 95% interval", "queries", "retrainings"),
        [(name, asked.metric, f"{found.mean:.3f}{interval}", len(found.values), retrainings)],
    )


def component_product(config: RunConfig) -> InnerProduct:
    """Return the product that the configured component selects by; cosines where it is none's."""
    ours = config.dataflex
    if ours.train_type == "static":
        return COSINE
    component = config.component(ours.train_type, ours.component_name, ours.component_params)
    found = getattr(build_strategy(component), "product", COSINE)
    return found if isinstance(found, InnerProduct) else COSINE


def _told(product: InnerProduct) -> str:
    """Name what is not the default of a product."""
    default = asdict(COSINE)
    parts = [f"{key} {value}" for key, value in asdict(product).items() if value != default[key]]
    return f" ({', '.join(parts)})" if parts else ""


def _judged(config: RunConfig, asked: Evaluation, product: InnerProduct) -> tuple[Estimate, int]:
    """Load rows and scores, then measure; return the estimate and the retrained models it took."""

    def check(data: RunData, *_: object) -> None:
        check_rows(data, needs_targets=True, subtask_sizes=None)

    patched = asked.metric == PATCHED
    checkpoint = checkpoint_of(find_checkpoints(config)) if patched else None
    loaded = running.load_run(config, checkpoint, check)
    data, seed = loaded.data, int(loaded.training_args.seed)
    device = loaded.training_args.device.type
    queries = queries_of(data)
    if asked.scores is None:
        judged = _influence(asked, config.store_run, data, queries, product)
    else:
        judged = _from_file(asked.scores, len(data.train), int(queries.sum()))
    scores, scored = judged
    if patched:
        return patch(config, loaded, checkpoint, scores, scored, k=asked.at_top, seed=asked.seed), 0
    del loaded  # each retraining loads a model of its own
    if asked.truth is not None and asked.metric in EXACT:
        truth = read_truth(asked.truth, data, queries)
        return against_exact(asked.metric, truth, scores, scored, k=asked.at_top, share=asked.taken), 0
    if asked.metric in PLANTED:
        planted = planted_rows(data, asked.planted, queries)[scored]
        return against_planted(asked.metric, planted, scores, k=asked.at_top), 0
    assert asked.bank is not None
    retrainer = Retrainer(config, data, device, asked.order)
    bank = Bank(asked.bank, retrainer.configuration, len(data.train), int(queries.sum()))
    found, masks = _measured(asked, bank, retrainer, seed, judged)
    return found, len(masks)


def _measured(
    asked: Evaluation,
    bank: Bank,
    retrainer: Retrainer,
    seed: int,
    judged: tuple[Floats, npt.NDArray[np.int64]],
) -> tuple[Estimate, Mask]:
    """Fill the bank for the metric and compute it; return it and the subsets it took."""
    scores, scored = judged
    rows = scores.shape[1]
    if asked.metric == "lds":
        masks = draw_subsets(rows, asked.subsets, asked.fraction, seed=asked.seed)
    else:
        # Random scores lose their top just as these do: as many rows, whatever is rounded.
        noise = np.random.default_rng(asked.seed).random((asked.controls, rows))
        masks = np.concatenate([without_top(scores, asked.taken), without_top(noise, asked.taken)])
    losses = bank.fill(
        masks,
        retrainer,
        budget=asked.budget,
        seed=range(seed, seed + asked.seeds),
        tell=lambda progress: _log.info("%s", progress),
        forecast=lambda mask: retrainer.seconds(np.flatnonzero(mask), seed),
    )[:, scored]
    if asked.metric == "lds":
        return lds(scores, losses, masks), masks
    return query_loss_difference(np.diagonal(losses).copy(), losses[len(scored) :]), masks


def _influence(
    asked: Evaluation, run: str, data: RunData, queries: Mask, product: InnerProduct
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Score each training row for each target row that the store can use.

    Returns:
        (q', n) scores, 0 for a training row without a feature (no step moves it); (q',) positions
        among the queries.
    """
    sets = [rows.name for rows in data.targets]
    pairs = checkpoint_features(
        open_store(asked.store), parse_which(asked.checkpoints), run=run, sets=sets
    )
    held = (pairs[-1].train, *pairs[-1].targets)
    for rows, generation in zip((data.train, *data.targets), held, strict=True):
        store_differs(asked.store, rows, generation.row_hash)  # type: ignore[attr-defined]
    starts = np.cumsum([0, *(len(rows) for rows in data.targets)])
    numbers = np.cumsum(queries) - 1  # target row -> its number among the queries
    wanted = [each for each in usable_targets(pairs) if queries[starts[each.target] + each.start]]
    if not wanted:
        raise BadInput(f'store "{asked.store}" has no usable target row; build it again')
    found = np.zeros((len(wanted), len(data.train)))

    def keep(start: int, stop: int, products: npt.NDArray[np.float32]) -> None:
        found[:, start:stop] = products.T

    codes = combine(pairs, wanted, keep, as_device("cpu"), CHUNK_ROWS, product)
    found[:, codes != RowStatus.OK] = 0
    return found, np.array([numbers[starts[each.target] + each.start] for each in wanted])


def _from_file(path: Path, rows: int, queries: int) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Read (q, n) scores: a matrix, or one score for each row that holds for every query."""
    import pyarrow.parquet as pq

    matrix = path.suffix == ".npy"
    try:
        held = np.load(path, allow_pickle=False) if matrix else pq.read_table(path)
    except (OSError, ValueError) as error:
        raise BadInput(f'"{path}" cannot be read as scores: {error}') from error
    values = held if matrix else _one_for_each(path, held, rows)
    scores = score_matrix(values, str(path)) if matrix else np.tile(values, (queries, 1))
    if scores.shape != (queries, rows):
        raise BadInput(
            f'"{path}" has shape {scores.shape}; give ({queries}, {rows}): a line for each '
            "target row with a target token, a column for each training row"
        )
    return scores, np.arange(queries)


def _one_for_each(path: Path, table: pa.Table, rows: int) -> Floats:
    """Read (n,) scores in the order of the rows; one that is null is 0, as in `_influence`."""
    for column in ("row", "score"):
        if column not in table.column_names:
            raise BadInput(f'"{path}" has no column {column!r}; give row and score')
    at = table["row"].to_numpy()
    if not np.array_equal(np.sort(at), np.arange(rows)):
        raise BadInput(f'"{path}" does not score each of the {rows:,} training rows once')
    given = table["score"].to_pylist()
    values = np.zeros(rows)
    values[at] = [0.0 if each is None else each for each in given]
    return values
