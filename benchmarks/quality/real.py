"""Selection on a real model and real rows: SmolLM2-135M-Instruct, thirteen kinds of rows.

    uv run python examples/real/prepare.py                  # once: the model
    uv run --with reasoning-gym==0.1.25 python benchmarks/quality/real.py --seeds 1
                                                            # about an hour on two cores

The rows of `real_rows.py` (32 of every kind, 16 poisoned, 16 look-alikes, 72 of facts). LoRA on all
linear layers, 12 steps of 8 rows at random; then a kind is the target (16 rows), a method takes a
tenth of the rows, which is more than there are of a kind (`--part 0.05` takes fewer, and is a
column), and the run goes on for 16 steps on them. Figures: the *share* of the target's
kind among the chosen, the *loss* on 24 held-out rows of it, and where the kind has a verifier, of
greedy answers to them, *exact* matches and the task's own *score*. `choose_s` are the seconds of
choosing, from what the run has (of the processor; with a GPU, wall-clock); `train_s` those of the
steps on the chosen rows.

*Planted* rows are looked for after one epoch over all rows: the area under precision and recall
for the poison, by 8 further poisoned rows (mean of their scores), and for 24 questions about
facts, recall among the 50 best rows and mean reciprocal rank of the rows that state the fact.

With `BERGSON_PYTHON=PYTHON`, an interpreter that has bergson 2.5.1 (`peer.py`), its `trackstar`,
`trak` and `ekfac` choose too, by their mean over the target rows.

Resumable: what the CSV has is not measured again. Appends to results/real.csv, line by line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import numpy.typing as npt
import peer
import real_rows
import tables
import torch
from more_methods import by_loss, cluster_less, icons, tsds
from report import RESULTS, append, echo, machine, read
from rules import (
    FISHER,
    SUBSPACE,
    Method,
    at_random,
    by_embedding,
    by_words,
    landmarks,
    less,
    mirror,
    rerank,
)
from tinyrun import ROOT, TinyRun
from transformers import AutoTokenizer
from world import Chosen, World

from dataflex.data.rows import Rows
from dataflex.models.generate import continuations
from dataflex.rewards.responses import Exchange
from gradstore import CheckpointFeatures, bm25_scores
from gradstore.evaluation import average_precision, mean_reciprocal_rank, recall_at_k
from gradstore.export.pooling import Pooling
from gradstore.scoring.influence import subtask_influence
from gradstore.scoring.products import COSINE, InnerProduct
from gradstore.scoring.selection import select_top

MODEL = ROOT / "examples" / "real" / "model"
SETTINGS = (
    f"model_name_or_path={MODEL}", "template=smollm2", "cutoff_len=512", "learning_rate=5e-4",
    "disable_gradient_checkpointing=true",
)  # fmt: skip
WARM_UP, TRAINED_STEPS, STEP_TOKENS = 12, 16, 512
GPU_TOKENS = 2**14  # padded tokens at once where there is a GPU
PEER = "BERGSON_PYTHON"  # variable that names a Python with bergson
PEERS = tuple(peer.COMMANDS) if PEER in os.environ else ()
PART, BEST_ROWS = tables.REAL_PART, 50
TARGETS = ("tools_en", "numbers_bars", "backward_spaced")
SETS = [f"real_{use}_{kind}" for use in ("target", "heldout") for kind in TARGETS]
POISON, FACTS = "real_poison", "real_facts"
Floats = npt.NDArray[np.float64]


# ---- methods -----------------------------------------------------------------------------------


def by_peer(name: str) -> Method:
    """Choose by the mean of bergson's scores over the target rows."""

    def choose(world: World, target: int) -> Chosen:
        found = peer_scores(world, name, len(TARGETS))[target]
        return select_top(found.mean(axis=0).astype(np.float32), world.k)

    return choose


def peer_scores(world: World, name: str, sets: int) -> list[Floats]:
    """Run bergson once for the first query sets (above 0) or the last ones (below)."""
    run = world.run
    queries = list(run.data.targets[:sets] if sets > 0 else run.data.targets[sets:])
    tokens = min(run.batch_tokens, run.model.config.max_position_embeddings)
    bergson = peer.Bergson(Path(os.environ[PEER]), tokens)
    found = world.once(f"{name} {sets}", lambda: bergson.scores(name, run, queries))
    return found  # type: ignore[no-any-return]


def oracle(world: World, target: int) -> Chosen:
    """Rows of the target's kind: all of them, and the rest by lot."""
    right = world.run.skills == TARGETS[target]
    order = np.random.default_rng([world.run.seed, target]).random(len(right)) + right
    return select_top(order, world.k)


METHODS: dict[str, Method] = {
    "random": at_random,
    "oracle": oracle,
    "less": less("adam_marginal"),
    "less, sgd, fisher": less("sgd", FISHER),
    "less, subspace": less("adam_marginal", SUBSPACE),
    "bm25": by_words("real_train", SETS, "top"),
    "bm25, round_robin": by_words("real_train", SETS, "round_robin"),
    "rds_plus": by_embedding("position", "round_robin"),
    "rds_plus, top": by_embedding("position", "top"),
    "near (hidden states)": by_embedding("mean", "round_robin"),
    "near (hidden states), top": by_embedding("mean", "top"),
    "less, round_robin": less("adam_marginal", subset="round_robin"),
    "less, sgd, fisher, round_robin": less("sgd", FISHER, "round_robin"),
    "less, published adam": less("adam"),
    "less, share of a step": less("adam_share"),
    "less, normalize: target": less("adam_marginal", InnerProduct("target")),
    "less, rerank": rerank("exact"),
    "less, sgd, kfac": less("kfac"),
    "less, sgd, ekfac": less("ekfac"),
    "landmarks, 100": landmarks(100),
    "icons, a task a row": icons,
    "cluster_less": cluster_less,
    "tsds": tsds,
    "mirror": mirror(relative=True),
    "loss": by_loss,
} | {name: by_peer(name) for name in PEERS}


# ---- figures of a selection --------------------------------------------------------------------


class Measured:
    """One run's figures after training on chosen rows.

    Args:
        run: paused where the selection is made.
        clock: seconds.
        tasks: for every target that has a verifier, the generator's task of each held-out row.
    """

    def __init__(
        self, run: TinyRun, clock: Callable[[], float], tasks: dict[str, list[str]]
    ) -> None:
        self.run, self.clock, self.tasks = run, clock, tasks
        self.tokenizer = AutoTokenizer.from_pretrained(str(MODEL))

    def after(self, target: int, chosen: Chosen) -> dict[str, Any]:
        """Go on with the chosen rows, measure, and take the steps back."""
        run, kind = self.run, TARGETS[target]
        rng = np.random.default_rng([run.seed, target])
        count = TRAINED_STEPS * run.batch_size
        order = np.concatenate([rng.permutation(chosen) for _ in range(-(-count // len(chosen)))])
        held_out = run.data.targets[len(TARGETS) + target]
        with run.rewound():
            began = self.clock()
            for start in range(0, count, run.batch_size):
                run.take_step(run.data.train, order[start : start + run.batch_size])
            took = self.clock() - began
            found: dict[str, Any] = {
                "share": round(float((run.skills[chosen] == kind).mean()), 4),
                "loss": round(float(run.losses(held_out).mean()), 4),
                "train_s": round(took, 2),
            }
            return found | (self._answers(kind, held_out) if kind in self.tasks else {})

    def _answers(self, kind: str, rows: Rows) -> dict[str, float]:
        parts = [Exchange.of(rows.dataset[row]) for row in range(len(rows))]
        stop = int(self.tokenizer.eos_token_id)
        given = continuations(
            self.run.model, [part.prompt for part in parts], stops=[stop], pad=stop,
            max_new_tokens=max(len(part.reference) for part in parts) + 4,
        )  # fmt: skip
        texts = self.tokenizer.batch_decode(given, skip_special_tokens=True)
        exact, score = np.mean(
            [real_rows.accuracy(kind, text, task)
             for text, task in zip(texts, self.tasks[kind], strict=True)], axis=0,
        )  # fmt: skip
        return {"exact": round(float(exact), 4), "score": round(float(score), 4)}


# ---- planted rows ------------------------------------------------------------------------------


def by_gradient(kind: str, product: InnerProduct = COSINE) -> Callable[[World, Rows], Floats]:
    """(q, n) influence on every row of a set alone."""

    def score(world: World, rows: Rows) -> Floats:
        pair = CheckpointFeatures(
            world.features(kind, world.run.data.train), (world.features("sgd", rows),)
        )
        found = subtask_influence([pair], subtask_sizes=[1] * len(rows), product=product)
        return found.values.T.astype(np.float64)

    return score


def by_states(pooling: Pooling) -> Callable[[World, Rows], Floats]:
    """(q, n) cosines of hidden states."""

    def score(world: World, rows: Rows) -> Floats:
        train = world.embeddings(pooling, world.run.data.train)
        return (world.embeddings(pooling, rows) @ train.T).astype(np.float64)

    return score


def by_bm25(world: World, rows: Rows) -> Floats:
    """(q, n) BM25."""
    found = bm25_scores(world.texts["real_train"], world.texts[rows.name])
    return found.astype(np.float64)


def by_bergson(name: str) -> Callable[[World, Rows], Floats]:
    """(q, n) scores of bergson for poison or facts, which it ranks for in one run."""
    return lambda world, rows: peer_scores(world, name, -2)[rows is world.run.data.targets[-1]]


def by_lot(world: World, rows: Rows) -> Floats:
    """(q, n) noise."""
    rng = np.random.default_rng([world.run.seed, len(rows)])
    return rng.normal(size=(len(rows), len(world.run.skills)))


SCORES: dict[str, Callable[[World, Rows], Floats]] = {
    "random": by_lot,
    "less": by_gradient("adam_marginal"),
    "less, published adam": by_gradient("adam"),
    "less, sgd": by_gradient("sgd"),
    "less, normalize: target": by_gradient("adam_marginal", InnerProduct("target")),
    "less, sgd, fisher": by_gradient("sgd", FISHER),
    "less, subspace": by_gradient("adam_marginal", SUBSPACE),
    "less, sgd, fisher, normalize: target": by_gradient("sgd", InnerProduct("target", "fisher")),
    "bm25": by_bm25,
    "rds_plus": by_states("position"),
    "near (hidden states)": by_states("mean"),
} | {name: by_bergson(name) for name in PEERS}


def planted(world: World, name: str) -> dict[str, Any]:
    """Poison and facts found by one score."""
    run = world.run
    poison, facts = run.data.targets[-2:]
    of_poison = SCORES[name](world, poison).mean(axis=0)
    of_facts = SCORES[name](world, facts)
    asked = np.array([line["skill"] for line in world_rows(world, FACTS)])
    stated = asked[:, None] == run.skills[None, :]
    return {
        "auprc": round(average_precision(of_poison, run.skills == "poison").mean, 4),
        "recall": round(recall_at_k(of_facts, stated, BEST_ROWS).mean, 4),
        "mrr": round(mean_reciprocal_rank(of_facts, stated).mean, 4),
    }


# ---- the runs ----------------------------------------------------------------------------------


def world_rows(world: World, name: str) -> list[dict[str, Any]]:
    """Return the records of a data set, in the order of its rows."""
    return [json.loads(text) for text in world.texts[f"{name} records"]]


def texts_of(run: TinyRun, folder: Path) -> dict[str, list[str]]:
    """Collect what every row says and its whole record, by data set, in the order of the rows."""
    found = {}
    names = ["real_train", *(rows.name for rows in run.data.targets)]
    for name, rows in zip(names, (run.data.train, *run.data.targets), strict=True):
        records = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        ordered = [records[index] for _, index in rows.sources or ()]
        found[f"{name} records"] = [json.dumps(each) for each in ordered]
        found[name] = ["\n".join(turn["value"] for turn in each["conversations"])
                       for each in ordered]  # fmt: skip
    return found


def one_seed(
    seed: int, done: set[tuple[str, str]], methods: list[str], given: Path | None, part: float
) -> Iterator[dict[str, Any]]:
    """Measure what is missing of one seed and part, a line at a time; planted rows have no part."""
    with tempfile.TemporaryDirectory(prefix="real-") as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        real_rows.write_data(folder, seed, list(TARGETS), given)
        run = TinyRun.start(
            seed, Path(temporary) / "run", data_dir=folder, train="real_train",
            targets=[*SETS, POISON, FACTS], settings=SETTINGS,
        )  # fmt: skip
        texts = texts_of(run, folder)
    if run.trained[0].is_cuda:
        run.step_tokens = run.batch_tokens = GPU_TOKENS
    else:
        run.step_tokens = STEP_TOKENS
    world = World(run, run.train_to(WARM_UP), texts, part=part)
    tasks = {
        kind: [record["task"] for record in world_rows(world, f"real_heldout_{kind}")]
        for kind in TARGETS if kind in real_rows.GENERATED
    }  # fmt: skip
    measured = Measured(run, world.clock, tasks)
    for name in methods:
        for target, kind in enumerate(TARGETS):
            if (name, kind) not in done:
                chosen, took = world.timed(lambda: METHODS[name](world, target))  # noqa: B023
                figures = {"choose_s": round(took, 2)} | measured.after(target, chosen)
                yield {"method": name, "target": kind, "seed": seed, "part": part} | figures
    missing = [name for name in SCORES if (name, "planted") not in done]
    if missing:
        epoch = len(run.data.train) // run.batch_size
        world = World(run, run.train_to(epoch), texts)
        for name in missing:
            yield {"method": name, "target": "planted", "seed": seed} | planted(world, name)


COLUMNS = ("method", "target", "seed", "part", "share", "loss", "exact", "score", "choose_s",
           "train_s", "auprc", "recall", "mrr")  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--part", type=float, default=PART, help="of the rows that are taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--archives", type=Path, help="folder with LlamaFactory's source archive")
    parser.add_argument("--csv", type=Path, default=RESULTS / "real.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chip = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for seed in options.seeds:
        known = read(options.csv) if options.csv.exists() else []
        done = {(line["method"], line["target"]) for line in known if int(line["seed"]) == seed
                and tables.part_of(line) in (options.part, None)}  # fmt: skip
        for line in one_seed(seed, done, options.methods, options.archives, options.part):
            echo(", ".join(f"{key} {value}" for key, value in line.items()))
            whole = dict.fromkeys(COLUMNS, "") | line
            append(options.csv, [machine(chip=chip) | whole])
    echo(f"\n{tables.real(options.csv)}\n\n{tables.planted(options.csv)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
