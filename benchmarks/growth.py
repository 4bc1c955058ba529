"""Growth of an export's time with the rows, the gradient's length and the projected dimensions.

    uv run python benchmarks/growth.py       # about five minutes on two cores, 2 GB

A random Llama of 4 M parameters with LoRA on all linear layers, rows of 64 tokens; an export is all
that a selection does: gradients, adam_marginal features, projection, a store, commit. One factor is
varied at a time, around 96 rows, rank 16 and d = 4,096: the rows n from 24 to 384, the gradient's
length p by the rank from 4 to 64, d from 1,024 to 8,192; each with `sjlt` and `rademacher`. All
points take turns, three rounds after one export of each rank and projection that warms up.

An export has a part that no factor changes: with n, plan and commit; with p and d, the model's own
forward and backward. So to what shall be *linear* a start and a power are fitted together,
t(x) = start + b x^slope, start >= 0, by least squares of the relative errors: slope is 1 where time
is a line, whatever its start. *Flat* (`sjlt` with d) is the slope of log t(x) by log x. Both are
fitted in each round; given are the medians, and the smallest and the largest slope.

Prints a line for each point and appends them to results/growth.csv. Exits 1 where a median slope is
above its limit: 1.1 of what shall be linear, 0.1 of what shall be flat.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from export_ratio import IGNORED, LINEAR, Bench, Method, Row
from report import RESULTS, append, echo, machine

ROWS, RANK, DIM = 96, 16, 4096
TOKENS, VOCABULARY, TOKEN_BUDGET = 64, 4096, 2048
LIMITS = {"linear": 1.1, "flat": 0.1}
METHODS: tuple[Method, ...] = ("sjlt", "rademacher")


@dataclass(frozen=True)
class Point:
    """One export."""

    method: Method
    rows: int = ROWS
    rank: int = RANK
    d: int = DIM


@dataclass(frozen=True)
class Factor:
    """Points that differ in one number.

    Attributes:
        name: "n", "p" or "d".
        claim: how time shall grow.
        points: from the smallest.
        of: the number, of a point and the gradient's length by rank.
    """

    name: str
    claim: Literal["linear", "flat"]
    points: tuple[Point, ...]
    of: Callable[[Point, dict[int, int]], int]


def factors(scale: int) -> list[Factor]:
    """List what is varied; rows are divided by `scale`."""
    rows, found = ROWS // scale, []
    for method in METHODS:
        middle = Point(method, rows)
        found += [
            Factor("n", "linear", tuple(replace(middle, rows=n) for n in
                                        (rows // 4, rows, 2 * rows, 4 * rows)),
                   lambda point, _: point.rows),
            Factor("p", "linear", tuple(replace(middle, rank=r) for r in (4, 8, 16, 32, 64)),
                   lambda point, p: p[point.rank]),
            Factor("d", "flat" if method == "sjlt" else "linear",
                   tuple(replace(middle, d=d) for d in (1024, 2048, 4096, 8192)),
                   lambda point, _: point.d),
        ]  # fmt: skip
    return found


# ---- exports ---------------------------------------------------------------------------------


def random_rows(count: int) -> list[Row]:
    """Draw rows of one length, the later half of each a target."""
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (count, TOKENS))
    half = TOKENS // 2
    return [{"input_ids": row.tolist(), "labels": [IGNORED] * half + row[half:].tolist()}
            for row in ids]  # fmt: skip


def bench_of(rank: int, rows: list[Row]) -> Bench:
    """Make a model with an adapter of this rank, two optimizer steps old."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    base: Any = LlamaForCausalLM(shape)  # type: ignore[no-untyped-call]
    adapter = LoraConfig(r=rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, adapter)
    bench = Bench(model, rows, TOKEN_BUDGET, torch.device("cpu"))
    bench.train_a_little()
    model.eval()
    return bench


def measure(points: Sequence[Point], benches: dict[int, Bench], rounds: int) -> list[list[float]]:
    """Export every point in turns: (rounds, points) seconds."""
    for rank, bench in benches.items():
        for method in METHODS:
            replace(bench, rows=bench.rows[:8]).export(method, DIM)
            echo(f"warm-up: rank {rank}, {method}")
    found = []
    for number in range(1, rounds + 1):
        seconds = []
        for point in points:
            bench = benches[point.rank]
            own = replace(bench, rows=bench.rows[: point.rows])
            seconds.append(own.export(point.method, point.d).wall)
        found.append(seconds)
        echo(f"round {number} of {rounds}: {sum(seconds):.0f} s")
    return found


# ---- slopes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Growth of seconds with a size: `start` is what the smallest size can't explain."""

    slope: float
    start: float


def fitted(claim: str, sizes: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Fit start + b x^slope, or the slope of the logarithms to what shall be flat.

    Args:
        claim: "linear" or "flat".
        sizes: x, at least three.
        seconds: of each.
    """
    x, t = np.asarray(sizes, dtype=np.float64) / sizes[0], np.asarray(seconds)
    if claim == "flat":
        return Fit(float(np.polyfit(np.log(x), np.log(t), 1)[0]), 0.0)
    best, found = np.inf, Fit(0.0, float(t.mean()))  # where nothing grows
    for power in np.arange(0.05, 3, 0.005):
        design = np.stack([np.ones_like(t), x**power], axis=1) / t[:, None]
        (start, by), *_ = np.linalg.lstsq(design, np.ones_like(t))
        if start < 0:
            start, by = 0.0, float(design[:, 1].sum() / (design[:, 1] ** 2).sum())
        error = float(((design @ (start, by) - 1) ** 2).sum())
        if by > 0 and error < best:
            best, found = error, Fit(float(power), float(start))
    return found


def lines_of(
    factor: Factor, p: dict[int, int], times: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Return a line for each point of a factor; `times` are (rounds, points) seconds."""
    sizes = [factor.of(point, p) for point in factor.points]
    fits = [fitted(factor.claim, sizes, each) for each in times]
    slopes = [fit.slope for fit in fits]
    growth = {
        "start_s": round(statistics.median(fit.start for fit in fits), 3),
        "slope": round(statistics.median(slopes), 3),
        "slope_min": round(min(slopes), 3),
        "slope_max": round(max(slopes), 3),
    }
    return [
        {
            "factor": factor.name, "projection": point.method, "claim": factor.claim,
            "size": size, "rows": point.rows, "rank": point.rank, "p": p[point.rank],
            "d": point.d, "rounds": len(of), "seconds": round(statistics.median(of), 3),
            "seconds_min": round(min(of), 3), "seconds_max": round(max(of), 3),
            **growth, "limit": LIMITS[factor.claim],
        }
        for point, size, of in zip(factor.points, sizes, zip(*times, strict=True), strict=True)
    ]  # fmt: skip


def main() -> int:
    """Print the lines, append them to the CSV; return 1 where time grows faster than claimed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divides the rows, for a quick look")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, default=RESULTS / "growth.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    varied = factors(options.scale)
    points = list(dict.fromkeys(point for factor in varied for point in factor.points))
    rows = random_rows(max(point.rows for point in points))
    benches = {rank: bench_of(rank, rows) for rank in sorted({point.rank for point in points})}
    p = {rank: bench.p for rank, bench in benches.items()}
    times = measure(points, benches, options.rounds)
    place = {point: index for index, point in enumerate(points)}
    lines = []
    for factor in varied:
        own = [[each[place[point]] for point in factor.points] for each in times]
        lines += lines_of(factor, p, own)
    for line in lines:
        echo(", ".join(f"{key} {value}" for key, value in line.items()))
    where = machine()
    append(options.csv, [where | line for line in lines])
    return int(any(line["slope"] > line["limit"] for line in lines))


if __name__ == "__main__":
    raise SystemExit(main())
