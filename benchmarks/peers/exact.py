"""LESS's scores from whole gradients in float64: what every method's scores are compared with.

    python exact.py RUN

A row's score is the mean of the cosines of the step that Adam would take with its gradient (LESS,
section 3.1) and the target rows' gradients, without a projection. Writes exact.npy into the folder
RUN: (n,) of all training rows. Passes are float32, as everybody's; rows come one by one, so that
memory is that of a few gradients.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from paused import Paused, Row, collate, load, trained
from torch import Tensor

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def gradients(
    run: Paused, rows: list[Row], adam: bool, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """Each row's (p,) gradient, or the step that Adam would take with it."""
    parameters = list(trained(run.model).values())
    states = [run.optimizer.state[p] for p in parameters]
    m, v = (
        torch.cat([s[key].flatten() for s in states]).to(dtype) for key in ("exp_avg", "exp_avg_sq")
    )
    for row in rows:
        run.model(**collate([row]), use_cache=False).loss.backward()
        g = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).to(dtype)
        run.model.zero_grad()
        if adam:
            g = (BETA1 * m + (1 - BETA1) * g) / ((BETA2 * v + (1 - BETA2) * g**2).sqrt() + EPSILON)
        yield g


def exact(run: Paused) -> list[float]:
    """Scores of all training rows: the mean of cosines is a product with the mean direction."""
    direction = torch.zeros((), dtype=torch.float64)
    for g in gradients(run, run.target, adam=False, dtype=torch.float64):
        direction = direction + g / g.norm() / len(run.target)
    return [
        float(g @ direction / g.norm())
        for g in gradients(run, run.train, adam=True, dtype=torch.float64)
    ]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    np.save(place / "exact.npy", np.asarray(exact(load(place)), dtype=np.float64))
