"""bergson's scores of a paused run: its own command line on the same weights and the same tokens.

Its package needs other versions than ours may have, so it runs with a Python of its own:

    uv venv --python 3.11 .bergson && uv pip install --python .bergson bergson==2.5.1
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from tinyrun import TinyRun

from dataflex.data.rows import Rows

Floats = npt.NDArray[np.float64]

#: A method -> the command, with the options that have no default or would average the queries.
COMMANDS: dict[str, tuple[str, ...]] = {
    "bergson trackstar": ("trackstar",),
    "bergson trak": (
        "trak", "--loss_fn", "log_odds", "--projection_target", "global",
        "--projection_dim", "4096",
    ),
    "bergson ekfac": ("ekfac", "--method", "kfac", "--hessian_cfg.ev_correction", "true"),
}  # fmt: skip


class Bergson:
    """bergson on one run.

    Args:
        python: interpreter that has bergson.
        tokens: of a padded batch, at most.
    """

    def __init__(self, python: Path, tokens: int) -> None:
        self.python, self.tokens = python, tokens

    def scores(self, method: str, run: TinyRun, queries: list[Rows]) -> list[Floats]:
        """(q, n) scores of the training rows for the rows of each query set, from one run.

        Raises:
            RuntimeError: bergson failed; with the end of what it printed.
        """
        with tempfile.TemporaryDirectory(prefix="bergson-") as temporary:
            folder = Path(temporary)
            run.model.save_pretrained(folder / "adapter")
            _tokens([run.data.train]).save_to_disk(folder / "train")
            _tokens(queries).save_to_disk(folder / "queries")
            command, *options = COMMANDS[method]
            base = run.model.peft_config["default"].base_model_name_or_path
            ran = subprocess.run(
                [self.python, "-m", "bergson", command, folder / "out", *options,
                 "--model", folder / "adapter", "--tokenizer", base,
                 "--token_batch_size", str(self.tokens), "--data.dataset", folder / "train",
                 "--query.dataset", folder / "queries", "--query.aggregation", "none"],
                capture_output=True, text=True, check=False, cwd=folder,
            )  # fmt: skip
            if ran.returncode:
                raise RuntimeError(f"{method} failed:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
            found = _read(folder / "out" / "scores")
        return np.split(found, np.cumsum([len(rows) for rows in queries])[:-1])


def _tokens(sets: list[Rows]) -> Dataset:
    """Gather rows as bergson takes them: token ids, and labels where a token is learnt."""
    rows = [row for each in sets for row in each.dataset]
    return Dataset.from_dict({key: [row[key] for row in rows] for key in ("input_ids", "labels")})


def _read(folder: Path) -> Floats:
    """Read a store of scores: one record a training row, with a field for each query."""
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    records = np.fromfile(folder / "scores.bin", dtype=np.dtype(info["dtype"]))
    fields = [f"score_{query}" for query in range(info["num_scores"])]
    return np.stack([records[name] for name in fields]).astype(np.float64)
