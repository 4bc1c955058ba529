"""What a GPU is for, part by part: projections, features in the kernels, rotations, an 8B export.

    python benchmarks/gpu.py                            # all parts, meant for eight minutes
    python benchmarks/gpu.py --parts features export    # some of them

*kernels*: the Triton kernels beside plain torch on gradients of LoRA r=16 on all linear layers:
SmolLM2-135M (p = 4,884,480) and Llama-3.1-8B (p = 41,943,040), in one block, as the export gathers
them. Measured in turns (A B A B) on fresh numbers; the paths of plain torch project a slice, their
times are by proportion. A FLOP/s counts 2 p d a row, whatever a path really multiplies; bytes are
those of the gradients, read once. The peaks are a bfloat16 matrix product and a copy in the same
run. `apart` is the distance of the Triton features from plain torch's on the slice, beside a row's
norm, the largest.

*features*: the same on the default's way, where the kernels make adam_marginal features and their
norms as they read gradients; plain torch makes them first.

*rotation*: of 256 queries of a 1bit store; on the card, from and to the host, and on the processor.

*export*: `export_ratio.py` at the shape of Llama-3.1-8B with random weights in bfloat16, 32 rows of
512 tokens: an export over a plain forward and backward.

Appends lines to results/gpu.csv after each part, with its name in `part` ("kernels" where a line
has none).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import export_ratio
import numpy as np
import torch
from gradkernels import Accumulator, ProjectionSpec
from gradkernels.dispatch import Backend
from gradkernels.features import Feature
from gradkernels.rotation import SEED, rotate
from gradkernels.spec import Method
from report import RESULTS, append, echo, machine, timed

SMOLLM2, LLAMA3 = 4_884_480, 41_943_040
SLICE = 2**19  # parameters that the slower paths project
SIDE = 8192  # of the matrices whose product stands for the peak
COPIED = 2**30  # bytes
ROTATED_ROWS = 256


@dataclass(frozen=True)
class Case:
    """A gradient's length, dimensions, rows and type."""

    p: int
    d: int
    rows: int
    dtype: torch.dtype = torch.float32


CASES = [Case(p, d, rows) for p in (SMOLLM2, LLAMA3) for d in (4096, 8192) for rows in (16, 64)]
CASES.append(Case(LLAMA3, 8192, 64, torch.bfloat16))

FEATURE_CASES = [Case(SMOLLM2, 4096, 64), Case(LLAMA3, 4096, 64), Case(LLAMA3, 8192, 64),
                 Case(LLAMA3, 8192, 64, torch.bfloat16)]  # fmt: skip
ROTATED_DIMS = (4096, 8192)


@dataclass(frozen=True)
class Session:
    """What the parts are measured with.

    Attributes:
        device: a CUDA device.
        repeats: turns of each way.
        pairs: of exports and plain passes.
        layers: of the 8B shape; fewer where memory does not hold it.
        peak: FLOP/s of a matrix product, bytes a second of a copy.
    """

    device: str
    repeats: int
    pairs: int
    layers: int
    peak: tuple[float, float]


@dataclass(frozen=True)
class Way:
    """A way to project, and how many parameters it is given."""

    method: Method
    backend: Backend
    params: int

    def project(self, case: Case, x: torch.Tensor, feature: Feature | None = None) -> torch.Tensor:
        """Project the first parameters of x (b, p), or features of them: (b, d)."""
        spec = ProjectionSpec(self.method, p=case.p, d=case.d)
        accumulator = Accumulator(spec, case.rows, device=x.device, backend=self.backend,
                                  squares=feature is not None)  # fmt: skip
        own = None if feature is None else feature.part(0, self.params)
        accumulator.add(x[:, : self.params], 0, own)
        if feature is not None:
            accumulator.squares()  # the norms that an export stores
        return accumulator.result()


def ways_of(case: Case) -> list[Way]:
    """List what is measured in turns."""
    return [
        Way("rademacher", "triton", case.p),
        Way("rademacher", "torch", SLICE),
        Way("sjlt", "triton", case.p),
        Way("sjlt", "torch", SLICE),
    ]


def feature_of(params: int, device: str) -> Feature:
    """Make adam_marginal's vectors of moments like those of a real run."""
    base = torch.rand(params, device=device) + 0.5
    still = base.sqrt()
    pull = torch.randn(params, device=device) * 0.1 / still
    return Feature("adam_marginal", base=base, still=still, pull=pull, curve=1e-3)


def synchronize() -> None:
    """Wait for the device, so that the clock sees finished work."""
    torch.cuda.synchronize()


def measure(
    case: Case, ways: list[Way], session: Session, feature: Feature | None
) -> dict[Way, list[float]]:
    """Time every way, in turns, after a turn that warms up: seconds per row of a whole gradient."""
    found: dict[Way, list[float]] = {way: [] for way in ways}
    x = torch.empty(case.rows, case.p, dtype=case.dtype, device=session.device)
    for turn in range(session.repeats + 1):
        x.normal_()
        for way in ways:
            outs: list[torch.Tensor] = []
            took = timed(lambda: outs.append(way.project(case, x, feature)), synchronize)  # noqa: B023
            check(f"{way} of {case}", outs[0])
            if turn:
                found[way].append(took.wall * case.p / way.params / case.rows)
    return found


def check(what: str, out: torch.Tensor) -> None:
    """End the script where a result can't be one."""
    if not out.isfinite().all() or not out.any(dim=1).all():
        sys.exit(f"{what} returned zeros or non-finite numbers")


def apart(case: Case, session: Session, feature: Feature | None) -> float:
    """Compare Triton's features with plain torch's on a slice: the largest relative distance."""
    x = torch.randn(case.rows, SLICE, device=session.device).to(case.dtype)
    ours, plain = (
        Way("rademacher", backend, SLICE).project(case, x, feature).double()
        for backend in ("triton", "torch")
    )
    return float(((ours - plain).norm(dim=1) / plain.norm(dim=1)).max())


def rate(work: Callable[[], object], amount: float, repeats: int) -> float:
    """Return amount per second of a work, the median after a warm-up."""
    timed(work, synchronize)
    return amount / statistics.median(timed(work, synchronize).wall for _ in range(repeats))


def peaks(device: str) -> tuple[float, float]:
    """Measure the card: FLOP/s of a bfloat16 matrix product, bytes read and written by a copy."""
    a, b = (torch.randn(SIDE, SIDE, device=device).bfloat16() for _ in range(2))
    product = rate(partial(torch.mm, a, b), 2.0 * SIDE**3, 9)
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    return product, rate(partial(torch.empty_like(source).copy_, source), 2.0 * COPIED, 9)


def line_of(
    case: Case, way: Way, seconds: list[float], peak: tuple[float, float]
) -> dict[str, Any]:
    """Return the columns of a way that was measured."""
    median = statistics.median(seconds)
    flops = 2 * case.p * case.d / median
    bytes_read = case.p * case.dtype.itemsize / median
    return {
        "method": way.method,
        "backend": way.backend,
        "dtype": str(case.dtype).removeprefix("torch."),
        "p": case.p,
        "d": case.d,
        "rows": case.rows,
        "params_projected": way.params,
        "ms_per_row": round(1e3 * median, 4),
        "ms_min": round(1e3 * min(seconds), 4),
        "ms_max": round(1e3 * max(seconds), 4),
        "turns": len(seconds),
        "tflops": round(flops / 1e12, 2) if way.method == "rademacher" else "",
        "of_peak": round(flops / peak[0], 4) if way.method == "rademacher" else "",
        "gb_per_s": round(bytes_read / 1e9, 2),
        "of_copy": round(bytes_read / peak[1], 4),
        "peak_tflops": round(peak[0] / 1e12, 1),
        "copy_gb_per_s": round(peak[1] / 1e9, 1),
    }


# ---- parts -----------------------------------------------------------------------------------

Lines = list[dict[str, Any]]


def projections(session: Session, cases: list[Case], featured: bool) -> Lines:
    """Measure the cases, of gradients or of features that are made on the way."""
    found: Lines = []
    for case in cases:
        feature = feature_of(case.p, session.device) if featured else None
        distance = apart(case, session, feature)
        times = measure(case, ways_of(case), session, feature)
        lines = [line_of(case, way, seconds, session.peak) for way, seconds in times.items()]
        for line in lines:
            line["apart"] = ""
            spread = f"{line['ms_min']:.4f}-{line['ms_max']:.4f}"
            echo(f"{case.p:>11,}{case.d:>6}{case.rows:>5} {line['dtype']:<9}{line['method']:<11}"
                 f"{line['backend']:<7}{line['ms_per_row']:>9.4f} ms a row{spread:>19}"
                 f"{line['of_peak']:>8} of peak{line['of_copy']:>8} of a copy")  # fmt: skip
        lines[0]["apart"] = f"{distance:.2e}"
        found += lines
    return found


def rotations(session: Session) -> Lines:
    """Measure rotating queries on the card and on the processor."""
    from gradkernels.gpu.rotation import rotated

    found: Lines = []
    for d in ROTATED_DIMS:
        x = torch.randn(ROTATED_ROWS, d, device=session.device)
        host: np.ndarray = x.cpu().numpy()
        works: dict[str, Callable[[], object]] = {
            "triton": partial(rotated, x, SEED),
            "triton from the host": partial(rotate, host, SEED, torch.device(session.device)),
            "cpu": partial(rotate, host),
        }
        for backend, work in works.items():
            times = [timed(work, synchronize).wall for _ in range(session.repeats + 1)][1:]
            times = [took / ROTATED_ROWS for took in times]
            found.append({
                "method": "rotation", "backend": backend, "dtype": "float32", "d": d,
                "rows": ROTATED_ROWS, "ms_per_row": round(1e3 * statistics.median(times), 5),
                "ms_min": round(1e3 * min(times), 5), "ms_max": round(1e3 * max(times), 5),
                "turns": len(times),
            })  # fmt: skip
            echo(f"rotation of {ROTATED_ROWS} x {d:,} by {backend}: "
                 f"{found[-1]['ms_per_row']} ms a row")  # fmt: skip
    return found


def exports(session: Session) -> Lines:
    """Measure an export over a plain pass at the shape of an 8B model."""
    torch.manual_seed(0)
    device = torch.device(session.device)
    model = export_ratio.trained_model(device, layers=session.layers)
    bench = export_ratio.Bench(model, export_ratio.random_rows(32), 8192, device)
    lines = export_ratio.large_lines(bench, 4096, session.pairs, session.layers)
    return [line | {"method": line["projection"], "dtype": "bfloat16"} for line in lines]


PARTS: dict[str, Callable[[Session], Lines]] = {
    "kernels": lambda session: projections(session, CASES, featured=False),
    "features": lambda session: projections(session, FEATURE_CASES, featured=True),
    "rotation": rotations,
    "export": exports,
}


def main() -> None:
    """Measure the parts, append each to results/gpu.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=3, help="of exports and plain passes")
    parser.add_argument("--layers", type=int, default=export_ratio.LLAMA_8B_LAYERS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, default=RESULTS / "gpu.csv", help="appended to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this measures one")
    where = machine(chip=torch.cuda.get_device_name(options.device))
    peak = peaks(options.device)
    echo(f"{where['chip']}, torch {where['torch']}: {peak[0] / 1e12:.0f} TFLOP/s in bfloat16, "
         f"a copy reads and writes {peak[1] / 1e12:.2f} TB/s")  # fmt: skip
    session = Session(options.device, options.repeats, options.pairs, options.layers, peak)
    for part in options.parts:
        start = time.perf_counter()
        lines = PARTS[part](session)
        append(options.csv, [where | {"part": part} | line for line in lines])
        echo(f"{part}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
