"""Growth of an export's time with the rows, the gradient's length and the projected dimensions.

    uv run python benchmarks/growth.py       # about ten minutes on two cores, 4 GB

A random Llama of 4 M parameters with LoRA on all linear layers, rows of 64 tokens; an export is all
that a selection does: gradients, adam_marginal features, projection, a store, commit. One factor is
varied at a time, around 96 rows, rank 64 and d = 4,096: the rows n from 24 to 384, the gradient's
length p by the rank from 4 to 512, d from 1,024 to 32,768; each with `sjlt` and `rademacher`. All
points take turns, three rounds after one export of each rank and projection that warms up.

An export has a part that no factor changes: with n, plan and commit; with p, the model's own
forward and backward. So to what shall be *linear* a start and a power are fitted together,
t(x) = start + b x^slope, start >= 0, by least squares of the relative errors: slope is 1 where time
is a line, whatever its start. The largest p is 128 times the smallest, so that the start is the
smaller part of it. Of d, the pass that makes the gradients is timed alone in the same round and
subtracted, since it would hide how the rest grows: features, projection and store. *Flat* (`sjlt`
with d) is the slope of log t(x) by log x. All are fitted in each round; given are the medians, and
the smallest and the largest slope.

Prints a line for each point and appends them to results/growth.csv. Exits 1 where a slope is above
its limit in every round: 1.1 of what shall be linear, 0.1 of what shall be flat.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from export_ratio import IGNORED, LINEAR, Bench, Method, Row
from report import RESULTS, Took, append, echo, machine, timed

from gradstore.capture.per_sample import GradientCapture

ROWS, RANK, DIM = 96, 64, 4096
RANKS, DIMS = (4, 16, 64, 256, 512), (1024, 4096, 16_384, 32_768)
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
        rest: whether the pass that makes the gradients is subtracted.
    """

    name: str
    claim: Literal["linear", "flat"]
    points: tuple[Point, ...]
    of: Callable[[Point, dict[int, int]], int]
    rest: bool = False


def factors(scale: int) -> list[Factor]:
    """List what is varied; rows are divided by `scale`."""
    rows, found = ROWS // scale, []
    for method in METHODS:
        middle = Point(method, rows)
        found += [
            Factor("n", "linear", tuple(replace(middle, rows=n) for n in
                                        (rows // 4, rows, 2 * rows, 4 * rows)),
                   lambda point, _: point.rows),
            Factor("p", "linear", tuple(replace(middle, rank=r) for r in RANKS),
                   lambda point, p: p[point.rank]),
            Factor("d", "flat" if method == "sjlt" else "linear",
                   tuple(replace(middle, d=d) for d in DIMS),
                   lambda point, _: point.d, rest=True),
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


def the_pass(bench: Bench) -> Took:
    """Time the forward and backward that make the rows' gradients, which nobody takes."""

    def one_pass() -> None:
        with GradientCapture(bench.model) as capture:
            for batch in bench.batches():
                capture.capture(batch, lambda *_: None)

    return timed(one_pass)


@dataclass(frozen=True)
class Times:
    """Seconds of one round, by point: of exports, and of the passes in them."""

    exports: dict[Point, float]
    passes: dict[Point, float]


def measure(points: Sequence[Point], benches: dict[int, Bench], rounds: int) -> list[Times]:
    """Export every point in turns, and make each pass of as many rows and such a rank."""
    for rank, bench in benches.items():
        for method in METHODS:
            replace(bench, rows=bench.rows[:8]).export(method, DIM)
            echo(f"warm-up: rank {rank}, {method}")
    found = []
    for number in range(1, rounds + 1):
        exports: dict[Point, float] = {}
        alone: dict[tuple[int, int], float] = {}
        for point in points:
            bench = benches[point.rank]
            own = replace(bench, rows=bench.rows[: point.rows])
            exports[point] = own.export(point.method, point.d).wall
            if (point.rank, point.rows) not in alone:
                alone[point.rank, point.rows] = the_pass(own).wall
        found.append(Times(exports, {each: alone[each.rank, each.rows] for each in points}))
        echo(f"round {number} of {rounds}: {sum((*exports.values(), *alone.values())):.0f} s")
    return found


# ---- slopes ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """Growth of seconds with a size: `start` is what the smallest size can't explain."""

    slope: float
    start: float


#: Least part of an export that is taken to be left beside its pass; what is measured can be less.
LEAST = 0.02


def fitted(
    claim: str, sizes: Sequence[int], seconds: Sequence[float], less: Sequence[float] | None = None
) -> Fit:
    """Fit start + b x^slope, or the slope of the logarithms to what shall be flat.

    Args:
        claim: "linear" or "flat".
        sizes: x, at least three.
        seconds: of each.
        less: what of each is not looked at. Errors stay those of `seconds`: of a small rest they
            are large.
    """
    x, t = np.asarray(sizes, dtype=np.float64) / sizes[0], np.asarray(seconds, dtype=np.float64)
    rest = t - (np.zeros_like(t) if less is None else np.asarray(less))
    if claim == "flat":
        log = np.log(np.maximum(rest, LEAST * t))
        return Fit(float(np.polyfit(np.log(x), log, 1)[0]), 0.0)
    best, found = np.inf, Fit(0.0, float(rest.mean()))  # where nothing grows
    for power in np.arange(0.05, 3, 0.005):
        design = np.stack([np.ones_like(t), x**power], axis=1) / t[:, None]
        (start, by), *_ = np.linalg.lstsq(design, rest / t)
        if start < 0:
            wanted = design[:, 1]
            start, by = 0.0, float(wanted @ (rest / t) / (wanted @ wanted))
        error = float(((design @ (start, by) - rest / t) ** 2).sum())
        if by > 0 and error < best:
            best, found = error, Fit(float(power), float(start))
    return found


def lines_of(factor: Factor, p: dict[int, int], times: Sequence[Times]) -> list[dict[str, Any]]:
    """Return a line for each point of a factor."""
    sizes = [factor.of(point, p) for point in factor.points]
    exports, passes = (
        [[each[point] for point in factor.points] for each in of]
        for of in ([each.exports for each in times], [each.passes for each in times])
    )
    fits = [
        fitted(factor.claim, sizes, export, alone if factor.rest else None)
        for export, alone in zip(exports, passes, strict=True)
    ]
    slopes = [fit.slope for fit in fits]
    growth = {
        "start_s": round(statistics.median(fit.start for fit in fits), 3),
        "slope": round(statistics.median(slopes), 3),
        "slope_min": round(min(slopes), 3),
        "slope_max": round(max(slopes), 3),
    }
    rounds = zip(zip(*exports, strict=True), zip(*passes, strict=True), strict=True)
    return [
        {
            "factor": factor.name, "projection": point.method, "claim": factor.claim,
            "size": size, "rows": point.rows, "rank": point.rank, "p": p[point.rank],
            "d": point.d, "rounds": len(of), "seconds": round(statistics.median(of), 3),
            "seconds_min": round(min(of), 3), "seconds_max": round(max(of), 3),
            "pass_s": round(statistics.median(alone), 3),
            "fitted": "rest" if factor.rest else "all", **growth, "limit": LIMITS[factor.claim],
        }
        for point, size, (of, alone) in zip(factor.points, sizes, rounds, strict=True)
    ]  # fmt: skip


def failed(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether time grows faster than claimed in every round, which noise alone does not."""
    return any(line["slope_min"] > line["limit"] for line in lines)


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
    lines = [line for factor in varied for line in lines_of(factor, p, times)]
    for line in lines:
        echo(", ".join(f"{key} {value}" for key, value in line.items()))
    where = machine()
    append(options.csv, [where | line for line in lines])
    return int(failed(lines))


if __name__ == "__main__":
    raise SystemExit(main())
