"""What weights cost: the time of an optimizer step with the loss weighter over a plain one.

    uv run python benchmarks/weighting_cost.py          # about six minutes

transformers' Trainer on the same rows in the same order, plain and with `dynamic_weight`'s seam and
the loss weighter. With one micro-batch a step there is no extra pass: weights come from the forward
that trains. With four, one forward pass over the window goes before. Runs of a few steps alternate
A B A B in one process; a step's time is the median over all of them. Prints one table and appends
to results/weighting_cost.csv.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from report import RESULTS, Took, append, compared, echo, machine
from transformers import Trainer, TrainerCallback, TrainingArguments
from workloads import Workload, llama, tiny

from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.run.ranks import Ranks
from dataflex.trainers.job import Job, Run
from dataflex.trainers.seam import trainer_class
from dataflex.trainers.weight import WeightSeam
from dataflex.weighters.loss import LossWeighter

BATCH = 8


class Clock(TrainerCallback):
    """Times from the end of a step to the end of the next: all that a step does."""

    def __init__(self) -> None:
        self.steps: list[Took] = []
        self._last: Took | None = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Start the clock of a run: its first step is not counted."""
        self._last = None

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Record the time of a step."""
        now = Took(time.perf_counter(), time.process_time())
        if self._last is not None:
            self.steps.append(Took(now.wall - self._last.wall, now.cpu - self._last.cpu))
        self._last = now

    def median(self) -> Took:
        """Take the median of the steps since the last call, and forget them."""
        steps, self.steps = self.steps, []
        return Took(
            statistics.median(s.wall for s in steps), statistics.median(s.cpu for s in steps)
        )


def trainer(
    workload: Workload, accumulation: int, steps: int, folder: Path, *, weighted: bool
) -> tuple[Any, Clock]:
    """Build a trainer that takes `steps` steps per call of `train`, and its clock."""
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=BATCH, max_steps=steps,
        gradient_accumulation_steps=accumulation, learning_rate=1e-4, report_to="none",
        logging_steps=5, save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    kind: Any = Trainer
    if weighted:
        component = Component("weighter", "loss", LossWeighter, {})
        job = Job(workload.config(folder), component, LossWeighter(), workload.data, arguments,
                  BatchShape.of(arguments), Ranks())  # fmt: skip
        run = Run(**vars(job), schedule=WeightSeam.plan(job), run_id="benchmark")
        kind = trainer_class(WeightSeam, Trainer, run)
    made = kind(
        model=workload.model, args=arguments, train_dataset=workload.data.train.dataset,
        data_collator=workload.collate, callbacks=[clock],
    )  # fmt: skip
    return made, clock


def measure(
    workload: Workload, accumulation: int, steps: int, rounds: int, folder: Path
) -> dict[str, object]:
    """Time a step, plain and weighted: the median of each round's steps."""
    plain = trainer(workload, accumulation, steps, folder, weighted=False)
    weighted = trainer(workload, accumulation, steps, folder, weighted=True)
    times: tuple[list[Took], list[Took]] = ([], [])
    for number in range(rounds + 1):
        for (made, clock), taken in zip((plain, weighted), times, strict=True):
            made.train()
            took = clock.median()
            if number:  # the first round warms up
                taken.append(took)
    return {
        "workload": workload.name,
        "accumulation": accumulation,
        "rows_per_step": BATCH * accumulation,
        "steps": rounds * (steps - 1),
        **compared(times[1], times[0], ("weighted", "plain"), digits=4),
    }


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS / "weighting_cost.csv")
    options = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="weighting-cost-") as folder:
        for workload, steps in ((tiny(), 21), (llama(256), 6)):
            for accumulation in (1, 4):
                lines.append(measure(workload, accumulation, steps, options.rounds, Path(folder)))
                echo(", ".join(f"{key} {value}" for key, value in lines[-1].items()))
    append(options.csv, [machine() | line for line in lines])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
