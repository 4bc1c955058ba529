"""Wrong answers that `gradstore audit` finds on the embedded data, beside loss and gradient norm.

    uv run python benchmarks/audit.py                 # about ten minutes on two cores

320 of the 1,600 rows of `tiny_train` have a wrong answer: random signs, or the answer to another
question. The column `skill` says which, and nothing measured here reads it. Each seed trains the
embedded model on all rows, wrong ones included, for one pass (200 steps); at five steps the
features of LESS (`adam_marginal`, of the target sets `sgd`; SJLT, d = 1024) and the losses go into
a store, as an export puts them there. Figures of every signal of the store's audit: the AUROC, and
the precision among as many rows as are wrong.

Settings: the checkpoint after 5 steps, when the pretrained model still tells right answers from
wrong ones by their loss; the newest one after the pass; the three after the first quarter; all
five. The signals and `suspicion` are the product's: `suspicion` is the plain mean of the
percentiles of loss, length-corrected self-influence and disagreement. Nothing is fitted to the
labels, but the figures of these and of other combinations on this data were known when the three
were chosen. Tried and left out, each for a reason that needs no label: the neighbours' cosine
(wrong answers have each other for neighbours), the neighbours' losses and their cosines among
themselves (the same), and the cosine to target sets (rows of a kind that no target asks for would
be called wrong).

Prints one line a figure, appends to results/audit.csv, and exits 1 unless after the pass, from its
newest checkpoint, `suspicion` is at least 0.05 above the loss in AUROC for every seed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gradkernels import ProjectionSpec
from report import RESULTS, append, echo, machine
from scipy.stats import rankdata
from tinyrun import SKILLS, TinyRun, gather

from gradstore import audit, open_store
from gradstore.capture.per_sample import batch_losses
from gradstore.export.features import FeatureSpec
from gradstore.export.projected import export_features
from gradstore.format.layout import RowStatus
from gradstore.format.names import GenerationName
from gradstore.format.records import GenerationRecord, RowSet, row_hash
from gradstore.store.writer import StoreWriter

STEPS = (5, 20, 50, 100, 200)
DIM = 1024
MARGIN = 0.05
NEWEST = "after a pass, newest"

#: Setting -> the checkpoints audited together.
SETTINGS = {
    "after 5 steps": (5,),
    NEWEST: (200,),
    "after a pass, steps 50, 100, 200": (50, 100, 200),
    "after a pass, all five": STEPS,
}
#: Column of the audit -> +1 where high is suspicious, -1 where low is.
SIGNALS = {
    "loss": 1,
    "gradient_norm": 1,
    "self_influence": 1,
    "self_influence_x_tokens": 1,
    "agreement": -1,
    "neighbour_cosine": -1,
    "best_target": -1,
    "suspicion": 1,
}
Arrays = dict[str, npt.NDArray[Any]]


def features_of(seed: int, folder: Path) -> Arrays:
    """Train, and take features, norms and losses at every step; kept in `folder` for a rerun."""
    path = folder / f"s{seed}.npz"
    if path.exists():
        return dict(np.load(path))
    run = TinyRun.start(seed, folder / "nothing")
    n, p = len(run.data.train), sum(x.numel() for x in run.model.parameters() if x.requires_grad)
    found: Arrays = {"skills": run.skills, "tokens": np.zeros(n)}
    for step in STEPS:
        moments = run.train_to(step)
        projection = ProjectionSpec(method="sjlt", p=p, d=DIM, seed=step)
        sets = [("adam_marginal", "train", run.data.train)]
        sets += [("sgd", skill, rows) for skill, rows in zip(SKILLS, run.data.targets, strict=True)]
        for kind, name, rows in sets:
            parts = list(
                export_features(
                    run.model, run.batches(rows), features=FeatureSpec(kind),  # type: ignore[arg-type]
                    projection=projection, moments=moments if kind != "sgd" else None,
                )
            )  # fmt: skip
            key, norm = f"{kind}/{step}/{name}", np.zeros(len(rows))
            found[key] = gather(parts, len(rows), DIM)
            for part in parts:
                norm[part.rows] = part.norm
            found[f"{key}/norm"] = norm
        losses = np.zeros(n)
        for rows_of_batch, batch in run.batches(run.data.train):
            stats = batch_losses(run.model, batch)
            losses[rows_of_batch] = stats.loss
            found["tokens"][rows_of_batch] = stats.target_tokens
        found[f"loss/{step}"] = losses
    np.savez(path, **found)  # type: ignore[arg-type]
    return found


def write_store(path: Path, found: Arrays, steps: tuple[int, ...]) -> None:
    """Put the features of some steps into a store."""
    with StoreWriter(path, provenance={"dim": DIM}) as writer:
        for step in steps:
            for skill in SKILLS:
                key, name = f"sgd/{step}/{skill}", GenerationName("target", step, skill)
                add(writer, name, "sgd", found[key], found[f"{key}/norm"])
            key, name = f"adam_marginal/{step}/train", GenerationName("train", step)
            more = found["tokens"], found[f"loss/{step}"]
            add(writer, name, "adam_marginal", found[key], found[f"{key}/norm"], *more)


def add(
    writer: StoreWriter,
    name: GenerationName,
    feature: str,
    features: npt.NDArray[np.float32],
    norm: npt.NDArray[np.float64],
    tokens: npt.NDArray[np.float64] | None = None,
    losses: npt.NDArray[np.float64] | None = None,
) -> None:
    """Write one generation."""
    record = GenerationRecord(
        name=str(name), role=name.role, set=name.set, step=name.step, run_id="audit",
        adapter_hash=str(name.step), effective_seed=name.step, learning_rate=1.0, feature=feature,
        projection={"method": "sjlt", "d": DIM, "seed": name.step},
    )  # fmt: skip
    n = len(features)
    rows = RowSet.from_hashes([row_hash([i], [i]) for i in range(n)])
    counts = np.ones(n, np.int32) if tokens is None else tokens.astype(np.int32)
    generation = writer.begin(record, rows, dim=DIM, losses=losses is not None)
    for unit in list(generation.pending):
        at = slice(unit.start, unit.stop)
        status = np.full(unit.stop - unit.start, RowStatus.OK, np.uint8)
        given = None if losses is None else losses[at]
        generation.write_unit(unit.index, features[at], norm[at], status, counts[at], given)
    generation.commit()


def auroc(scores: npt.NDArray[np.float64], wrong: npt.NDArray[np.bool_]) -> float:
    """Chance that a wrong row scores above a right one, ties halved; both (n,)."""
    count = int(wrong.sum())
    above = rankdata(scores)[wrong].sum() - count * (count + 1) / 2
    return float(above / (count * (len(wrong) - count)))


def precision(scores: npt.NDArray[np.float64], wrong: npt.NDArray[np.bool_]) -> float:
    """Share of wrong rows among the highest scores, as many as there are wrong rows."""
    return float(wrong[np.argsort(-scores, kind="stable")[: wrong.sum()]].mean())


def measured(found: Arrays, seed: int, folder: Path) -> list[dict[str, Any]]:
    """One line for each setting and signal."""
    wrong, lines = found["skills"] == "noise", []
    for number, (setting, steps) in enumerate(SETTINGS.items()):
        path = folder / f"store-{seed}-{number}"
        write_store(path, found, steps)
        frame = audit(open_store(path)).frame().sort_values("row")
        for signal, sign in SIGNALS.items():
            scores = sign * frame[signal].to_numpy()
            line = {"setting": setting, "signal": signal, "seed": seed,
                    "auroc": round(auroc(scores, wrong), 4),
                    "precision": round(precision(scores, wrong), 4)}  # fmt: skip
            lines.append(line)
            echo(", ".join(f"{key} {value}" for key, value in line.items()))
    return lines


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--features", type=Path, help="folder that keeps each seed's features")
    parser.add_argument("--csv", type=Path, default=RESULTS / "audit.csv")
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        kept = options.features or Path(folder)
        for seed in options.seeds:
            lines += measured(features_of(seed, kept), seed, Path(folder))
    append(options.csv, [machine() | line for line in lines])
    newest = {(line["signal"], line["seed"]): line["auroc"]
              for line in lines if line["setting"] == NEWEST}  # fmt: skip
    short = [seed for seed in options.seeds
             if newest["suspicion", seed] < newest["loss", seed] + MARGIN]  # fmt: skip
    if short:
        echo(f"suspicion is not {MARGIN} above the loss for seed(s) {short}")
    return int(bool(short))


if __name__ == "__main__":
    raise SystemExit(main())
