"""LESS of PyPI's `dataflex` 1.1.0, called as its trainer calls it; its own Python runs this.

    python dataflex_less.py RUN NAME ROWS DIM scores|time

Writes NAME.json and NAME.npy, the scores of the first ROWS training rows, into the folder RUN; with
`time` only the pass over the training rows is made, and no scores.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from dataflex.train.selector.less_selector import LessSelector
from paused import collate, load, result


def main(folder: Path, name: str, rows: int, dim: int, scored: bool) -> None:
    """Time the pass over the training rows, its projections and files included."""
    run = load(folder, rows)
    state = run.optimizer.state
    with tempfile.TemporaryDirectory(prefix="peer-") as cache:
        selector = LessSelector(
            run.train, run.target, Accelerator(cpu=True), collate, cache, proj_dim=dim
        )
        plain = selector._collect_and_save_projected_gradients
        passes = []

        def timed(*arguments: object) -> None:
            start = time.perf_counter()
            plain(*arguments)
            passes.append(time.perf_counter() - start)

        if not scored:
            timed(run.model, cache, run.train, "adam", state)
            result(folder, name, seconds=passes[0], rows=rows, row_bytes=4 * dim)
            return
        selector._collect_and_save_projected_gradients = timed
        selector.select(run.model, 1, rows, optimizer_state=state)
        train, target = (
            torch.load(Path(cache) / part / "1" / "all_projected_grads.pt", weights_only=True)
            for part in ("train", "eval")
        )
    scores = (train @ target.T).mean(dim=1)
    result(folder, name, scores, seconds=passes[0], rows=rows, row_bytes=train[0].nbytes)


if __name__ == "__main__":
    place, called, count, d, what = sys.argv[1:]
    main(Path(place), called, int(count), int(d), what == "scores")
