"""`--dry-run`: every check, the rows, a few of them through the model, and a table of the cost.

Nothing is trained and nothing is written to output_dir or the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataflex.bridge import arguments, running
from dataflex.checkpoints.state import load_state
from dataflex.config.keys import RunConfig
from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.data.rows import RunData
from dataflex.features.forecasts import gradient_forecasts
from dataflex.features.settings import FeatureSettings
from dataflex.features.step_share import step_of
from dataflex.models.passes import batches, row_losses
from dataflex.models.precision import autocast
from dataflex.models.vocabulary import check_vocabulary
from dataflex.run.board import Scoreboard
from dataflex.run.context import RunContext
from dataflex.run.forecast import Forecast, Positions, measured_seconds, peak_memory
from dataflex.run.strategy import ask_forecasts
from dataflex.trainers.seam import state_taken
from gradstore.capture.limits import token_budget

if TYPE_CHECKING:
    from dataflex.run.schedule import Schedule

#: In the place of a run's id: nothing is written.
DRY_RUN = "dry run"


def train_forecast(config: RunConfig, component: Component, workers: int) -> list[Forecast]:
    """Check a run as far as its trainer, measure a few rows, and forecast its passes.

    Args:
        config: checked (`preflight.check`).
        component: of a dynamic train_type.
        workers: processes that the run would have; this is one alone.

    Raises:
        StoreError: whatever the run itself would refuse before its first step.
    """
    from dataflex.launch.session import TrainSession

    session = TrainSession(config, component)
    schedules: list[Schedule] = []

    def plan(data: RunData, args: Any, tuned: Any) -> None:  # noqa: ANN401 - LlamaFactory's
        shape = replace(BatchShape.of(args), world=workers)
        schedules.append(session.plan(data, args, tuned, shape).schedule)

    loaded = running.load_run(config, None, plan)
    if session.checkpoint is not None:  # as the trainer does, before the strategy starts
        with state_taken(component.name, session.checkpoint):
            session.strategy.restore(load_state(session.checkpoint).component)
    check_vocabulary(loaded.model, loaded.data)
    run, schedule = _measurable(context_of(config, loaded, DRY_RUN)), schedules[0]
    steps = [interval.start for interval in schedule.intervals() if interval.update]
    training = _training(run, loaded.training_args, schedule.budget, workers)
    return [training, *ask_forecasts(session.strategy, run, steps)]


def static_rows(config: RunConfig, args: Mapping[str, Any]) -> int | None:
    """Check LlamaFactory's own training as far as its rows.

    Args:
        config: of `train_type: static`, checked.
        args: LlamaFactory's, as the run would pass them on.

    Returns:
        Number of training rows; None where they are a stream.

    Raises:
        BadInput: LlamaFactory refuses an argument, the model's folder or the rows.
    """
    return running.load_untouched(arguments.alone(args))


def build_forecast(
    loaded: running.ExportInputs, config: RunConfig, settings: FeatureSettings, checkpoints: int
) -> list[Forecast]:
    """Forecast the passes of `gradstore build`.

    Args:
        loaded: model and rows.
        config: of the build.
        settings: of the features.
        checkpoints: for how many generations are made of each set.
    """
    run = _measurable(context_of(config, loaded, DRY_RUN))
    return gradient_forecasts(run, settings, checkpoints)


def workers_of(env: Any) -> int:  # noqa: ANN401 - os.environ
    """Return the processes of a run started in this environment, over all nodes."""
    devices = arguments.device_count()
    if env.get("FORCE_TORCHRUN", "0").lower() not in {"true", "y", "1"} and devices <= 1:
        return 1
    return int(env.get("NPROC_PER_NODE") or max(1, devices)) * int(env.get("NNODES", "1"))


def context_of(config: RunConfig, loaded: running.ExportInputs, run_id: str) -> RunContext:
    """Return a run outside of training as a strategy sees it.

    Args:
        config: of the run.
        loaded: model and rows.
        run_id: what generations that it writes are marked with.
    """
    args = loaded.training_args
    return RunContext(
        config=config,
        data=loaded.data,
        collate=loaded.collate,
        model=loaded.model,
        output_dir=config.output_dir,
        run_id=run_id,
        seed=int(args.seed),
        autocast="bf16" if args.bf16 else "fp16" if args.fp16 else "off",
        step=step_of(args),
    )


def _measurable(run: RunContext) -> RunContext:
    """Give a run a board of losses as in training, and no bars."""

    def measure(positions: Positions, *, max_rows: int) -> npt.NDArray[np.float64]:
        with autocast(run.model, run.autocast):
            return row_losses(run, positions, max_rows=max_rows)

    board = Scoreboard(run.data.train, measure, batch_tokens=2 * token_budget(run.model))
    return replace(run, board=board, shows_progress=False)


def _training(run: RunContext, args: Any, steps: int, workers: int) -> Forecast:  # noqa: ANN401
    """Forecast the optimizer steps, from the forward and backward of micro-batches."""
    rows, micro = run.data.train, int(args.per_device_train_batch_size)
    per_step = micro * int(args.gradient_accumulation_steps) * workers
    mean = float(rows.lengths.mean())

    def train(positions: Positions) -> None:
        batch_of = batches(run, rows, positions, 1 << 62, lambda _: None, micro)
        for _, batch in batch_of:
            run.model(**batch).loss.backward()
        run.model.zero_grad()

    run.model.train()
    with autocast(run.model, run.autocast):
        one_pass = measured_seconds(train, rows.lengths, round(micro * mean))
    of_step = one_pass * per_step / len(rows)
    tokens = round(steps * per_step * mean)
    return Forecast(f"training, {steps:,} steps", 1, steps * per_step, tokens, of_step * steps,
                    memory_bytes=peak_memory())  # fmt: skip
