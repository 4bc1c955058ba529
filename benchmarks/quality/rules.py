"""A benchmark that bites: which selection finds the rows that follow the target's rule.

    uv run python benchmarks/quality/rules.py               # some hours on one core
    uv run python benchmarks/quality/rules.py --seeds 1     # about twenty minutes

The rows of `rules_data.py` on the embedded model after 10 and after 60 steps on random ones, every
rule as the target in turn (32 rows). A method takes the best 5% (50 rows). Figures, means over the
eight rules: the *share* of the right rule among them (by chance 0.10, for 800 right rows of 8 rules
and 200 wrong ones), that of each rule in a column of its own, and at step 60 the *loss* on 64
held-out rows of the rule after 30 more steps on the chosen rows. Both once more at step 60 of a run
whose every step, before the choice and after it, is clipped to a tenth of the median norm that the
first run's gradients had (`clip` 0.1).
Features go through a projection (sjlt, d = 4096) and float16, as in a store.
`bm25`, `less`, `mirror` and `landmarks` take the best of one score a row (`top`; of `bm25` its mean
over the target rows, where the selector's default is `round_robin`), `near` and `rds_plus` let the
target rows choose in turn, as the selectors do; a name that ends in the other rule takes that.
`cpu_s` are the processor seconds of choosing for one target from what the run has: gradients,
embeddings or losses of the training rows included.

Resumable: a method is not measured again at a state of a seed that the CSV has. Appends to
results/rules.csv, line by line, and prints the table of docs/figures.md: means with the paired
difference to the default, bold where it is carried after Holm's correction.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import tables
import torch
from more_methods import by_loss, cluster_less, icons, tsds
from report import RESULTS, append, echo, machine, read
from rules_data import RULES, make_rows, write_data
from tinyrun import TinyRun
from workloads import Workload
from world import Chosen, World, target_kind

from dataflex.data.rows import Rows
from dataflex.models.trained import ShortTraining, trained_on
from dataflex.selectors.mirror import falls_of
from gradstore import bm25_scores
from gradstore.export.pooling import Pooling
from gradstore.scoring.best_rows import HeldTable, StoredTable
from gradstore.scoring.choose import select_subset
from gradstore.scoring.comparable import CheckpointFeatures
from gradstore.scoring.influence import influence_scores
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.rules import Rule
from gradstore.scoring.selection import rows_for_fraction, select_top
from gradstore.similarity.landmarks import fit

#: Steps and clipping of the states; clipping as a part of the usual norm, 0 for the Trainer's 1.0.
STATES = ((10, 0.0), (60, 0.0), (60, 0.1))
LAST, TRAINED_STEPS = 60, 30
#: Steps of checkpoints before, for methods that take all: as of a run that selects every ten steps.
EARLIER = (10, 20, 30, 40, 50)
TARGETS = [f"rules_target_{rule}" for rule in RULES]
HELD_OUT = [f"rules_heldout_{rule}" for rule in RULES]

Method = Callable[[World, int], Chosen]
State = tuple[int, float]
Losses = npt.NDArray[np.float64]


def less(
    kind: str, product: InnerProduct = COSINE, subset: str = "top", *, earlier: bool = False
) -> Method:
    """Rows by influence: a kind of feature, a product, a subset rule, with EARLIER checkpoints."""

    def choose(world: World, target: int) -> Chosen:
        rows, queries = world.run.data.train, world.run.data.targets[target]
        pairs = [
            CheckpointFeatures(
                each.features(kind, rows), (each.features(target_kind(kind), queries),)
            )
            for each in ((*world.earlier, world) if earlier else (world,))
        ]
        scores = influence_scores(pairs, product=product)
        table = StoredTable(pairs, product=product)
        rule = Rule(subset)
        return rule.choose(world.k, scores.values, table, usable=scores.usable)

    return choose


def by_embedding(pooling: Pooling, subset: str) -> Method:
    """Rows by the model's own hidden states."""

    def choose(world: World, target: int) -> Chosen:
        train = world.embeddings(pooling, world.run.data.train)
        pair = CheckpointFeatures(train, world.embeddings(pooling, world.run.data.targets[target]))
        return select_subset([pair], world.k, subset)  # type: ignore[arg-type]

    return choose


def by_words(train: str, targets: Sequence[str], subset: str) -> Method:
    """Rows by the words of question and answer: best mean, or as a subset rule takes them."""

    def choose(world: World, target: int) -> Chosen:
        scores = bm25_scores(world.texts[train], world.texts[targets[target]])
        usable = np.ones(scores.shape[1], dtype=bool)
        table = HeldTable(scores.T)
        return Rule(subset).choose(world.k, scores.mean(axis=0), table, usable=usable)

    return choose


def landmarks(count: int) -> Method:
    """Rows by influence estimated from some rows' gradients, as selectors/landmarks.py does."""

    def choose(world: World, target: int) -> Chosen:
        train = world.run.data.train
        at = np.sort(np.random.default_rng(42).permutation(len(train))[:count])
        some = Rows(f"{count} landmarks", train.dataset.select(at.tolist()))
        gradients = world.features("adam_marginal", some)
        queries = world.features("sgd", world.run.data.targets[target])
        known = influence_scores([CheckpointFeatures(gradients, (queries,))]).values
        embedded = world.output_gradients(train)
        return select_top(fit(embedded[at], known[:, None], 0.01)(embedded)[:, 0], world.k)

    return choose


def rerank(by: str, top: float = 0.2) -> Method:
    """Rows that whole gradients take of the store's best, as selectors/rerank.py does."""

    def choose(world: World, target: int) -> Chosen:
        train, queries = world.run.data.train, world.run.data.targets[target]
        stored = world.features("adam_marginal", train)
        pair = CheckpointFeatures(stored, (world.features("sgd", queries),))
        scores = influence_scores([pair]).values
        best = np.sort(select_top(scores, rows_for_fraction(top, len(train))))
        some = Rows("candidates", train.dataset.select(best.tolist()))
        return best[select_top(world.whole_products(some, [queries], by)[:, 0], world.k)]

    return choose


def mirror(relative: bool) -> Method:
    """Rows whose loss falls most when the model is trained on the target, 8 epochs."""

    def choose(world: World, target: int) -> Chosen:
        before, after = _losses_by_target(world, target)
        falls = falls_of(before, after[:, None], relative=relative)[:, 0]
        return select_top(falls, world.k)

    return choose


def _losses_by_target(world: World, target: int) -> tuple[Losses, Losses]:
    """Measure the rows' losses before and after a training on the target."""
    run = world.run
    context = Workload("rules", run.model, run.data, run.collate).context(Path("unused"))
    rows = run.data.targets[target]
    before = world.once("losses", lambda: run.losses(run.data.train))
    training = ShortTraining(epochs=8, learning_rate=run.learning_rate, batch_rows=8)
    with trained_on(context, rows, np.arange(len(rows)), training, [run.seed, run.step]):
        return before, run.losses(run.data.train)


def at_random(world: World, target: int) -> Chosen:
    """Rows by lot."""
    rng = np.random.default_rng([world.run.seed, world.run.step, target])
    return rng.choice(len(world.run.skills), world.k, replace=False)


def oracle(world: World, target: int) -> Chosen:
    """Rows of the right rule, by lot."""
    rng = np.random.default_rng([world.run.seed, world.run.step, target])
    right = np.flatnonzero(world.run.skills == list(RULES)[target])
    return rng.choice(right, world.k, replace=False)


FISHER = InnerProduct("cosine", "fisher")
SUBSPACE = InnerProduct("cosine", "subspace")
METHODS: dict[str, Method] = {
    "oracle": oracle,
    "random": at_random,
    "bm25": by_words("rules_train", TARGETS, "top"),
    "bm25, round_robin": by_words("rules_train", TARGETS, "round_robin"),
    "near (hidden states)": by_embedding("mean", "round_robin"),
    "near (hidden states), top": by_embedding("mean", "top"),
    "rds_plus": by_embedding("position", "round_robin"),
    "rds_plus, top": by_embedding("position", "top"),
    "tsds": tsds,
    "loss": by_loss,
    "less": less("adam_marginal"),
    "less, published adam": less("adam"),
    "less, sgd": less("sgd"),
    "less, share of a step": less("adam_share"),
    "less, normalize: target": less("adam_marginal", InnerProduct("target")),
    "less, subspace": less("adam_marginal", SUBSPACE),
    "less, round_robin": less("adam_marginal", subset="round_robin"),
    "icons, a task a row": icons,
    "cluster_less": cluster_less,
    "less, rerank": rerank("exact"),
    "less, rerank by cg": rerank("cg"),
    "landmarks, 100": landmarks(100),
    "landmarks, 250": landmarks(250),
    "mirror": mirror(relative=True),
    "mirror, relative: false": mirror(relative=False),
    "less, sgd, fisher": less("sgd", FISHER),
    "less, sgd, fisher, round_robin": less("sgd", FISHER, "round_robin"),
    "less, sgd, kfac": less("kfac"),
    "less, sgd, ekfac": less("ekfac"),
    "less, checkpoints: all": less("adam_marginal", earlier=True),
    "less, sgd, fisher, checkpoints: all": less("sgd", FISHER, earlier=True),
    "less, sgd, fisher, round_robin, checkpoints: all": less(
        "sgd", FISHER, "round_robin", earlier=True
    ),
}
#: Features that methods take of EARLIER checkpoints.
OF_EARLIER = {
    "less, checkpoints: all": "adam_marginal",
    "less, sgd, fisher, checkpoints: all": "sgd",
    "less, sgd, fisher, round_robin, checkpoints: all": "sgd",
}


def earlier_worlds(run: TinyRun, names: list[str], step: int) -> tuple[World, ...]:
    """Train on to the step, and take the features that methods ask of EARLIER ones on the way."""
    kinds = dict.fromkeys(OF_EARLIER[name] for name in names if name in OF_EARLIER)
    worlds = []
    for at in EARLIER if kinds else ():
        if at < step:
            world = World(run, run.train_to(at), {})
            for kind in kinds:
                world.features(kind, run.data.train)
                for rows in run.data.targets[: len(TARGETS)]:
                    world.features(target_kind(kind), rows)
            worlds.append(world)
    return tuple(worlds)


def held_out_loss(world: World, target: int, chosen: Chosen) -> float:
    """Mean loss on the rule's held-out rows after more steps on the chosen ones."""
    run = world.run
    rng = np.random.default_rng([run.seed, target])
    count = TRAINED_STEPS * run.batch_size
    order = np.concatenate([rng.permutation(chosen) for _ in range(-(-count // len(chosen)))])
    with run.rewound():
        for start in range(0, count, run.batch_size):
            run.take_step(run.data.train, order[start : start + run.batch_size])
        return float(run.losses(run.data.targets[len(TARGETS) + target]).mean())


def measure(world: World, names: list[str], with_loss: bool) -> Iterator[dict[str, Any]]:
    """Yield one line a method: share, held-out loss, and processor seconds for one target."""
    for name in names:
        shares, losses, seconds = [], [], []
        for target, rule in enumerate(RULES):
            chosen, took = world.timed(lambda: METHODS[name](world, target))  # noqa: B023
            seconds.append(took)
            shares.append(float((world.run.skills[chosen] == rule).mean()))
            if with_loss:
                losses.append(held_out_loss(world, target, chosen))
        yield {
            "method": name,
            "step": world.run.step,
            "seed": world.run.seed,
            "share": round(float(np.mean(shares)), 4),
            "loss": round(float(np.mean(losses)), 4) if with_loss else "",
            "cpu_s": round(float(np.mean(seconds)), 2),
        } | {f"share of {rule}": round(of, 4) for rule, of in zip(RULES, shares, strict=True)}


def one_seed(seed: int, missing: Mapping[State, list[str]]) -> Iterator[dict[str, Any]]:
    """Measure the methods that each state still lacks on the rows of one seed, a line at a time."""
    texts = {
        name: [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in rows]
        for name, rows in make_rows(seed).items()
    }
    run = start(seed)
    for step, clip in STATES:
        if clip:
            run.train_to(LAST)
            usual = float(np.median(run.norms))
            run = start(seed)
            run.max_grad_norm = clip * usual
        names = missing[step, clip]
        if names:
            earlier = earlier_worlds(run, names, step)
            world = World(run, run.train_to(step), texts, earlier=earlier)
            for line in measure(world, names, with_loss=step == LAST):
                yield line | {"clip": clip or ""}


def start(seed: int) -> TinyRun:
    """Start the run of a seed, on rows of its own."""
    with tempfile.TemporaryDirectory(prefix="rules-") as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_data(data, seed)
        return TinyRun.start(
            seed, Path(folder) / "run", data_dir=data, train="rules_train",
            targets=[*TARGETS, *HELD_OUT],
        )  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 9)))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--csv", type=Path, default=RESULTS / "rules.csv")
    options = parser.parse_args()
    known = read(options.csv) if options.csv.exists() else []
    done = {
        (line["method"], int(line["seed"]), int(line["step"]), float(line.get("clip") or 0))
        for line in known
    }
    torch.set_num_threads(1)
    for seed in options.seeds:
        missing = {
            state: [name for name in options.methods if (name, seed, *state) not in done]
            for state in STATES
        }
        if any(missing.values()):
            for line in one_seed(seed, missing):
                echo(", ".join(f"{key} {value}" for key, value in line.items()))
                append(options.csv, [machine() | line])
    echo(f"\n{tables.rules(options.csv)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
