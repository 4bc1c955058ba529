"""LESS as published, row by row, through TRAK's projector.

    python published_less.py RUN NAME ROWS DIM scores|time

Each training row's gradient becomes Adam's step (LESS, section 3.1), 16 rows at a time go through
`trak.projectors.BasicProjector` in float16, as LESS's own code sets it; a row's score is the mean
of its cosines with the target rows' gradients. Writes NAME.json and NAME.npy, for the first ROWS
rows. With `time` only the pass over the training rows is made, and no scores.
"""

import sys
import time
from pathlib import Path

import torch
from exact import gradients
from paused import Paused, Row, load, result, trained
from torch import Tensor
from trak.projectors import BasicProjector, ProjectionType

BUFFER = 16


def projected(run: Paused, rows: list[Row], adam: bool, dim: int) -> Tensor:
    """(n, d) projected gradients, divided by their norms."""
    p = sum(each.numel() for each in trained(run.model).values())
    projector = BasicProjector(
        grad_dim=p, proj_dim=dim, seed=0, proj_type=ProjectionType.rademacher,
        device="cpu", dtype=torch.float16, block_size=128,
    )  # fmt: skip
    buffer: list[Tensor] = []
    found = []
    for count, g in enumerate(gradients(run, rows, adam), 1):
        buffer.append(g.half())
        if len(buffer) == BUFFER or count == len(rows):
            found.append(projector.project(torch.stack(buffer), model_id=0).float())
            buffer.clear()
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


def main(folder: Path, name: str, rows: int, dim: int, scored: bool) -> None:
    """Time the pass over the training rows."""
    run = load(folder, rows)
    start = time.perf_counter()
    train = projected(run, run.train, True, dim)
    seconds = time.perf_counter() - start
    scores = None
    if scored:
        target = projected(run, run.target, False, dim)
        scores = (train @ target.T).mean(dim=1)
    result(folder, name, scores, seconds=seconds, rows=rows, row_bytes=2 * dim)


if __name__ == "__main__":
    place, called, count, d, what = sys.argv[1:]
    main(Path(place), called, int(count), int(d), what == "scores")
