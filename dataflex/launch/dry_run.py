"""`--dry-run`: every check, the rows, a few of them through the model, and a table of the cost.

Nothing is trained and nothing is written to output_dir or the store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dataflex.bridge import arguments, running
from dataflex.config.keys import RunConfig
from dataflex.config.presets import Component
from dataflex.data.order import BatchShape
from dataflex.data.rows import Rows, RunData
from dataflex.features.embedders import STORED, CurrentModel, Embedder, OwnEncoder
from dataflex.features.gradients import projection_for
from dataflex.features.settings import FeatureSettings
from dataflex.mixers.dynamic_moe import DynamicMoeMixer
from dataflex.models.passes import batches, row_losses, token_budget
from dataflex.models.precision import autocast
from dataflex.pipelines.pipeline import Pipeline
from dataflex.run.context import RunContext
from dataflex.run.forecast import Forecast, Positions, measured_seconds, peak_memory
from dataflex.run.strategy import Strategy
from dataflex.selectors.by_embedding import EmbeddingSelector
from dataflex.selectors.by_influence import InfluenceSelector
from dataflex.selectors.cluster_less import ClusterLessSelector
from dataflex.selectors.coincide import CoincideSelector
from dataflex.selectors.nice import NiceSelector
from dataflex.weighters.base import LossContributor
from gradstore.capture.modelstate import borrowed
from gradstore.export.features import Recipe
from gradstore.export.moments import AdamMoments
from gradstore.export.projected import compute_unit
from gradstore.export.units import Batches
from gradstore.format.layout import generation_bytes
from gradstore.format.plans import UnitRange
from gradstore.pace import product_seconds
from gradstore.similarity.clusters import rows_read

if TYPE_CHECKING:
    from dataflex.run.schedule import Schedule


#: Passes that are named and not measured, by kind of strategy.
_UNMEASURED: dict[type[Strategy], tuple[str, str]] = {
    NiceSelector: ("responses", "as long as the model's answers are"),
    DynamicMoeMixer: ("loads of experts", "a pass over some rows of each domain"),
    LossContributor: ("weights", "passes over target rows, a reference or a step's window"),
}


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

    def plan(data: RunData, args: Any) -> None:  # noqa: ANN401 - TrainingArguments
        shape = replace(BatchShape.of(args), world=workers)
        schedules.append(session.plan(data, args, shape).schedule)

    loaded = _loaded(config, None, plan)
    run, schedule = _context(config, loaded), schedules[0]
    steps = [i.start for i in schedule.intervals() if i.update]
    found = [_training(run, loaded.training_args, schedule.budget, workers)]
    for strategy, times in _parts(session.strategy, steps):
        if times:
            found += _passes(run, strategy, times, len(loaded.data.targets) > 0)
    return found


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
    return list(_gradients(_context(config, loaded), settings, checkpoints, None))


def workers_of(env: Any) -> int:  # noqa: ANN401 - os.environ
    """Return the processes of a run started in this environment, over all nodes."""
    devices = arguments.device_count()
    if env.get("FORCE_TORCHRUN", "0").lower() not in {"true", "y", "1"} and devices <= 1:
        return 1
    return int(env.get("NPROC_PER_NODE") or max(1, devices)) * int(env.get("NNODES", "1"))


def _loaded(config: RunConfig, checkpoint: Path | None, on_data: Any) -> running.ExportInputs:  # noqa: ANN401
    """Load rows and model in this process alone, on one device, not sharded."""
    if arguments.device_count() > 1:  # or LlamaFactory would ask for torchrun
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    alone = {k: v for k, v in config.llamafactory.items() if k not in ("deepspeed", "fsdp")}
    return running.load_run(replace(config, llamafactory=alone), checkpoint, on_data)


def _context(config: RunConfig, loaded: running.ExportInputs) -> RunContext:
    args = loaded.training_args
    return RunContext(
        config=config,
        data=loaded.data,
        collate=loaded.collate,
        model=loaded.model,
        output_dir=config.output_dir,
        run_id="dry run",
        seed=int(args.seed),
        autocast="bf16" if args.bf16 else "fp16" if args.fp16 else "off",
        shows_progress=False,
    )


def _parts(strategy: Strategy, steps: Sequence[int]) -> Iterator[tuple[Strategy, int]]:
    """Yield every strategy of a run, and at how many of the boundaries `steps` it is asked."""
    if not isinstance(strategy, Pipeline):
        yield strategy, len(steps)
        return
    for stage in strategy.everyone:
        last, fired = -stage.spec.every, 0
        for step in steps:
            if step >= stage.spec.warmup_step and step - last >= stage.spec.every:
                last, fired = step, fired + 1
        yield stage.strategy, fired


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


def _passes(run: RunContext, strategy: Strategy, times: int, targets: bool) -> Iterator[Forecast]:
    """Forecast the passes of one strategy that is asked `times` times."""
    if isinstance(strategy, ClusterLessSelector):
        source = _embedder(run, strategy)
        yield from _embeddings(run, source, 1, (run.data.train,), None)
        yield _clustering(strategy, len(run.data.train), source.dim)
    elif isinstance(strategy, CoincideSelector | EmbeddingSelector):
        source = _embedder(run, strategy)
        if source is not None:
            sets = (run.data.train, *(run.data.targets if targets else ()))
            fixed = getattr(strategy, "fixed", False) or _is_frozen(strategy)
            yield from _embeddings(run, source, 1 if fixed else times, sets,
                                   strategy.keep_generations)  # fmt: skip
        if source is not None and isinstance(strategy, EmbeddingSelector):
            queries, n = sum(len(rows) for rows in run.data.targets), len(run.data.train)
            yield Forecast(f"search of {queries} rows' neighbours", times, n, 0,
                           product_seconds(float(queries) * n * source.dim))  # fmt: skip
    for kind, (what, note) in _UNMEASURED.items():
        if isinstance(strategy, kind):
            yield Forecast(what, times, 0, 0, None, note=note)
    if isinstance(strategy, InfluenceSelector):
        yield from _gradients(run, strategy.settings, times, strategy)
    if strategy.scores_by_loss:
        yield _losses(run, times)


def _gradients(
    run: RunContext, settings: FeatureSettings, times: int, strategy: InfluenceSelector | None
) -> Iterator[Forecast]:
    """Forecast the gradients of every set; each with what it adds to the store."""
    projection = projection_for(run.model, settings)
    adam = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad])
    moments = AdamMoments.from_optimizer(adam, run.model)
    budget = settings.tokens_per_batch or token_budget(run.model)
    stores = strategy is None or strategy.scoring == "projected"
    kept = None if strategy is None else strategy.keep_generations

    def forecast(rows: Rows, spec: Any, count: int) -> Forecast:  # noqa: ANN401 - a FeatureSpec
        recipe = Recipe(spec, projection, moments if spec.needs_moments else None)

        def work(positions: Positions) -> None:
            some = Batches(rows.dataset.select(positions.tolist()), run.collate,
                           rows.lengths[positions], budget)  # fmt: skip
            compute_unit(run.model, some, recipe, UnitRange(0, 0, len(positions)))

        with autocast(run.model, run.autocast):
            seconds = measured_seconds(work, rows.lengths, budget)
        stored = generation_bytes(count, settings.proj_dim, settings.dtype) if stores else 0
        share = count / len(rows)
        return Forecast(f"gradients of {rows.name}", times, count,
                        round(int(rows.lengths.sum()) * share), seconds * share, stored, kept,
                        peak_memory())  # fmt: skip

    for rows in run.data.targets:
        yield forecast(rows, settings.target_features, len(rows))
    train, count = run.data.train, len(run.data.train)
    if isinstance(strategy, ClusterLessSelector):
        count = min(count, strategy.clusters_of(count) * strategy.samples_per_cluster)
    yield forecast(train, settings.train_features, count)


def _losses(run: RunContext, times: int) -> Forecast:
    rows = run.data.train
    with autocast(run.model, run.autocast):
        seconds = measured_seconds(
            partial(row_losses, run), rows.lengths, 2 * token_budget(run.model)
        )
    return Forecast(f"losses of {rows.name}", times, len(rows), int(rows.lengths.sum()), seconds,
                    memory_bytes=peak_memory())  # fmt: skip


def _is_frozen(strategy: Strategy) -> bool:
    settings = getattr(strategy, "embeddings", None)
    return settings is not None and settings.frozen


def _embedder(run: RunContext, strategy: Any) -> Any:  # noqa: ANN401 - an Embedder or None
    """Return the source of a strategy's embeddings; None where a file stands for them."""
    if isinstance(strategy, CoincideSelector):
        return strategy.source(run)
    if getattr(strategy, "file", None) is not None:
        return None
    kind = OwnEncoder if strategy.embeddings.frozen else CurrentModel
    return kind(run, strategy.embeddings)


def _embeddings(
    run: RunContext, source: Embedder, times: int, sets: Sequence[Rows], kept: int | None
) -> Iterator[Forecast]:
    budget = 2 * token_budget(run.model)
    for rows in sets:

        def work(positions: Positions, rows: Rows = rows) -> None:
            origins = rows.sources and tuple(rows.sources[i] for i in positions.tolist())
            some = Rows(rows.name, rows.dataset.select(positions.tolist()), origins)
            source.unit(some, UnitRange(0, 0, len(positions)), lambda _: None)

        with borrowed(run.model, freeze=False), autocast(run.model, run.autocast):
            seconds = measured_seconds(work, rows.lengths, budget)
        yield Forecast(f"embeddings of {rows.name}", times, len(rows), int(rows.lengths.sum()),
                       seconds, generation_bytes(len(rows), source.dim, STORED), kept,
                       peak_memory())  # fmt: skip
    source.release()


def _clustering(strategy: ClusterLessSelector, n: int, d: int) -> Forecast:
    """Forecast a clustering by its multiplications, at most, on the CPU."""
    k = strategy.clusters_of(n)
    reads = rows_read(strategy.method, n, k, strategy.max_iter)
    compared = k if strategy.method in ("kmeans", "spherical_kmeans") else 1
    seconds = product_seconds(float(reads) * compared * d)
    return Forecast(f"{strategy.method}, {k:,} clusters, at most", 1, n, 0, seconds)
