"""What choosing at every step costs: a step of `online` over a plain step of as many rows.

    uv run python benchmarks/online_cost.py             # about ten minutes

transformers' Trainer, plain and with `dynamic_select`'s seam, update_step 1 and the online
selector, at 2 and 4 candidates for each row chosen. Its looks at the target rows are left out: the
first is in a step that is not counted, and they come every `target_interval` steps. Runs alternate
A B A B in one process; a step's time is the median over all of them. Beside it the passes alone,
over the candidates of one step: plain forward and backward, the same with frozen weights and rows'
gradients made (`capture`), and with their products (`products`). Prints a line for each and appends
to results/online_cost.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import RESULTS, Took, append, compared, echo, machine, timed
from transformers import Trainer, TrainingArguments
from weighting_cost import BATCH, Clock
from workloads import Workload, llama, tiny

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.data.rows import Rows
from dataflex.run.ranks import Ranks
from dataflex.selectors.online import OnlineSelector
from dataflex.trainers.job import Job, Run
from dataflex.trainers.seam import trainer_class
from dataflex.trainers.select import SelectSeam
from gradstore.capture.per_sample import GradientCapture
from gradstore.capture.products import row_products


def with_target(workload: Workload) -> Workload:
    """Take 8 of the training rows for a target set."""
    target = Rows("target", workload.data.train.dataset.select(range(8)))
    return replace(workload, data=replace(workload.data, targets=(target,)))


def trainer(workload: Workload, steps: int, folder: Path, candidates: int) -> tuple[Any, Clock]:
    """Build a trainer that takes `steps` steps per call of `train`; plain at 0 candidates."""
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=steps,
        learning_rate=1e-4, report_to="none", logging_steps=steps, save_strategy="no",
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    kind: Any = Trainer
    if candidates:
        selector = OnlineSelector(candidates=candidates, target_interval=10**6)
        ours = DataFlexConfig(train_type="dynamic_select", warmup_step=0, update_step=1,
                              update_times=0, train_step=steps, store_text=False)  # fmt: skip
        config = RunConfig(ours, {"output_dir": str(folder)}, folder / "run.yaml")
        component = Component("selector", "online", OnlineSelector, {})
        job = Job(config, component, selector, workload.data, arguments,
                  BatchShape.of(arguments), Ranks())  # fmt: skip
        run = Run(**vars(job), schedule=SelectSeam.plan(job), run_id="benchmark")
        kind = trainer_class(SelectSeam, Trainer, run)
    made = kind(
        model=workload.model, args=arguments, train_dataset=workload.data.train.dataset,
        data_collator=workload.collate, callbacks=[clock],
    )  # fmt: skip
    return made, clock


def steps_of(
    workload: Workload, candidates: int, steps: int, rounds: int, folder: Path
) -> dict[str, object]:
    """Time a step, plain and online: the median of each round's steps."""
    pair = [trainer(workload, steps, folder, c) for c in (candidates, 0)]
    times: tuple[list[Took], list[Took]] = ([], [])
    for number in range(rounds + 1):
        for (made, clock), taken in zip(pair, times, strict=True):
            made.train()
            took = clock.median()
            if number:  # the first round warms up
                taken.append(took)
    return {"what": "step", "steps": rounds * (steps - 1),
            **compared(times[0], times[1], ("ours", "beside"), digits=4)}  # fmt: skip


def passes_of(workload: Workload, candidates: int, rounds: int) -> list[dict[str, object]]:
    """Time the passes over one step's candidates, each beside the pass it adds to."""
    model, rows = workload.model, workload.data.train
    order = np.random.default_rng(0).permutation(len(rows))[: candidates * BATCH]
    batch = workload.collate([rows.dataset[int(i)] for i in order])
    capture = GradientCapture(model)
    direction = torch.randn(capture.p)

    def plain() -> None:
        model.eval()
        model(**batch).loss.backward()
        model.zero_grad()

    def captured() -> None:
        with capture:
            capture.capture(batch, lambda slot, block: None)

    def multiplied() -> None:
        with capture:
            row_products(capture, [batch], direction)

    works = {"plain": plain, "capture": captured, "products": multiplied}
    times: dict[str, list[Took]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            took = timed(work)
            if number:
                times[name].append(took)
    return [
        {"what": f"{name} over {beside}",
         **compared(times[name], times[beside], ("ours", "beside"), digits=4)}
        for name, beside in (("capture", "plain"), ("products", "plain"), ("products", "capture"))
    ]  # fmt: skip


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS / "online_cost.csv")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="online-cost-") as folder:
        for workload, steps in ((with_target(tiny()), 11), (with_target(llama(256)), 4)):
            for candidates in (2, 4):
                found = [steps_of(workload, candidates, steps, options.rounds, Path(folder)),
                         *passes_of(workload, candidates, 2 * options.rounds)]  # fmt: skip
                for one in found:
                    line = {"workload": workload.name, "candidates": candidates, "rows": BATCH}
                    lines.append(line | one)
                    echo(", ".join(f"{key} {value}" for key, value in lines[-1].items()))
    columns = list(dict.fromkeys(key for line in lines for key in line))
    append(options.csv, [machine() | dict.fromkeys(columns, "") | line for line in lines])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
