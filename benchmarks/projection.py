"""What projecting costs on a CPU, beside a copy of the gradients, sgemm, a stored matrix and TRAK.

    uv run python benchmarks/projection.py         # about nine minutes on two cores, 8 GB of memory

Gradients of p = 1 M, SmolLM2-135M's and Llama-3.1-8B's LoRA r=16 (4,884,480 and 41,943,040) to
d = 1,024, 4,096 and 8,192, 8 and 64 rows at a time, in one block of float32:

    sjlt, rademacher, gaussian   ours, the default backend; gaussian at one p and d
    rademacher, int8             ours, by products of bytes, where the processor has VNNI
    stored matrix                a float32 product with a matrix in memory, where 4 GiB hold it
    trak                         TRAK's `BasicProjector`, rademacher, in its blocks of 100 outputs
    copy                         `copy_` of the same gradients, b x p float32
    sgemm                        a float32 product of two square matrices of 3,072

All of a case take turns (A B C A B C), after a round that warms up. Milliseconds are per row of the
whole gradient. A call that would take longer than `--seconds`, or gradients of more than 1.5 GB,
are cut to the first `params` parameters, and the time is by proportion: the work of every method,
and of a copy, is so much for each parameter. `over_copy` and `of_sgemm` are medians over the
rounds, with the smallest and the largest. Operations are 2 p d a row of a dense projection,
whatever it really computes, and 8 p additions of an SJLT.

Prints a line for each and appends them to results/projection_cpu.csv. Exits 1 where `rademacher`
of 64 rows, p = 4,884,480, d = 4,096, is under 0.6 of sgemm's rate. SJLT has no limit: at 16 rows a
copy ought to take 0.6 of its time or more, or the table show what bounds it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gradkernels import Accumulator, ProjectionSpec
from gradkernels.cpu.vnni import vnni_missing
from gradkernels.dispatch import Backend
from gradkernels.spec import Method
from report import RESULTS, append, echo, machine, timed

SMALL, SMOLLM2, LLAMA3 = 1_000_000, 4_884_480, 41_943_040
LIMIT = 0.6
SIDE = 3072  # of sgemm's matrices
GRADIENT_BYTES = 1.5e9  # of a case's gradients, and again of their copy
MATRIX_BYTES = 2**32  # of a stored matrix
FEW, FEWER = 2**14, 2**9  # parameters that tell how long a call takes; TRAK is slow
SJLT_ENTRIES = 8


@dataclass(frozen=True)
class Case:
    """Length of a gradient, dimensions and rows."""

    p: int
    d: int
    rows: int

    @property
    def most(self) -> int:
        """Parameters whose gradients fit into `GRADIENT_BYTES`."""
        return min(self.p, int(GRADIENT_BYTES / 4 / self.rows))


CASES = [Case(p, d, b) for p in (SMALL, SMOLLM2, LLAMA3) for d in (1024, 4096, 8192)
         for b in (8, 64)]  # fmt: skip
CASES.append(Case(SMOLLM2, 4096, 16))
SLOW = (SMOLLM2, 4096)  # p and d of the Gaussian
LIMITED = Case(SMOLLM2, 4096, 64)

#: (b, params) -> (b, d) or, of a copy, (b, params).
Work = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Way:
    """What is timed.

    Attributes:
        method: name in the table.
        make: work on so many parameters; called anew for each number of them.
        probe: parameters of the call that tells how many `--seconds` allow; None takes them all.
        operations: of one row of p parameters; 0 counts none.
        is_dense: whether sgemm's rate is a yardstick.
    """

    method: str
    make: Callable[[int], Work]
    probe: int | None = FEW
    operations: float = 0
    is_dense: bool = True


# ---- ways ------------------------------------------------------------------------------------


def ours(method: Method, case: Case, params: int, backend: Backend | None = None) -> Work:
    """Project with these kernels."""
    spec = ProjectionSpec(method, p=case.p, d=case.d, s=SJLT_ENTRIES)

    def project(x: torch.Tensor) -> torch.Tensor:
        accumulator = Accumulator(spec, len(x), backend=backend)
        accumulator.add(x, 0)
        return accumulator.result()

    assert params <= spec.p
    return project


def trak(case: Case, params: int) -> Work:
    """Project with TRAK's portable projector."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        params, case.d, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu")
    )
    project: Work = partial(projector.project, model_id=0)
    return project


def stored(case: Case, params: int) -> Work:
    """Multiply with a matrix that was made before."""
    matrix = torch.empty(params, case.d).normal_()
    return lambda x: x @ matrix


def copy(case: Case, params: int) -> Work:
    """Copy the gradients into memory that was touched before."""
    target = torch.zeros(case.rows, params)
    return target.copy_


def ways_of(case: Case) -> list[Way]:
    """List what takes turns."""
    dense = 2.0 * case.p * case.d
    found = [
        Way("copy", partial(copy, case), probe=None, is_dense=False),
        Way("sjlt", partial(ours, "sjlt", case), operations=float(SJLT_ENTRIES * case.p),
            is_dense=False),
        Way("rademacher", partial(ours, "rademacher", case), operations=dense),
        Way("trak", partial(trak, case), FEWER, dense),
    ]  # fmt: skip
    if vnni_missing() is None:
        bytewise = partial(ours, "rademacher", case, backend="int8")
        found.append(Way("rademacher, int8", bytewise, operations=dense))
    if (case.p, case.d) == SLOW:
        found.append(Way("gaussian", partial(ours, "gaussian", case), operations=dense))
    if 4 * case.p * case.d <= MATRIX_BYTES:
        found.append(Way("stored matrix", partial(stored, case), None, dense))
    return found


# ---- measuring -------------------------------------------------------------------------------


def checked(work: Work, x: torch.Tensor) -> float:
    """Time one call and look at its result: seconds."""
    found: list[torch.Tensor] = []
    took = timed(lambda: found.append(work(x)))
    if not found[0].isfinite().all() or not found[0].any():
        sys.exit("a projection returned zeros or non-finite numbers")
    return took.wall


def affordable(case: Case, way: Way, gradients: torch.Tensor, seconds: float) -> int:
    """Return how many parameters a call may take: all, or as many as `seconds` allow."""
    if way.probe is None:
        return case.most
    few = min(way.probe, case.most)
    x, work = part(gradients, case, few), way.make(few)
    checked(work, x)  # compiles
    allowed = int(seconds * few / checked(work, x))
    return min(case.most, max(few, allowed // few * few))


def part(gradients: torch.Tensor, case: Case, params: int) -> torch.Tensor:
    """Return contiguous gradients (b, params)."""
    return gradients[: case.rows * params].view(case.rows, params)


def measure(
    case: Case, gradients: torch.Tensor, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Time every way of a case, and sgemm, in turns: a line each."""
    ways = ways_of(case)
    params = {way.method: affordable(case, way, gradients, seconds) for way in ways}
    works = {way.method: way.make(params[way.method]) for way in ways}
    parts = {name: part(gradients, case, count) for name, count in params.items()}
    square = gradients[: SIDE * SIDE].view(SIDE, SIDE)
    per_row: dict[str, list[float]] = {way.method: [] for way in ways}
    rates: list[float] = []
    for number in range(rounds + 1):
        for name, work in works.items():
            took = checked(work, parts[name]) * case.p / params[name] / case.rows
            if number:
                per_row[name].append(took)
        took = checked(lambda x: x @ x, square)
        if number:
            rates.append(2.0 * SIDE**3 / took)
    return [line_of(case, way, params[way.method], per_row, rates) for way in ways]


def line_of(
    case: Case, way: Way, params: int, per_row: dict[str, list[float]], rates: list[float]
) -> dict[str, Any]:
    """Return the columns of a way that was measured; `per_row` are seconds, `rates` FLOP/s."""
    mine = per_row[way.method]
    shares: Sequence[float] = [
        way.operations / took / rate for took, rate in zip(mine, rates, strict=True)
    ]
    return {
        "p": case.p, "d": case.d, "rows": case.rows, "method": way.method, "params": params,
        "rounds": len(mine),
        **spread("ms_per_row", [1e3 * took for took in mine]),
        **spread("over_copy", [a / b for a, b in zip(mine, per_row["copy"], strict=True)]),
        "gops": round(1e-9 * way.operations / statistics.median(mine), 2) if way.operations else "",
        "sgemm_gflops": round(1e-9 * statistics.median(rates), 1),
        **spread("of_sgemm", shares if way.is_dense else []),
    }  # fmt: skip


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the median, the smallest and the largest of some values; none are empty cells."""
    found = (statistics.median(values), min(values), max(values)) if values else ("", "", "")
    return {
        f"{name}{end}": round(value, 4) if isinstance(value, float) else value
        for end, value in zip(("", "_min", "_max"), found, strict=True)
    }


def main() -> int:
    """Print the lines, append them to the CSV; return 1 if the limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.5, help="of one call")
    parser.add_argument("--p", type=int, nargs="+", default=[SMALL, SMOLLM2, LLAMA3])
    parser.add_argument("--d", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--csv", type=Path, default=RESULTS / "projection_cpu.csv")
    options = parser.parse_args()
    cases = [case for case in CASES if case.p in options.p and case.d in options.d]
    most = max(SIDE * SIDE, *(case.rows * case.most for case in cases))
    gradients = torch.empty(most).normal_()
    why = vnni_missing()
    if why is not None:
        echo(f"rademacher, int8: not available, {why}")
    is_missed = False
    for case in cases:
        lines = measure(case, gradients, options.rounds, options.seconds)
        for line in lines:
            echo(", ".join(f"{key} {value}" for key, value in line.items()))
            if (case, line["method"]) == (LIMITED, "rademacher"):
                is_missed |= line["of_sgemm"] < LIMIT
        append(options.csv, [machine() | line for line in lines])
    return int(is_missed)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        raise SystemExit(main())
