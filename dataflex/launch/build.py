"""`dataflex-cli gradstore build`: the generations of saved checkpoints, without training."""

from __future__ import annotations

import contextlib
import logging
import socket
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from dataflex.bridge import running
from dataflex.checkpoints.folders import find_checkpoints, mean_learning_rate
from dataflex.checkpoints.state import STATE, described_state, trainer_state
from dataflex.checkpoints.weights import check_moments, checkpoint_moments, load_weights
from dataflex.config.keys import RunConfig
from dataflex.config.presets import train_types_of
from dataflex.data.rows import RunData, check_rows
from dataflex.features.engines import run_on_ray
from dataflex.features.gradients import FeatureService
from dataflex.features.settings import FeatureSettings
from dataflex.features.store_owner import built_by
from dataflex.launch.announced import default_targets
from dataflex.launch.at_checkpoint import load_at
from dataflex.launch.dry_run import build_forecast, context_of
from dataflex.launch.inputs import check_store
from dataflex.launch.losses import Reader, loss_difference
from dataflex.launch.preflight import check_gradients
from dataflex.models.precision import autocast
from dataflex.models.vocabulary import check_vocabulary
from dataflex.pipelines.pipeline import build_strategy
from dataflex.run.forecast import print_forecasts
from dataflex.run.log import Watch
from dataflex.selectors.by_influence import InfluenceSelector
from gradstore.cluster.options import RayOptions
from gradstore.errors import BadInput, StoreIOError
from gradstore.export.share import OptimizerStep
from gradstore.storage.leases import Worker
from gradstore.storage.location import Location
from gradstore.store.generation import Generation
from gradstore.store.reader import open_store

_log = logging.getLogger(__name__)

#: Why a node may lack the credentials of a store that is no folder.
_NOT_SENT = (
    ". Keys and secrets are not sent through Ray: each node has its own, in the environment of its "
    "`ray start`"
)

#: Methods by which a selector's generations differ in training from those built here.
_ONLY_IN_TRAINING = {
    "target_source": "makes target features of its own; built here are the gradients of the target "
    "rows' answers",
    "sample": "takes the gradients of some rows that stand for all; built here are those of every "
    "row",
}


def build(
    config: RunConfig,
    *,
    dry_run: bool = False,
    worker: Worker | None = None,
    ray: RayOptions | None = None,
) -> None:
    """Write one train generation and one generation per target set for every checkpoint.

    Checkpoints: `gradstore_checkpoints`, else `resume_from_checkpoint`, else every
    `output_dir/checkpoint-*` with an adapter, or with a whole model where the run trains that.
    Features that need no optimizer can also be built without any, at the weights the configuration
    starts from (step 0).

    Args:
        config: as `configuration.read` read it.
        dry_run: print a forecast of the passes instead, for one process.
        worker: this process among those that build the same store together; None builds it alone.
        ray: a cluster whose processes build it as such workers; None builds it here.

    Raises:
        BadInput: see `check_gradients`; no checkpoint for Adam features; no moments in one.
        ProvenanceMismatch: the store holds features that can't be compared with these.
        StoreBusy: a process that does not share the store writes to it.
        StoreIOError: the cluster ended.
    """
    check_gradients(config)
    if told := loss_difference(config.known, "gradstore build", {Reader.GRADIENTS}):
        _log.warning("%s", told)
    settings = feature_settings(config)
    folders = find_checkpoints(config)
    if not folders and settings.train_features.needs_moments:
        raise BadInput(
            f"gradient_type {settings.gradient_type} needs Adam moments, but "
            f"{str(config.output_dir)!r} has no checkpoint-<step> of finetuning_type "
            f"{config.known.finetuning_type}. Train first, name gradstore_checkpoints, or set "
            "component_params.gradient_type: sgd or sign."
        )
    if settings.train_features.needs_moments:
        for checkpoint in folders:
            check_moments(checkpoint)
    if config.own_store is not None and not dry_run:
        check_store(config)
    if dry_run:
        loaded = _loaded(config, folders)
        print_forecasts(build_forecast(loaded, config, settings, max(1, len(folders))), world=1)
        return
    if ray is not None:
        with seen_from_here(config.store_path) as seen:
            made = run_on_ray(partial(_export_as_actor, config, settings, folders, seen), ray)
        store = open_store(config.store_path)
        for name in made:
            _tell(store.generation(name))
    else:
        _export(config, settings, folders, worker)
    _log.info("store: %s", config.store_path)


def _loaded(
    config: RunConfig, folders: Sequence[Path], worker: Worker | None = None
) -> running.ExportInputs:
    """Load rows and the model of the first checkpoint, and check them."""

    def check_data(data: RunData, *_: object) -> None:
        if line := default_targets(config):
            _log.info("%s", line)
        check_rows(data, needs_targets=True, subtask_sizes=config.dataflex.target_subtasks)

    device = 0 if worker is None else worker.number - 1
    loaded = load_at(config, folders[0] if folders else None, check_data, device)
    check_vocabulary(loaded.model, loaded.data)
    return loaded


def _export(
    config: RunConfig,
    settings: FeatureSettings,
    folders: Sequence[Path],
    worker: Worker | None,
    watch: Watch | None = None,
) -> tuple[str, ...]:
    """Build the store here, alone or as one of several workers; name the train generations."""
    loaded = _loaded(config, folders, worker)
    if watch is not None:
        watch.loaded()
    # Of torchrun's ranks the first alone tells, of the units of all.
    tells = _log.isEnabledFor(logging.INFO)
    run = context_of(config, loaded, built_by(config))
    run = replace(run, watch=watch, shows_progress=tells)
    if settings.train_features.needs_share and folders:
        run = replace(run, step=step_at(folders[0], run.step))
    service = FeatureService(run, settings, worker)
    try:
        return tuple(_export_checkpoints(service, folders))
    finally:
        service.close()


@contextlib.contextmanager
def seen_from_here(store: Location) -> Iterator[Path | None]:
    """Give a file that whoever sees the folder of a store sees, too.

    A node on which the same path is a folder of its own would make a store there, and fill it.

    Args:
        store: a folder that there may be, or another place, of which there is no such file.

    Yields:
        The store's root; where there is none yet, an empty file beside it that is removed at the
        end; None where none can be made.
    """
    if not isinstance(store, Path):
        yield None
        return
    root = store.absolute() / "zarr.json"
    with contextlib.ExitStack() as made:
        seen: Path | None = root if root.exists() else None
        if seen is None:
            with contextlib.suppress(OSError):
                above = store.absolute().parent
                above.mkdir(parents=True, exist_ok=True)
                file = tempfile.NamedTemporaryFile(prefix=".seen-", dir=above)
                seen = Path(made.enter_context(file).name)
        yield seen


def _export_as_actor(
    config: RunConfig, settings: FeatureSettings, folders: Sequence[Path], seen: Path | None,
    worker: Worker, watch: Watch,
) -> tuple[str, ...]:  # fmt: skip
    """Build as a process of a cluster, once its machine is seen to reach the store.

    Raises:
        StoreIOError: it does not, which another machine may.
    """
    if seen is not None and not seen.exists():
        raise StoreIOError(
            f"{socket.gethostname()} does not see the folder of the store, {config.store_path}, as "
            "the command does; a Ray cluster needs a file system that all its nodes see, or a "
            "store in a bucket"
        )
    try:
        check_store(config)
    except (BadInput, StoreIOError) as error:
        hint = "" if isinstance(config.store_path, Path) else _NOT_SENT
        raise StoreIOError(f"{socket.gethostname()} can't open the store: {error}{hint}") from error
    return _export(config, settings, folders, worker, watch)


def step_at(checkpoint: Path, configured: OptimizerStep | None) -> OptimizerStep | None:
    """Take the rows of a step from the run that saved a checkpoint, where it says so.

    A configuration does not say how many processes a run had; checkpoints of DataFlex do.
    """
    if configured is None or not (checkpoint / STATE).is_file():
        return configured
    rows = described_state(checkpoint).settings.get("rows_per_step")
    return replace(configured, rows=rows) if isinstance(rows, int) else configured


def _export_checkpoints(service: FeatureService, folders: Sequence[Path]) -> Iterator[str]:
    """Export once per checkpoint; without any, once from the model as it is (step 0).

    Yields:
        Names of the train generations.
    """
    run, features = service.run, service.settings.train_features
    step = 0
    for number, folder in enumerate(folders or (None,)):
        moments, rate = None, 0.0
        if folder is not None:
            if number > 0:  # the first one's weights were loaded with the model
                load_weights(run.model, folder)
            previous, step = step, trainer_state(folder).global_step
            rate = mean_learning_rate(folder, previous, step)
            if features.needs_moments:
                moments = checkpoint_moments(folder, run.model)
        with autocast(run.model, run.autocast):
            name = service.export(step, rate, moments).train
        _tell(service.store.generation(name))
        yield name


def _tell(train: Generation) -> None:
    _log.info("%s: %d rows, %d usable", train.name, train.rows, int(train.usable.sum()))


def feature_settings(config: RunConfig) -> FeatureSettings:
    """Return the settings of the configured component's gradient features.

    With `train_type: static`, that of LlamaFactory's own YAMLs, it is a selector: `less` where
    component_name is not given. A component that takes no gradients into a store gets those of
    `less` with its defaults; a warning names what such a store holds otherwise than training.

    Raises:
        BadInput: no such component, or a parameter that it refuses.
    """
    ours = config.dataflex
    less = build_strategy(config.component("dynamic_select", "less", {})).gradient_features
    assert isinstance(less, FeatureSettings)
    kind, name = ours.train_type, ours.component_name
    if kind == "static":
        name = name or "less"
        # Of another kind in a YAML that is the plain baseline of such a run.
        kind = next(iter(train_types_of(name, ours.presets_file)), "dynamic_select")
    component = config.component(kind, name, ours.component_params)
    strategy = build_strategy(component)
    found = strategy.gradient_features
    if not isinstance(found, FeatureSettings):
        _log.warning(
            "component %r stores no gradients: these are those of less with its defaults (%s, %s, "
            "proj_dim %d); component_name: less sets others",
            component.name, less.gradient_type, less.proj_method, less.proj_dim,
        )  # fmt: skip
        return less
    if isinstance(strategy, InfluenceSelector):
        for method, otherwise in _ONLY_IN_TRAINING.items():
            if getattr(type(strategy), method) is not getattr(InfluenceSelector, method):
                _log.warning("component %r in training %s", component.name, otherwise)
    return found
