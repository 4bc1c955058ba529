"""Held-out loss on the target after a LESS run, against random rows at the same budget.

    uv run python benchmarks/heldout_loss.py            # about eight minutes

Runs the real command line, `dataflex-cli train`, on `examples/train_lora/selectors/less.yaml` once
per strategy and seed. Only the strategy and the seeds differ: the same steps, batch, learning rate
and warm-up rows; the seed decides the adapter's start, the warm-up rows and the strategy's draws.
The figure is `eval_loss` on `tiny_target_heldout`: 64 rows of the target's skill that no strategy
sees. Beside it the share of chosen rows that have the target's skill. Prints one table, appends to
results/heldout_loss.csv, and exits 1 unless LESS is lower than random for every seed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from report import RESULTS, append, machine, tell

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "train_lora" / "selectors" / "less.yaml"
SKILLS_OF = ROOT / "examples" / "tiny" / "data" / "train.json"
TARGET_SKILL = "date"
#: Parameters of each strategy beside its seed; None: those that the file gives it.
STRATEGIES: dict[str, dict[str, Any] | None] = {"less": None, "random": {}, "loss": {}}


def run(strategy: str, seed: int, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """One training run in a process of its own."""
    content = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    own = STRATEGIES[strategy]
    params = dict(content["component_params"] if own is None else own) | {"seed": seed}
    output_dir = folder / f"{strategy}-{seed}"
    content |= {"component_name": strategy, "component_params": params, "seed": seed}
    path = folder / f"{strategy}-{seed}.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("dataflex-cli")), "train", str(path)]
    command += [f"output_dir={output_dir}", "disable_tqdm=true", *overrides]
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    results = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
    return {
        "strategy": strategy,
        "seed": seed,
        "eval_loss": round(float(results["eval_loss"]), 4),
        "train_loss": round(float(results["train_loss"]), 4),
        "chosen_of_skill": chosen_of_skill(output_dir),
        "seconds": round(seconds, 1),
    }


def environment() -> dict[str, str]:
    """No hub, no bars."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_VERSION_CHECK": "1",
    }


def chosen_of_skill(output_dir: Path) -> float:
    """Share of the target's skill among all rows that the updates chose."""
    skills = [row["skill"] for row in json.loads(SKILLS_OF.read_text(encoding="utf-8"))]
    paths = sorted((output_dir / "dataflex" / "selections").glob("step_*.json"))
    found = [i for path in paths for i in json.loads(path.read_text(encoding="utf-8"))["indices"]]
    return round(sum(bool(skills[i] == TARGET_SKILL) for i in found) / len(found), 4)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--csv", type=Path, default=RESULTS / "heldout_loss.csv")
    parser.add_argument("overrides", nargs="*", help="key=value for every run, as dataflex-cli's")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="heldout-loss-") as folder:
        for seed in options.seeds:
            for strategy in options.strategies:
                lines.append(run(strategy, seed, Path(folder), options.overrides))
                tell(", ".join(f"{key} {value}" for key, value in lines[-1].items()))
    tell(f"\n{'eval_loss':10}" + "".join(f"{f'seed {seed}':>10}" for seed in options.seeds))
    losses: dict[str, list[float]] = {}
    for strategy in options.strategies:
        losses[strategy] = [line["eval_loss"] for line in lines if line["strategy"] == strategy]
        tell(f"{strategy:10}" + "".join(f"{loss:>10.4f}" for loss in losses[strategy]))
    setting = " ".join(options.overrides)
    append(options.csv, [machine() | line | {"overrides": setting} for line in lines])
    if not {"less", "random"} <= set(losses):
        return 0
    lower = sum(a < b for a, b in zip(losses["less"], losses["random"], strict=True))
    tell(f"LESS is lower than random for {lower} of {len(options.seeds)} seeds")
    return int(lower < len(options.seeds))


if __name__ == "__main__":
    raise SystemExit(main())
