"""What projecting costs beside a float32 matrix product with a ready matrix (and TRAK's own code).

The blocks are those of SmolLM2-135M with LoRA r=16 on all linear layers, 14 a layer, added one by
one as the export does. A product with a ready matrix is what projecting cost if randomness and
memory were free: the whole matrix would take 80 GB, so a slice of it serves for all. Measured in
turns (A B A B), medians; seconds are per row of the whole gradient.

    python benchmarks/projection.py [--repeats 5] [--trak] [--device cuda]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from gradkernels import Accumulator, ProjectionSpec
from report import RESULTS, Took, append, compared, echo, machine, timed

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

NAMES = ("seconds_per_row", "beside_seconds_per_row")

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


def project_blocks(spec: ProjectionSpec, blocks: list[torch.Tensor]) -> torch.Tensor:
    """Project blocks (b, p_block), consecutive from parameter 0: (b, d)."""
    accumulator = Accumulator(spec, len(blocks[0]), device=blocks[0].device)
    start = 0
    for block in blocks:
        accumulator.add(block, start)
        start += block.shape[1]
    return accumulator.result()


def took(work: Callable[[], torch.Tensor], scale: float) -> Took:
    """Time one call, to the end of the device's work, and look at its result.

    Args:
        work: projects.
        scale: seconds are multiplied by it: to those per row of a whole gradient.
    """
    found: list[torch.Tensor] = []
    time = timed(lambda: found.append(work()), wait)
    if not found[0].isfinite().all() or not found[0].any():
        raise RuntimeError("the projection returned zeros or non-finite numbers")
    return Took(time.wall * scale, time.cpu * scale)


def wait() -> None:
    """Wait for a GPU to finish, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    method: str, rows: int, d: int, layers: int, repeats: int, device: str
) -> dict[str, float | int]:
    """Time ours and the ready matrix's, per row of the whole gradient, in turns."""
    spec = ProjectionSpec(method, p=P, d=d)  # type: ignore[arg-type]
    matrix = torch.randn(SLICE, d, device=device)
    ours, ready = [], []
    for turn in range(repeats + 1):
        blocks = [torch.randn(rows, size, device=device) for size in layers * BLOCKS]
        x = torch.randn(rows, SLICE, device=device)
        times = (
            took(lambda: project_blocks(spec, blocks), LAYERS / layers / rows),  # noqa: B023
            took(lambda: x @ matrix, P / SLICE / rows),  # noqa: B023
        )
        if turn:  # the first turn warms up
            ours.append(times[0])
            ready.append(times[1])
    return compared(ours, ready, NAMES, digits=6)


def measure_trak(params: int, rows: int, d: int, repeats: int) -> dict[str, float | int]:
    """Time TRAK's projector and ours, per row of a gradient of `params`, by proportion for P."""
    from trak.projectors import BasicProjector, ProjectionType

    projector = BasicProjector(
        params, d, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu")
    )
    x = torch.randn(rows, params)
    spec = ProjectionSpec("rademacher", p=params, d=d)
    project_blocks(spec, [x])
    scale = P / params / rows
    theirs, ours = [], []
    for _ in range(repeats):
        theirs.append(took(lambda: projector.project(x, model_id=0), scale))
        ours.append(took(lambda: project_blocks(spec, [x]), scale))
    return compared(theirs, ours, NAMES, digits=6)


def main() -> None:
    """Print one table and append it to results/projection.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trak", action="store_true", help="also time TRAK's BasicProjector")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    on_gpu = args.device != "cpu"
    where = machine(chip=torch.cuda.get_device_name(args.device) if on_gpu else None)
    echo(f"{where['chip'] or where['cpu']}, {where['threads']} threads, torch {where['torch']}; "
         f"p = {P:,}; load before the start {where['load']}")  # fmt: skip
    found = [
        (method, d, rows, "ready matrix", measure(method, rows, d, layers, args.repeats,
                                                  args.device))
        for method, rows, d, layers in (GPU_CASES if on_gpu else CASES)
    ]  # fmt: skip
    if args.trak:
        trak = measure_trak(params=2000, rows=16, d=4096, repeats=args.repeats)
        found.append(("trak basic", 4096, 16, "our rademacher", trak))
    echo(f"{'method':<12}{'d':>6}{'rows':>6}{'s/row':>12}{'beside s/row':>14}{'ratio':>9}  beside")
    lines = []
    for method, d, rows, beside, times in found:
        ours, other = times["seconds_per_row_s"], times["beside_seconds_per_row_s"]
        echo(f"{method:<12}{d:>6}{rows:>6}{ours:>12.5f}{other:>14.4f}{times['ratio']:>9.3f}  "
             f"{beside}")  # fmt: skip
        named = {key.removesuffix("_s"): value for key, value in times.items()}
        case = {"method": method, "p": P, "d": d, "rows": rows, "beside": beside}
        lines.append(where | case | named)
    append(RESULTS / "projection.csv", lines)


if __name__ == "__main__":
    main()
