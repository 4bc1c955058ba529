"""Price and loss of each stored dtype: bytes, speed of scan and read, and the rows it finds.

    uv run python benchmarks/dtypes.py                  # 1.5 GB of disk, a few minutes
    uv run --with reasoning-gym==0.1.25 python benchmarks/dtypes.py --smollm2
                                # rows found alone; after examples/real/prepare.py, ten minutes

*Speed*: a store of 20,480 x 4,096 rows of each dtype, random numbers, page cache warm. *Scan* is
their products with one query, in turns with the float16 rows' (A B A B); *read* decodes them.

*Bytes* a row: of features; of all arrays, losses too, as every build of gradients keeps them
(`row_bytes`); of all files of the generation, records of units and the plan with them
(`file_bytes`); and of the blocks that these files and their folders take (`disk_bytes`, as `du`
counts).

*Rows found*: the embedded model after 10 optimizer steps on random rows, sjlt to 4,096, its 1,600
training rows and each of 8 skills as the target, beside the float32 store's scores: share of its
best 5% that is the same, NDCG of the best 20 (a row's gain is its float32 score, 0 where that is
negative), rank correlation (Spearman), and the share of the target's skill among the best 5%; means
over skills and seeds. *Error of a score*: the standard deviation of score minus float32 score over
all rows and targets (mean over seeds), and the largest error of all. Scores are mean cosines. No
limit: the figures say what a dtype loses.

Prints one line a dtype and appends them to results/dtypes.csv.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from gradkernels import ProjectionSpec
from report import RESULTS, Took, append, compared, echo, machine, on_disk, timed
from scipy import stats
from serve import write
from tinyrun import SKILLS, TinyRun, gather

from gradstore import checkpoint_features, select_top
from gradstore.export.features import FeatureSpec
from gradstore.export.projected import export_features
from gradstore.format.layout import FeatureDtype, arrays, generation_path, plan_path
from gradstore.format.records import GenerationRecord, RowSet
from gradstore.scoring.combine import CHUNK_ROWS
from gradstore.scoring.influence import subtask_influence
from gradstore.scoring.scan import Scan, exact_float32
from gradstore.scoring.selection import rows_for_fraction
from gradstore.store.generation import Generation
from gradstore.store.reader import open_store
from gradstore.store.writer import StoreWriter

DTYPES = get_args(FeatureDtype)
BESIDE, EXACT = "float16", "float32"
DIM, STEP, FRACTION, TOP = 4096, 10, 0.05, 20
CANDIDATES = 1.5  # times as many rows as are taken

#: Figures that are far below 1: three digits of them are kept, wherever they stand.
ERRORS = ("error_std", "error_max")

FloatArray = npt.NDArray[np.floating[Any]]


def main() -> int:
    """Run both parts, print the lines, append them to the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_480)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--smollm2", action="store_true", help="rows found on SmolLM2's store")
    parser.add_argument("--folder", default=None, help="where the temporary stores go")
    options = parser.parse_args()
    model, seeds = ("smollm2", 1) if options.smollm2 else ("", options.seeds)
    speeds: dict[str, dict[str, Any]] = {dtype: {} for dtype in DTYPES}
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="dtypes-") as folder:
        if not options.smollm2:
            speeds = measured_speeds(Path(folder), options.rows, options.pairs)
        begin = real if options.smollm2 else embedded
        by_seed = [rankings(Path(folder), seed, *begin(seed)) for seed in range(seeds)]
    where = machine()
    lines = []
    for dtype in DTYPES:
        figures = {
            name: over_seeds(name, [found[dtype][name] for found in by_seed])
            for name in by_seed[0][dtype]
        }
        lines.append(where | {"model": model, "dtype": dtype, "dim": DIM} | speeds[dtype] | figures
                     | {"seeds": seeds})  # fmt: skip
        echo("  ".join(f"{name}={value}" for name, value in lines[-1].items()))
    append(RESULTS / "dtypes.csv", lines)
    return 0


def over_seeds(name: str, values: Sequence[float]) -> float:
    """Join the seeds' figures: the largest of a largest error, else the mean."""
    if name in ERRORS:
        joined = max(values) if name == "error_max" else statistics.mean(values)
        return float(f"{joined:.3g}")
    return round(statistics.mean(values), 4)


def measured_speeds(folder: Path, rows: int, pairs: int) -> dict[str, dict[str, Any]]:
    """Bytes a row, scan and read of a store of each dtype."""
    for dtype in DTYPES:
        write(folder / dtype, rows, DIM, dtype=dtype, losses=True)
    stores = {dtype: open_store(folder / dtype) for dtype in DTYPES}
    trains = {dtype: store.generation("train/0") for dtype, store in stores.items()}
    for train in trains.values():
        scan(train)  # the page cache is warm, and checksums are known
    found: dict[str, dict[str, Any]] = {}
    for dtype, train in trains.items():
        times: dict[str, list[Took]] = {BESIDE: [], "scan": []}
        for _ in range(pairs):
            times[BESIDE].append(timed(partial(scan, trains[BESIDE])))
            times["scan"].append(timed(partial(scan, train)))
        few = min(rows, 4096)
        whole, blocks = generation_bytes(folder / dtype)
        read = statistics.median(timed(partial(train.read, 0, few)).wall for _ in range(3))
        found[dtype] = {
            "rows": rows,
            "feature_bytes": arrays(DIM, dtype)[0].chunk_bytes(256) / 256,
            "row_bytes": round(train.bytes / rows, 1),
            "file_bytes": round(whole / rows, 1),
            "disk_bytes": round(blocks / rows, 1),
            "read_rows_s": round(few / read),
            **compared(times[BESIDE], times["scan"], ("float16", "scan")),
        }
    return found


def generation_bytes(store: Path) -> tuple[int, int]:
    """Sum the files of the training rows: bytes, and bytes of blocks."""
    return on_disk(store / generation_path("train/0"), store / plan_path("train/0"))


def scan(train: Generation) -> None:
    """Multiply all rows with one query, as a score of one checkpoint and target set does."""
    query = np.random.default_rng(0).standard_normal((1, DIM))
    with exact_float32():
        products = Scan(train, query, chunk_rows=CHUNK_ROWS, device=torch.device("cpu"))
        for start in range(0, train.rows, CHUNK_ROWS):
            products.chunk(start, min(start + CHUNK_ROWS, train.rows))


def embedded(seed: int) -> tuple[TinyRun, Sequence[str]]:
    """Pause the embedded run; its skills are the targets."""
    with tempfile.TemporaryDirectory() as output:
        run = TinyRun.start(seed, Path(output))
    run.train_to(STEP)
    return run, SKILLS


def real(seed: int) -> tuple[TinyRun, Sequence[str]]:
    """Pause the run of quality/real.py; its targets' kinds."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "quality"))
    import real_rows
    from real import SETTINGS, STEP_TOKENS, TARGETS, WARM_UP

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        real_rows.write_data(folder, seed, list(TARGETS), None)
        sets = [f"real_target_{kind}" for kind in TARGETS]
        run = TinyRun.start(seed, Path(temporary) / "run", data_dir=folder, train="real_train",
                            targets=sets, settings=SETTINGS)  # fmt: skip
    run.step_tokens = STEP_TOKENS
    run.train_to(WARM_UP)
    return run, TARGETS


def rankings(
    folder: Path, seed: int, run: TinyRun, kinds: Sequence[str]
) -> dict[str, dict[str, float]]:
    """How a store of each dtype ranks the rows of a paused run, beside one of float32."""
    moments = run.train_to(run.step)
    p = sum(parameter.numel() for parameter in run.trained)
    spec = ProjectionSpec("sjlt", p=p, d=DIM, seed=seed)
    sets = {"train/0": gather(export_features(
        run.model, run.batches(run.data.train), features=FeatureSpec("adam_marginal"),
        projection=spec, moments=moments), len(run.data.train), DIM)}  # fmt: skip
    for kind, rows in zip(kinds, run.data.targets, strict=True):
        parts = export_features(
            run.model, run.batches(rows), features=FeatureSpec("sgd"), projection=spec
        )
        sets[f"target/{kind}/0"] = gather(parts, len(rows), DIM)
    scores = {}
    for dtype in DTYPES:
        store_features(folder / f"{seed}-{dtype}", sets, dtype)
        pairs = checkpoint_features(open_store(folder / f"{seed}-{dtype}"), targets=kinds)
        scores[dtype] = subtask_influence(pairs).values
    exact = scores[EXACT]
    return {
        dtype: compared_scores(scores[dtype], exact, run.skills, kinds)
        | {"ranked_rows": len(exact)}
        for dtype in DTYPES
    }


def store_features(path: Path, sets: Mapping[str, FloatArray], dtype: str) -> None:
    """Write generations of these features, as an export would."""
    with StoreWriter(path, provenance={"benchmark": "dtypes"}) as writer:
        for name, features in sets.items():
            role, _, rest = name.partition("/")
            record = GenerationRecord(
                name=name, role="train" if role == "train" else "target",
                set=rest.partition("/")[0] if role == "target" else "", step=0,
                run_id="benchmark", adapter_hash="0" * 64, effective_seed=0,
                projection={"method": "sjlt", "d": DIM, "seed": 0}, feature="sgd",
            )  # fmt: skip
            n = len(features)
            hashes = np.random.default_rng(n).integers(0, 256, (n, 16), dtype=np.uint8)
            begun = writer.begin(record, RowSet(hashes, None), dim=DIM, dtype=dtype)
            for unit in list(begun.pending):
                rows = features[unit.start : unit.stop].astype(np.float32)
                ok, ones = np.zeros(len(rows), np.uint8), np.ones(len(rows), np.float32)
                begun.write_unit(unit.index, rows, ones, ok, np.ones(len(rows), np.int32))
            begun.commit()


def compared_scores(
    scores: FloatArray, exact: FloatArray, skills: npt.NDArray[np.str_], kinds: Sequence[str]
) -> dict[str, float]:
    """Compare (n, q) scores with those of float32: means over the targets, and errors of all."""
    k = rows_for_fraction(FRACTION, len(scores))
    names = ("overlap", "reranked", "ndcg", "spearman", "skill")
    found: dict[str, list[float]] = {name: [] for name in names}
    for mine, true, kind in zip(scores.T, exact.T, kinds, strict=True):
        best, wanted = select_top(mine, k), select_top(true, k)
        candidates = select_top(mine, round(CANDIDATES * k))
        again = candidates[select_top(true[candidates], k)]
        gains = np.maximum(true, 0)
        discounts = 1 / np.log2(np.arange(TOP) + 2)
        ideal = float(gains[select_top(true, TOP)] @ discounts)
        found["overlap"].append(len(np.intersect1d(best, wanted)) / k)
        found["reranked"].append(len(np.intersect1d(again, wanted)) / k)
        found["ndcg"].append(float(gains[best[:TOP]] @ discounts) / ideal)
        found["spearman"].append(float(stats.spearmanr(mine, true).statistic))
        found["skill"].append(float((skills[best] == kind).mean()))
    error = scores.astype(np.float64) - exact
    errors = {"error_std": float(error.std()), "error_max": float(np.abs(error).max())}
    return {name: float(np.mean(values)) for name, values in found.items()} | errors


if __name__ == "__main__":
    torch.manual_seed(0)
    raise SystemExit(main())
