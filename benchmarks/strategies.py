"""Every strategy at the same budget: held-out loss on the target, and mean over all skills.

    uv run python benchmarks/strategies.py                  # about an hour on two cores
    uv run python benchmarks/strategies.py --strategies static less --seeds 1

Runs the real command line on each strategy's own example YAML. All runs of a table train the same
number of steps at the same batch and learning rate, from the same seed's adapter; the seed decides
the adapter's start, warm-up rows and the strategy's draws. Two figures of each run, on rows that no
strategy sees: the loss on `tiny_target_heldout` (64 rows of the target's skill), and the mean over
the eight skills' held-out sets (`tiny_domain_<skill>_eval`).

The first table's runs train on 1,600 rows of 8 skills and 20% noise; `static` is LlamaFactory's own
training. The second's have the eight skills as domains; `mix: static` is uniform, and DoReMi is the
whole chain: reference, proxy, and the final run whose figures are given. The third's runs are one
pass over the 480 rows of `tiny_scored` each, in another order; `order: shuffle` is random.
Strategies that need a vision-language model or a mixture of experts (coincide, dynamic_moe) cannot
stand beside these.

Prints all three, appends to results/strategies.csv, and exits 1 unless LESS, ICONS, cluster_less
and NEAR are below random on the target for every seed, and ODM's and DoReMi's mean over seeds is at
or below the static mixture's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, append, echo, machine

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SKILLS = ("reverse", "sort", "add", "date", "convert", "vowels", "spell", "upper")
DOMAINS = ",".join(f"tiny_domain_{skill}" for skill in SKILLS)
HELD_OUT = ["tiny_target_heldout", *(f"tiny_domain_{skill}_eval" for skill in SKILLS)]
SAME = (
    "warmup_step=10", "update_step=10", "update_times=3", "per_device_train_batch_size=8",
    "gradient_accumulation_steps=1", "learning_rate=2.0e-3", "lr_scheduler_type=constant",
    "save_steps=1000", "logging_steps=10", "val_size=0", "report_to=none", "disable_tqdm=true",
    "overwrite_output_dir=true", "do_eval=true", "per_device_eval_batch_size=64",
    "eval_on_each_dataset=true", f"eval_dataset=[{','.join(HELD_OUT)}]",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One line of a table: whose example it is, and what is set beside it."""

    table: str
    example: str
    more: tuple[str, ...] = ()


ROWS: dict[str, Entry] = {
    "static": Entry("rows", "selectors/random", ("train_type=static", "max_steps=40")),
    **{
        name: Entry("rows", f"selectors/{name}", ("train_step=40",))
        for name in ("random", "loss", "delta_loss", "less", "icons", "cluster_less", "near",
                     "tsds", "nice", "rds_plus", "bm25", "online", "mirror", "landmarks")
    },
    **{
        f"weight: {name}": Entry("rows", f"weighters/{name}", ("train_step=40",))
        for name in ("loss", "adapt", "joint_update_aware")
    },
}  # fmt: skip
MIXED = ("train_step=40", f"dataset={DOMAINS}", "init_mixture_proportions=null")
UNIFORM = (*MIXED, "component_params.proportions=null")
MIXTURES: dict[str, Entry] = {
    "mix: static": Entry("mixtures", "mixers/static", UNIFORM),
    "mix: random": Entry("mixtures", "mixers/random", MIXED),
    "mix: odm": Entry("mixtures", "mixers/odm", MIXED),
    "mix: doremi": Entry("mixtures", "mixers/static", UNIFORM),
}
ORDERS: dict[str, Entry] = {
    f"order: {name}": Entry(
        "orders", f"reorders/{name}", ("train_step=60", "update_times=5", "dataset=tiny_scored")
    )
    for name in ("shuffle", "sorting", "folding", "zigzag", "segment", "stair", "saw",
                 "dynamic_sorting", "dynamic_folding")
}  # fmt: skip
ENTRIES = ROWS | MIXTURES | ORDERS


def train(config: Path, output_dir: Path, options: list[str]) -> tuple[dict[str, Any], float]:
    """One run of the command line; its all_results.json, and the processor seconds it took."""
    command = [str(Path(sys.executable).with_name("dataflex-cli")), "train", str(config)]
    command += [*SAME, *options, f"output_dir={output_dir}"]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
             "DISABLE_VERSION_CHECK": "1"}  # fmt: skip
    output_dir.mkdir(parents=True)
    with (output_dir / "screen.txt").open("w+", encoding="utf-8") as screen:
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | quiet, stdout=screen,
                                   stderr=subprocess.STDOUT)  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            screen.seek(0)
            raise SystemExit(
                f"{' '.join(command)} ended with {process.returncode}:\n{screen.read()[-3000:]}"
            )
    found = json.loads((output_dir / "all_results.json").read_text(encoding="utf-8"))
    return dict(found), used.ru_utime + used.ru_stime


def averaged_by_doremi(seed: int, folder: Path) -> tuple[list[str], float]:
    """Run reference and proxy.

    Returns:
        the overrides that set the final run's average mixture, and processor seconds.
    """
    reference, proxy = folder / "reference", folder / "proxy"
    static = EXAMPLES / "train_lora/mixers/static.yaml"
    _, before = train(static, reference, [*UNIFORM, f"seed={seed}"])
    chosen = [*MIXED, f"seed={seed}", "finetuning_type=lora", "lora_rank=16", "lora_target=all",
              f"component_params.reference_model_path={reference}"]  # fmt: skip
    dynamic = EXAMPLES / "train_full/mixers/doremi_step2_dynamic.yaml"
    _, between = train(dynamic, proxy, chosen)
    found = json.loads((proxy / "doremi_average_weights.json").read_text(encoding="utf-8"))
    average = found["average_weights"]
    mixture = [f"init_mixture_proportions={average}", f"component_params.proportions={average}"]
    return mixture, before + between


def run(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """One line of the result."""
    entry = ENTRIES[name]
    output_dir = folder / f"{name.replace(': ', '-')}-{seed}"
    options = [*entry.more, f"seed={seed}"]
    began, before = time.perf_counter(), 0.0
    if name == "mix: doremi":
        mixture, before = averaged_by_doremi(seed, output_dir)
        options += mixture
    config = EXAMPLES / f"train_lora/{entry.example}.yaml"
    found, last = train(config, output_dir / "run", options)
    skills = [float(found[f"eval_tiny_domain_{skill}_eval_loss"]) for skill in SKILLS]
    line = {
        "table": entry.table,
        "strategy": name,
        "seed": seed,
        "target_loss": round(float(found["eval_tiny_target_heldout_loss"]), 4),
        "mean_loss": round(statistics.mean(skills), 4),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_s": round(before + last, 1),
    }
    echo(", ".join(f"{key} {value}" for key, value in line.items()))
    return line


def show(lines: list[dict[str, Any]], seeds: list[int]) -> None:
    """Print a table for each, best first."""
    for table, figure in (("rows", "target_loss"), ("mixtures", "mean_loss"),
                          ("orders", "mean_loss")):  # fmt: skip
        names = {line["strategy"] for line in lines if line["table"] == table}
        if not names:
            continue
        echo(f"\n{table:26}{'target':>8}{'mean':>8}   {figure} by seed {seeds}")
        for name in sorted(names, key=lambda name: mean(lines, name, figure)):
            each = "  ".join(f"{v:.4f}" for v in values(lines, name, figure))
            echo(f"{name:26}{mean(lines, name, 'target_loss'):8.4f}"
                 f"{mean(lines, name, 'mean_loss'):8.4f}   {each}")  # fmt: skip


def values(lines: list[dict[str, Any]], name: str, figure: str) -> list[float]:
    """Collect a figure of one strategy, by seed."""
    found = [line for line in lines if line["strategy"] == name]
    return [line[figure] for line in sorted(found, key=lambda line: int(line["seed"]))]


def mean(lines: list[dict[str, Any]], name: str, figure: str) -> float:
    """Mean over seeds."""
    return statistics.mean(values(lines, name, figure))


def claims(lines: list[dict[str, Any]]) -> list[str]:
    """List claims of the README that these runs do not show."""
    known, missed = {line["strategy"] for line in lines}, []
    for name in ("less", "icons", "cluster_less", "near"):
        if {name, "random"} <= known:
            pairs = zip(values(lines, name, "target_loss"), values(lines, "random", "target_loss"),
                        strict=True)  # fmt: skip
            if not all(a < b for a, b in pairs):
                missed.append(f"{name} is not below random on the target for every seed")
    for name in ("mix: odm", "mix: doremi"):
        if {name, "mix: static"} <= known and mean(lines, name, "mean_loss") > mean(
            lines, "mix: static", "mean_loss"
        ):
            missed.append(f"{name} is above the static mixture's mean")
    return missed


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--strategies", nargs="+", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    parser.add_argument("--csv", type=Path, default=RESULTS / "strategies.csv")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="strategies-") as folder:
        work = [(name, seed) for name in options.strategies for seed in options.seeds]
        with ThreadPoolExecutor(options.jobs) as pool:
            lines = list(pool.map(lambda item: run(item[0], item[1], Path(folder)), work))
    show(lines, options.seeds)
    append(options.csv, [machine(threads=1) | line for line in lines])
    missed = claims(lines)
    for sentence in missed:
        echo(sentence)
    return int(bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
