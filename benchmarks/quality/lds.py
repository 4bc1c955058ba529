r"""How far scores can be trusted: LDS and QLD on the embedded model, against retrained models.

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
change who shares a step with whom. `--fraction 0.95` leaves out a twentieth of the rows in place
of half, a change of weights that is small enough for a derivative.

`--steps`, `--rate`, `--rows`, `--clip`: from another state of training (`lds_states.py`), with the
scores of that state alone; `--pool 400` retrains on the next 400 rows, so that a state with 30
subsets takes some five minutes:

    for state in "--steps 10" "--steps 100" "--steps 400" "--steps 100 --rate 4" \
                 "--steps 100 --rows 32" "--steps 100 --clip 0.1"; do
        uv run python benchmarks/quality/lds.py $state --pool 400 --subsets 30
    done

Appends to results/lds.csv, with run, state and fraction: mean over the queries, `values` of each,
and the 95% interval, for which skills (queries of one are alike) and retrained models (which all
queries share) are drawn anew; so too the paired difference to the default's and to the whole
gradients' figure, where these are measured along.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import torch
from lds_scores import QUERIES_OF_SKILL, Floats, all_scores, kept, replay_scores
from lds_states import add_options, beginning
from report import RESULTS, append, echo, machine
from tinyrun import SKILLS, TinyRun

from gradstore.evaluation import (
    Resampled,
    Resamples,
    draw_subsets,
    rank_correlation,
    resampled,
    resampled_lds,
    resampled_qld,
    without_top,
)
from gradstore.evaluation.bank import Bank, Progress

SUBSETS, CONTROLS = 100, 10
SHARES = (0.01, 0.05)
#: Skill of each query.
GROUPS = np.repeat(np.arange(len(SKILLS)), QUERIES_OF_SKILL)
#: What intervals of this script's lines are over; lines from before have those over queries alone.
INTERVAL = "skills and models"
#: What a line tells its difference to, by the name of the columns.
BESIDE = {"default": "adam_marginal, cosine (default)", "exact": "rerank by exact, every row"}


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


def told(progress: Progress) -> None:
    """Print how far the bank is."""
    echo(str(progress))


def line_of(
    name: str, figure: str, found: Resampled, others: Mapping[str, Resampled]
) -> dict[str, Any]:
    """One line of the CSV: a figure, and its differences to those of `BESIDE` among the others."""

    def cells(prefix: str, what: Resampled | None) -> dict[str, Any]:
        known = None if what is None else what.estimate()
        return {
            prefix + key: "" if known is None else round(getattr(known, key), 4)
            for key in ("mean", "low", "high")
        }

    echo(f"{figure:10}{name:36}{found.estimate()}")
    line: dict[str, Any] = {"score": name, "figure": figure} | cells("", found)
    for short, other in BESIDE.items():
        there = other in others and other != name
        line |= cells(f"minus_{short}_", found - others[other] if there else None)
    values = " ".join(f"{value:.4f}" for value in found.values)
    return line | {"interval": INTERVAL, "values": values}


def lines_of(figure: str, found: Mapping[str, Resampled]) -> list[dict[str, Any]]:
    """One line for every score."""
    return [line_of(name, figure, each, found) for name, each in found.items()]


def read_options() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, default=Path("runs/lds-bank"))
    parser.add_argument("--subsets", type=int, default=SUBSETS)
    parser.add_argument("--fraction", type=float, default=0.5, help="of the rows in a subset")
    parser.add_argument(
        "--only", nargs="*", default=[], help="names of scores; the others are left out"
    )
    parser.add_argument("--qld", nargs="*", default=[], help="names of scores")
    parser.add_argument("--rerank", type=int, default=0, metavar="ROWS",
                        help="score by whole gradients too, cg's matrix of ROWS")  # fmt: skip
    parser.add_argument("--replay", action="store_true", help="score by replay too")
    add_options(parser)
    parser.add_argument("--csv", type=Path, default=RESULTS / "lds.csv")
    options = parser.parse_args()
    if options.only and (missing := set(options.qld) - set(options.only)):
        parser.error(f"--qld asks for what --only leaves out: {', '.join(sorted(missing))}")
    return parser, options


def main() -> int:
    """Run the benchmark."""
    parser, options = read_options()
    begins = beginning(parser, options)
    torch.set_num_threads(1)
    run, chosen = begins.start()
    n, retrain = len(chosen), retraining(run, options.smooth)
    place, queries = begins.folder(options.bank), len(GROUPS)
    bank = Bank(place, begins.setting, n, queries)
    subsets = draw_subsets(n, options.subsets, options.fraction)
    losses = bank.fill(subsets, retrain, budget=len(subsets), tell=told)
    only, scored = set(options.only), place / "scores"
    scores = all_scores(
        run, chosen, options.rerank, scored, lambda name: not only or name in only
    )  # fmt: skip
    replayed = scored / "replay.npy"
    if options.replay:
        scores["replay, one epoch"] = kept(replayed, lambda: replay_scores(run))
    exact = np.load(replayed) if replayed.exists() else None
    where = machine() | {"subsets": options.subsets, "run": "smooth" if options.smooth else "",
                         "state": begins.state, "fraction": options.fraction}  # fmt: skip
    drawn = Resamples.draw(queries, len(subsets), groups=GROUPS)
    lines = lines_of("lds", {
        name: resampled_lds(each, losses, subsets, drawn) for name, each in scores.items()
    })  # fmt: skip
    append(options.csv, [where | line for line in lines])
    where["fraction"] = ""  # subsets have no part in what follows
    if exact is not None:
        lines = lines_of("replay", {
            name: resampled(list(rank_correlation(each, exact).values), drawn)
            for name, each in scores.items()
        })  # fmt: skip
        append(options.csv, [where | line for line in lines])
    drawn = Resamples.draw(queries, CONTROLS, groups=GROUPS)
    for share in SHARES if options.qld else ():
        random = ~draw_subsets(n, CONTROLS, share, seed=1)
        controls = bank.fill(random, retrain, budget=CONTROLS, tell=told)
        found = {}
        for name in options.qld:
            masks = without_top(scores[name], share)
            removed = bank.fill(masks, retrain, budget=len(masks), tell=told)
            found[name] = resampled_qld(np.diagonal(removed), controls, drawn)
        append(options.csv, [where | line for line in lines_of(f"qld {share:.0%}", found)])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
