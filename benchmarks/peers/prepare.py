"""Writes the paused run that every method is measured on: `paused.py`'s files, and bergson's rows.

python prepare.py RUN smollm2|tiny ROWS FEW
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import paused
import torch
from datasets import Dataset
from export_ratio import REAL, collate, load_rows, trained_model
from tinyrun import SKILLS, TinyRun
from transformers import AutoTokenizer

TARGET_ROWS = 8


def smollm2(folder: Path, rows: int) -> None:
    """Take SmolLM2-135M with LoRA r=16 on all linear layers two steps far; the target is random."""
    if not (REAL / "model" / "config.json").is_file():
        sys.exit("no examples/real/model: run `uv run python examples/real/prepare.py` first")
    torch.manual_seed(0)
    pool = load_rows(AutoTokenizer.from_pretrained(str(REAL / "model")), rows + TARGET_ROWS)
    # Rows that nothing is learnt from after the cut at 512 tokens have no gradient.
    pool = [row for row in pool if any(label != paused.IGNORED for label in row["labels"])]
    order = torch.randperm(len(pool)).tolist()
    target = [pool[i] for i in order[:TARGET_ROWS]]
    train = [pool[i] for i in order[TARGET_ROWS:]]
    model: Any = trained_model(torch.device("cpu"))
    optimizer = torch.optim.AdamW(paused.trained(model).values(), lr=2e-4)
    for start in (0, 4):
        model(**collate(train[start : start + 4]), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    paused.save(folder, model, optimizer, train=train, target=target)


def tiny(folder: Path, rows: int) -> None:
    """Take the embedded model ten steps far; the target is its first skill's."""
    run = TinyRun.start(1, folder / "run", targets=(f"tiny_target_{SKILLS[0]}",))
    run.train_to(10)
    train, target = (
        [{key: list(row[key]) for key in ("input_ids", "labels")} for row in each.dataset]
        for each in (run.data.train, run.data.targets[0])
    )
    paused.save(folder, run.model, run.optimizer, train=train[:rows], target=target[:TARGET_ROWS])


def for_bergson(folder: Path, few: int) -> None:
    """Write the rows once more, as bergson takes them."""
    run = paused.load(folder)
    for name, rows in (("all", run.train), ("few", run.train[:few]), ("queries", run.target)):
        columns = {key: [row[key] for row in rows] for key in ("input_ids", "labels")}
        Dataset.from_dict(columns).save_to_disk(str(folder / name))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    {"smollm2": smollm2, "tiny": tiny}[sys.argv[2]](place, int(sys.argv[3]))
    for_bergson(place, int(sys.argv[4]))
