"""What projecting costs beside a float32 matrix product with a ready matrix (and TRAK's own code).

The blocks are those of SmolLM2-135M with LoRA r=16 on all linear layers, 14 a layer, added one by
one as the export does. A product with a ready matrix is what projecting cost if randomness and
memory were free: the whole matrix would take 80 GB, so a slice of it serves for all. Measured in
turns (A B A B), medians; seconds are per row of the whole gradient.

    python benchmarks/projection.py [--repeats 5] [--trak] [--device cuda]
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gradkernels import Accumulator, ProjectionSpec

HIDDEN, KEYS, INNER, RANK, LAYERS = 576, 192, 1536, 16, 30
# (inputs, outputs) of q, k, v, o, gate, up, down; each has an A (r x inputs) and a B (outputs x r).
SHAPES = (
    [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]
    + 2 * [(HIDDEN, INNER)]
    + [(INNER, HIDDEN)]
)
BLOCKS = [RANK * size for shape in SHAPES for size in shape]
P = LAYERS * sum(BLOCKS)  # 4,884,480
SLICE = 8192  # parameters of the ready matrix

# method, rows, d, layers that are really projected (the rest by proportion)
CASES = [
    ("sjlt", 1, 4096, 30),
    ("sjlt", 8, 4096, 30),
    ("sjlt", 16, 4096, 30),
    ("sjlt", 8, 8192, 30),
    ("rademacher", 8, 4096, 6),
    ("rademacher", 16, 4096, 6),
    ("rademacher", 64, 4096, 3),
    ("rademacher", 16, 8192, 3),
    ("gaussian", 16, 4096, 1),
]
# A GPU wants more rows at a time; TF32 is off, as for the projection.
GPU_CASES = [
    ("sjlt", 8, 4096, 30),
    ("sjlt", 64, 4096, 30),
    ("rademacher", 8, 4096, 30),
    ("rademacher", 64, 4096, 30),
    ("gaussian", 64, 4096, 6),
]
COLUMNS = [
    "date", "cpu", "cores", "threads", "load", "torch", "method", "p", "d", "rows",
    "seconds_per_row", "beside", "beside_seconds_per_row", "ratio",
]  # fmt: skip


def project_blocks(spec: ProjectionSpec, blocks: list[torch.Tensor]) -> torch.Tensor:
    """Project blocks (b, p_block), consecutive from parameter 0: (b, d)."""
    accumulator = Accumulator(spec, len(blocks[0]), device=blocks[0].device)
    start = 0
    for block in blocks:
        accumulator.add(block, start)
        start += block.shape[1]
    return accumulator.result()


def seconds(work: Callable[[], torch.Tensor]) -> float:
    """Time one call, to the end of the device's work, and look at its result."""
    wait()
    begin = time.perf_counter()
    out = work()
    wait()
    took = time.perf_counter() - begin
    if not out.isfinite().all() or not out.any():
        raise RuntimeError("the projection returned zeros or non-finite numbers")
    return took


def wait() -> None:
    """Wait for a GPU to finish, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    method: str, rows: int, d: int, layers: int, repeats: int, device: str
) -> tuple[float, float]:
    """Return median seconds per row and whole gradient: ours, and the ready matrix's."""
    spec = ProjectionSpec(method, p=P, d=d)  # type: ignore[arg-type]
    matrix = torch.randn(SLICE, d, device=device)
    ours, ready = [], []
    for turn in range(repeats + 1):
        blocks = [torch.randn(rows, size, device=device) for size in layers * BLOCKS]
        x = torch.randn(rows, SLICE, device=device)
        times = seconds(lambda: project_blocks(spec, blocks)), seconds(lambda: x @ matrix)  # noqa: B023
        if turn:  # the first turn warms up
            ours.append(times[0] * LAYERS / layers / rows)
            ready.append(times[1] * P / SLICE / rows)
    return statistics.median(ours), statistics.median(ready)


def measure_trak(params: int, rows: int, d: int) -> tuple[float, float]:
    """Return seconds per row of a gradient of `params`, by proportion for P: TRAK's, and ours."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        params, d, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu")
    )
    x = torch.randn(rows, params)
    spec = ProjectionSpec("rademacher", p=params, d=d)
    project_blocks(spec, [x])
    theirs = seconds(lambda: projector.project(x, model_id=0))
    ours = seconds(lambda: project_blocks(spec, [x]))
    return theirs / rows * P / params, ours / rows * P / params


def cpu_name() -> str:
    """Return the processor's name as the system gives it, with family and model on Linux."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    pairs = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs.items()}
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"


def main() -> None:
    """Print one table and append it to results/projection.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trak", action="store_true", help="also time TRAK's BasicProjector")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    chip = torch.cuda.get_device_name(args.device) if on_gpu else cpu_name()
    common = [
        time.strftime("%Y-%m-%d"), chip, os.cpu_count(), torch.get_num_threads(),
        round(os.getloadavg()[0], 1), torch.__version__,
    ]  # fmt: skip
    print(f"{common[1]}, {common[2]} cores, {common[3]} threads, torch {common[5]}; p = {P:,}")
    print(f"load of the machine before the start: {common[4]} (above 0.5, expect slower figures)")
    print(f"{'method':<12}{'d':>6}{'rows':>6}{'s/row':>12}{'beside s/row':>14}{'ratio':>9}  beside")
    results: list[tuple[str, int, int, float, float]] = [
        (method, d, rows, *measure(method, rows, d, layers, args.repeats, args.device))
        for method, rows, d, layers in (GPU_CASES if on_gpu else CASES)
    ]
    if args.trak:
        trak, ours = measure_trak(params=2000, rows=16, d=4096)
        results.append(("trak basic", 4096, 16, trak, ours))
    lines = []
    for method, d, rows, took, other in results:
        beside = "our rademacher" if method == "trak basic" else "ready matrix"
        print(
            f"{method:<12}{d:>6}{rows:>6}{took:>12.5f}{other:>14.4f}{took / other:>9.3f}  {beside}"
        )
        numbers = [f"{took:.6f}", beside, f"{other:.6f}", f"{took / other:.4f}"]
        lines.append([*common, method, P, d, rows, *numbers])
    target = Path(__file__).parent / "results" / "projection.csv"
    target.parent.mkdir(exist_ok=True)
    new = not target.exists()
    with target.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(([COLUMNS] if new else []) + lines)


if __name__ == "__main__":
    main()
