"""What projecting costs on a GPU: the Triton kernels, plain torch and SJLT, beside the card's peak.

    python benchmarks/gpu.py [--repeats 5]

Gradients of LoRA r=16 on all linear layers: SmolLM2-135M (p = 4,884,480) and Llama-3.1-8B
(p = 41,943,040), in one block, as the export gathers them. Measured in turns (A B A B) on fresh
numbers; the paths of plain torch project a slice, their times are by proportion. A FLOP/s counts
2 p d a row, whatever a path really multiplies; bytes are those of the gradients, read once. The
peaks are a bfloat16 matrix product and a copy in the same run. `apart` is the distance of the
Triton features from plain torch's on the slice, beside a row's norm, the largest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gradkernels import Accumulator, ProjectionSpec
from gradkernels.dispatch import Backend
from gradkernels.spec import Method
from report import RESULTS, append, echo, machine, timed

SMOLLM2, LLAMA3 = 4_884_480, 41_943_040
SLICE = 2**19  # parameters that the slower paths project
SIDE = 8192  # of the matrices whose product stands for the peak
COPIED = 2**30  # bytes


@dataclass(frozen=True)
class Case:
    """A gradient's length, dimensions, rows and type."""

    p: int
    d: int
    rows: int
    dtype: torch.dtype = torch.float32


CASES = [Case(p, d, rows) for p in (SMOLLM2, LLAMA3) for d in (4096, 8192) for rows in (16, 64)]
CASES.append(Case(LLAMA3, 8192, 64, torch.bfloat16))


@dataclass(frozen=True)
class Way:
    """A way to project, and how many parameters it is given."""

    method: Method
    backend: Backend
    params: int

    def project(self, case: Case, x: torch.Tensor) -> torch.Tensor:
        """Project the first parameters of x (b, p): (b, d)."""
        spec = ProjectionSpec(self.method, p=case.p, d=case.d)
        accumulator = Accumulator(spec, case.rows, device=x.device, backend=self.backend)
        accumulator.add(x[:, : self.params], 0)
        return accumulator.result()


def ways_of(case: Case) -> list[Way]:
    """List what is measured in turns."""
    return [
        Way("rademacher", "triton", case.p),
        Way("rademacher", "torch", SLICE),
        Way("sjlt", "triton", case.p),
        Way("sjlt", "torch", SLICE),
    ]


def synchronize() -> None:
    """Wait for the device, so that the clock sees finished work."""
    torch.cuda.synchronize()


def measure(case: Case, ways: list[Way], repeats: int, device: str) -> dict[Way, list[float]]:
    """Time every way, in turns, after a turn that warms up: seconds per row of a whole gradient."""
    found: dict[Way, list[float]] = {way: [] for way in ways}
    x = torch.empty(case.rows, case.p, dtype=case.dtype, device=device)
    for turn in range(repeats + 1):
        x.normal_()
        for way in ways:
            outs: list[torch.Tensor] = []
            took = timed(lambda: outs.append(way.project(case, x)), synchronize)  # noqa: B023
            if not outs[0].isfinite().all() or not outs[0].any(dim=1).all():
                sys.exit(f"{way} of {case} returned zeros or non-finite numbers")
            if turn:
                found[way].append(took.wall * case.p / way.params / case.rows)
    return found


def apart(case: Case, device: str) -> float:
    """Compare Triton's features with plain torch's on a slice: the largest relative distance."""
    x = torch.randn(case.rows, SLICE, device=device).to(case.dtype)
    ours = Way("rademacher", "triton", SLICE).project(case, x).double()
    plain = Way("rademacher", "torch", SLICE).project(case, x).double()
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


def main() -> None:
    """Print one table and append it to results/gpu.csv."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--csv", type=Path, default=RESULTS / "gpu.csv", help="appended to")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this measures one")
    where = machine(chip=torch.cuda.get_device_name(options.device))
    peak = peaks(options.device)
    echo(f"{where['chip']}, torch {where['torch']}: {peak[0] / 1e12:.0f} TFLOP/s in bfloat16, "
         f"a copy reads and writes {peak[1] / 1e12:.2f} TB/s")  # fmt: skip
    echo(f"{'p':>11}{'d':>6}{'rows':>5} {'type':<9}{'method':<11}{'by':<7}{'ms/row':>9}"
         f"{'spread':>19}{'TFLOP/s':>9}{'of peak':>8}{'GB/s':>9}{'apart':>9}")  # fmt: skip
    for case in CASES:
        distance = apart(case, options.device)
        found = measure(case, ways_of(case), options.repeats, options.device)
        lines = [line_of(case, way, seconds, peak) for way, seconds in found.items()]
        lines[0]["apart"] = f"{distance:.2e}"
        for line in lines:
            spread = f"{line['ms_min']:.4f}-{line['ms_max']:.4f}"
            echo(f"{case.p:>11,}{case.d:>6}{case.rows:>5} {line['dtype']:<9}{line['method']:<11}"
                 f"{line['backend']:<7}{line['ms_per_row']:>9.4f}{spread:>19}{line['tflops']:>9}"
                 f"{line['of_peak']:>8}{line['gb_per_s']:>9}"
                 f"{line.get('apart', ''):>9}")  # fmt: skip
        append(options.csv, [where | line for line in lines])


if __name__ == "__main__":
    main()
