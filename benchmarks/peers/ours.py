"""Our own features and scores of a paused run, through `gradstore`'s public functions.

    python ours.py RUN NAME adapter FEATURE PROJECTION DIM
    python ours.py RUN NAME base FEATURE PROJECTION DIM

`base` takes the gradients of the linear layers below the adapter, DIM numbers for each of them: as
many as bergson keeps of each. Writes NAME.json and NAME.npy, the scores of all training rows, into
the folder RUN.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paused import linear_layers, load, load_base, result

import gradstore


def main(folder: Path, name: str, what: str, feature: str, projection: str, dim: int) -> None:
    """Time the export of the training rows into a store, and all that scores need apart."""
    run = load(folder)
    model: Any = run.model
    if what == "base":
        model = load_base(folder)
        dim *= len(linear_layers(model))
    moments = run.optimizer if feature != "sgd" else None
    with tempfile.TemporaryDirectory(prefix="ours-") as temporary:
        place = Path(temporary) / "store"

        def export(train: object, target: object, place: Path = place) -> float:
            start = time.perf_counter()
            gradstore.build(
                model, None, train, target, place, moments=moments, step=1,  # type: ignore[arg-type]
                gradient_type=feature, proj_method=projection, proj_dim=dim,
            )  # fmt: skip
            return time.perf_counter() - start

        export(run.train[:8], None, Path(temporary) / "first")  # loads and compiles what is needed
        seconds = export(run.train, None)
        start = time.perf_counter()
        export(None, {"target": run.target})
        store = gradstore.open_store(place)
        scores = gradstore.influence_scores(gradstore.checkpoint_features(store)).values
        everything = seconds + time.perf_counter() - start
        generation = store.generation("train/1")
        size = generation.bytes / generation.rows
    result(
        folder, name, scores, seconds=seconds, all_seconds=everything, rows=len(run.train),
        row_bytes=size, d=dim,
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:6], int(sys.argv[6]))
