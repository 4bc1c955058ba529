"""LESS as published, row by row, through TRAK's projector; and its scores without a projection.

    python published_less.py RUN NAME ROWS DIM scores|time

Each training row's gradient becomes Adam's step (LESS, section 3.1), 16 rows at a time go through
`trak.projectors.BasicProjector` in float16, as LESS's own code sets it; a row's score is the mean
of its cosines with the target rows' gradients. Writes NAME.json and NAME.npy, for the first ROWS
rows, and exact.npy: (n,) the same scores of all rows in float64, from the gradients themselves.
With `time` only the pass over the training rows is made, and exact.npy.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from paused import Paused, Row, collate, load, result, trained
from torch import Tensor
from trak.projectors import BasicProjector, ProjectionType

BUFFER = 16
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def gradients(run: Paused, rows: list[Row], adam: bool) -> Iterator[Tensor]:
    """Each row's (p,) gradient, or the step that Adam would take with it."""
    parameters = list(trained(run.model).values())
    states = [run.optimizer.state[p] for p in parameters]
    m, v = (torch.cat([s[key].flatten() for s in states]) for key in ("exp_avg", "exp_avg_sq"))
    for row in rows:
        run.model(**collate([row]), use_cache=False).loss.backward()
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        run.model.zero_grad()
        if adam:
            g = (BETA1 * m + (1 - BETA1) * g) / ((BETA2 * v + (1 - BETA2) * g**2).sqrt() + EPSILON)
        yield g


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


def exact(run: Paused) -> list[float]:
    """Scores of all training rows from whole gradients."""
    direction = torch.stack(
        [g.double() / g.double().norm() for g in gradients(run, run.target, adam=False)]
    ).mean(dim=0)
    return [
        float(g.double() @ direction / g.double().norm())
        for g in gradients(run, run.train, adam=True)
    ]


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
    result(folder, "exact", exact(load(folder)))


if __name__ == "__main__":
    place, called, count, d, what = sys.argv[1:]
    main(Path(place), called, int(count), int(d), what == "scores")
