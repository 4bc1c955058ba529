"""`dataflex-cli gradstore build`: the generations of saved checkpoints, without training."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataflex import bridge
from dataflex.config import RunConfig, load
from dataflex.data import RunData, check_rows
from dataflex.features import FeatureService, FeatureSettings
from dataflex.preflight import check_gradients, check_inputs
from dataflex.registry import resolve
from dataflex.selectors.base import RunContext
from dataflex.session import known_identity, output_identity
from dataflex.trainers.state import checkpoints, is_complete, load_state
from gradstore.errors import BadInput
from gradstore.moments import AdamMoments

_log = logging.getLogger(__name__)


def build(path: Path, overrides: Sequence[str]) -> None:
    """Write one train generation and one generation per target set for every checkpoint.

    Checkpoints: `gradstore_checkpoints`, else `resume_from_checkpoint`, else every
    `output_dir/checkpoint-*` with an adapter. Features that need no optimizer can also be built
    without any, at the adapter the configuration starts from (step 0).

    Raises:
        BadInput: see `check_gradients`; no checkpoint for Adam features; no moments in one.
        ProvenanceMismatch: the store holds features that can't be compared with these.
    """
    config = load(path, overrides, bridge.accepted_keys())
    check_inputs(config)
    check_gradients(config)
    settings = feature_settings(config)
    folders = find_checkpoints(config)
    if not folders and settings.train_features.needs_moments:
        raise BadInput(
            f"gradient_type {settings.gradient_type} needs Adam moments, but "
            f"{str(config.output_dir)!r} has no checkpoint-<step> with an adapter. Train first, "
            "name gradstore_checkpoints, or set component_params.gradient_type: sgd or sign."
        )
    if settings.train_features.needs_moments:
        for checkpoint in folders:
            check_moments(checkpoint)
    first = folders[0] if folders else None

    def check_data(data: RunData, _: object) -> None:
        check_rows(data, needs_targets=True, subtask_sizes=config.dataflex.target_subtasks)

    loaded = bridge.load_run(config, first, check_data)
    args = loaded.training_args
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "off"
    run = RunContext(
        config=config,
        data=loaded.data,
        collate=loaded.collate,
        model=loaded.model,
        output_dir=config.output_dir,
        run_id=output_identity(config.output_dir),
        seed=int(args.seed),
        autocast=precision,
    )
    service = FeatureService(run, settings)
    try:
        previous = 0
        for folder in folders or (None,):
            if folder is not None and folder != first:
                bridge.load_adapter(loaded.model, folder)
            step = 0 if folder is None else trainer_state(folder)["global_step"]
            moments = None
            if folder is not None and settings.train_features.needs_moments:
                moments = checkpoint_moments(folder, loaded.model)
            rate = 0.0 if folder is None else mean_learning_rate(folder, previous, step)
            with _autocast(loaded.model, precision):
                exported = service.export(step, rate, moments)
            _log.info("%s: %d rows, %d usable", exported.train.name, exported.train.rows,
                      int(exported.train.usable.sum()))  # fmt: skip
            previous = step
    finally:
        service.close()
    _log.info("store: %s", config.store_path)


def feature_settings(config: RunConfig) -> FeatureSettings:
    """The settings of the configuration's own component, or of `less` where it has none."""
    ours = config.dataflex
    if ours.train_type == "static":
        component = resolve("dynamic_select", "less", ours.component_params, ours.presets_file)
    else:
        component = resolve(
            ours.train_type, ours.component_name, ours.component_params, ours.presets_file
        )
    settings = getattr(component.build(), "settings", None)
    if settings is None:
        settings = resolve("dynamic_select", "less", {}, ours.presets_file).build().settings
    if not isinstance(settings, FeatureSettings):
        raise BadInput(f"component {component.name!r} does not say how features are made.")
    return settings


def find_checkpoints(config: RunConfig) -> list[Path]:
    """Checkpoint folders with an adapter, by step.

    Raises:
        BadInput: a named folder has none.
    """
    named = [Path(name) for name in config.dataflex.gradstore_checkpoints or ()]
    resume = config.get("resume_from_checkpoint")
    if not named and isinstance(resume, str) and resume.lower() not in ("true", "false"):
        named = [Path(resume)]
    for folder in named:
        if not (folder / "adapter_config.json").is_file():
            raise BadInput(f"checkpoint {str(folder)!r} has no adapter (adapter_config.json).")
        trainer_state(folder)
    found = named or [
        folder
        for folder in checkpoints(config.output_dir)
        if (folder / "adapter_config.json").is_file() and _is_usable(folder, config.output_dir)
    ]
    return sorted(found, key=lambda folder: int(trainer_state(folder)["global_step"]))


def trainer_state(folder: Path) -> dict[str, Any]:
    """The Trainer's own state of a checkpoint.

    Raises:
        BadInput: it is missing or damaged: the checkpoint is incomplete.
    """
    try:
        content = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        return {**content, "global_step": int(content["global_step"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"checkpoint {str(folder)!r} is incomplete: no readable trainer_state.json ({error})."
        ) from error


def mean_learning_rate(folder: Path, previous: int, step: int) -> float:
    """Mean of the learning rates logged in (previous, step]; 0.0 where none was logged."""
    rates = [
        float(entry["learning_rate"])
        for entry in trainer_state(folder).get("log_history", [])
        if "learning_rate" in entry and previous < int(entry["step"]) <= step
    ]
    return sum(rates) / len(rates) if rates else 0.0


def check_moments(folder: Path) -> None:
    """A checkpoint keeps moments that can be read, before a model is loaded for them.

    Raises:
        BadInput: it does not, or they would run code.
    """
    path = _moments_file(folder)
    if path.suffix == ".pt":
        bridge.load_optimizer_state(path)


def checkpoint_moments(folder: Path, model: Any) -> AdamMoments:  # noqa: ANN401 - a PeftModel
    """Moments by name: our own file, or LlamaFactory's optimizer.pt without unpickling code.

    Raises:
        BadInput: neither is there, or they do not fit the model.
    """
    path = _moments_file(folder)
    if path.suffix == ".pt":
        state = bridge.load_optimizer_state(path)
        return AdamMoments.from_state_dict(state, bridge.optimizer_order(model))
    return AdamMoments.load(path)


def _moments_file(folder: Path) -> Path:
    for path in (folder / "dataflex" / "moments.safetensors", folder / "optimizer.pt"):
        if path.is_file():
            return path
    raise BadInput(
        f"checkpoint {str(folder)!r} has neither dataflex/moments.safetensors nor "
        "optimizer.pt (was it saved with save_only_model?). Adam features need one; "
        "gradient_type sgd or sign does not."
    )


def _is_usable(folder: Path, output_dir: Path) -> bool:
    """Whether a checkpoint found in output_dir is complete and of the run that owns the folder."""
    try:
        trainer_state(folder)
    except BadInput:
        _log.warning("%s is incomplete and is left out", folder)
        return False
    if is_complete(folder) and load_state(folder).run_id != known_identity(output_dir):
        _log.warning("%s belongs to an earlier run and is left out", folder)
        return False
    return True


def _autocast(model: Any, precision: str) -> contextlib.AbstractContextManager[Any]:  # noqa: ANN401
    """The autocast that training wraps the model's forward in."""
    import torch

    if precision == "off":
        return contextlib.nullcontext()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return torch.autocast(next(model.parameters()).device.type, dtype=dtype)
