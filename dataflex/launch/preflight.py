"""Checks that need no model and no data: they run in the parent, before anything expensive."""

from __future__ import annotations

import logging

from dataflex.config.keys import DataFlexConfig, RunConfig
from dataflex.config.presets import Component
from dataflex.config.registry import BY_DOMAIN
from dataflex.launch.deepspeed import keeps_copies, zero_stage
from dataflex.launch.losses import Reader, loss_difference, loss_faults, readers_of
from dataflex.mixers.base import Mixer
from dataflex.mixers.faults import domain_faults, rule_faults
from dataflex.pipelines.pipeline import Pipeline, build_strategy
from dataflex.run.schedule import Schedule
from dataflex.run.strategy import FSDP, ZERO3, Strategy
from gradstore.errors import BadInput

_log = logging.getLogger(__name__)

#: Stages whose loss is a token cross-entropy over the rows of one data set.
STAGES = ("sft", "pt")

#: Values of `optim` whose state has exp_avg and exp_avg_sq in the parameter's own shape.
ADAM = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
        "adamw_apex_fused", "adamw_anyprecision", "grokadamw", "stable_adamw")  # fmt: skip

#: LlamaFactory's switches for optimizers that beat `optim`.
OTHER_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon")

#: Values of `finetuning_type` that train the model's own weights.
WHOLE = ("full", "freeze")

#: The end of a sentence about what works with an adapter.
OF_LORA = Strategy.lora_alone

#: Values of `optim` whose arithmetic a replay repeats.
REPLAYED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")

_RANDOM = "which makes the run another each time, and a deterministic one is what"
_ROUNDED = "whose rounding hides the derivatives of a run, and float32 is what"
_OTHERWISE = "which steps otherwise than the plain AdamW that"
_SHARED = "which spreads the model, and a run on one device is what"

#: Keys that, once they are set, make a run that no replay follows.
_NOT_REPLAYED = {
    "lora_dropout": _RANDOM,
    "neftune_noise_alpha": _RANDOM,
    "bf16": _ROUNDED,
    "fp16": _ROUNDED,
    "pure_bf16": _ROUNDED,
    "quantization_bit": _ROUNDED,
    "loraplus_lr_ratio": _OTHERWISE,
    **dict.fromkeys(OTHER_OPTIMIZERS, _OTHERWISE),
    "deepspeed": _SHARED,
    "fsdp": _SHARED,
    "use_mca": _SHARED,
    "use_hyper_parallel": _SHARED,
    "early_stopping_steps": "by which a row's weight decides how long the run is, and a fixed "
    "number of steps is what",
}


def check(config: RunConfig) -> Component | None:
    """Check what strategies and trainers refuse of a configuration that `read` has checked.

    Returns:
        The component of a dynamic train_type, resolved; None for `static`.

    Raises:
        BadInput: every fault found, one per line.
    """
    if config.dataflex.train_type == "static":
        if config.dataflex.freeze_gate:
            raise BadInput(
                "freeze_gate is true, but train_type static is LlamaFactory itself: use "
                "dynamic_mix with static_mix: true, or set freeze_gate: false."
            )
        return None
    ours = config.dataflex
    component = _component(config)
    strategy = build_strategy(component)
    if ours.train_type != "dynamic_weight" and not _fixed_mix(config):
        Schedule(ours.warmup_step, ours.update_step, ours.update_times, budget=1)
    faults = _trainer_faults(config)
    for part, its_strategy in _parts(component, strategy):
        faults += _component_faults(config, part, its_strategy)
        if its_strategy.needs_moments:
            who = f"component {part.name!r}"
            faults += _optimizer_faults(config, who, its_strategy.without_moments)
    faults += strategy.check(config)
    if ours.train_type in BY_DOMAIN:
        faults += domain_faults(config)
    if ours.train_type == "dynamic_mix" and isinstance(strategy, Mixer):
        faults += rule_faults(config, strategy)
    if faults:
        raise BadInput("\n".join(faults))
    differing = [
        loss_difference(config.known, f"component {part.name!r}", readers_of(its_strategy))
        for part, its_strategy in _parts(component, strategy)
    ]
    for warning in [*_unused(config, strategy), *filter(None, differing)]:
        _log.warning("%s", warning)
    return component


def _unused(config: RunConfig, strategy: Strategy) -> list[str]:
    """List the DataFlex keys that are set but have no effect in this run."""
    ours, default = config.dataflex, DataFlexConfig()
    kind = ours.train_type
    used_by: dict[str, bool] = {
        "static_mix": kind == "dynamic_mix",
        "mixture_sample_rule": kind in BY_DOMAIN,
        "init_mixture_proportions": kind in BY_DOMAIN,
        "mixer_eval_dataset": kind in BY_DOMAIN,
        "target_subtasks": strategy.needs_targets,
        "early_stopping_min_delta": config.known.early_stopping_steps is not None,
        **dict.fromkeys(("update_step", "update_times"), kind != "dynamic_weight"),
    }
    return [
        f"{key} has no effect here (train_type {kind}, component {ours.component_name})"
        for key, used in used_by.items()
        if not used and getattr(ours, key) != getattr(default, key)
    ]


def _parts(component: Component, strategy: Strategy) -> list[tuple[Component, Strategy]]:
    """Return the component and its strategy; for a pipeline, those of its stages."""
    if isinstance(strategy, Pipeline):
        return [(stage.component, stage.strategy) for stage in strategy.everyone]
    return [(component, strategy)]


def _fixed_mix(config: RunConfig) -> bool:
    return config.dataflex.train_type == "dynamic_mix" and config.dataflex.static_mix


def _component(config: RunConfig) -> Component:
    """Return the named component; with `static_mix`, the static mixer in its place."""
    ours = config.dataflex
    if _fixed_mix(config):
        if ours.component_name is not None:  # its name and parameters are checked all the same
            config.component(ours.train_type, ours.component_name, ours.component_params)
        return config.component(ours.train_type, "static", {})
    return config.component(ours.train_type, ours.component_name, ours.component_params)


def check_gradients(
    config: RunConfig, who: str = "gradstore build", *, lora_alone: str = ""
) -> None:
    """Check what gradients of single rows need of a configuration, training or not.

    Args:
        config: as it was read.
        who: the command that takes them.
        lora_alone: as `Strategy.lora_alone`.
    """
    if faults := _gradient_faults(config, who, lora_alone):
        raise BadInput("\n".join(faults))


def check_replay(config: RunConfig) -> None:
    """Check what a replay needs of a configuration, as far as its keys say it."""
    known, who = config.known, "gradstore replay"
    faults = _gradient_faults(config, who, OF_LORA) + loss_faults(known, who, {Reader.REPLAY})
    if known.stage != "sft":
        faults.append(f"stage is {config.shown('stage')}, but {who} follows stage: sft.")
    if known.optim not in REPLAYED_OPTIMIZERS:
        faults.append(
            f"optim is {config.shown('optim')}, but {who} follows AdamW: set optim: adamw_torch."
        )
    faults += [
        f"{key} is {config.shown(key)}, {why} {who} follows: remove it."
        for key, why in _NOT_REPLAYED.items()
        if getattr(known, key)
    ]
    if faults:
        raise BadInput("\n".join(faults))


def _gradient_faults(config: RunConfig, who: str, lora_alone: str) -> list[str]:
    streaming = [f"streaming is on, but {who} numbers rows: set streaming: false."]
    return [*(streaming if config.known.streaming else []), *_single_row_faults(config, who),
            *_trained_faults(config, who, lora_alone), *_target_faults(config, who)]  # fmt: skip


def _trainer_faults(config: RunConfig) -> list[str]:
    known = config.known
    faults = [
        f"{key} is {value}; it must be at least 1."
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if (value := getattr(known, key)) < 1
    ]
    if known.stage not in STAGES:
        faults.append(
            f"stage is {config.shown('stage')}; train_type {config.dataflex.train_type} supports "
            f"{' and '.join(STAGES)}. Use train_type: static for the others."
        )
    if not known.do_train:
        faults.append(
            "do_train is false, but a dynamic train_type needs training: set do_train: true."
        )
    if known.streaming:
        faults.append(
            f"streaming is on, but train_type {config.dataflex.train_type} needs to know every row "
            "before it chooses: set streaming: false."
        )
    if known.auto_find_batch_size and config.dataflex.train_type != "dynamic_weight":
        faults.append(
            f"auto_find_batch_size is on, but train_type {config.dataflex.train_type} plans which "
            "rows each step takes before the first one: set auto_find_batch_size: false, and a "
            "per_device_train_batch_size that fits."
        )
    if known.early_stopping_steps is not None and not (
        known.metric_for_best_model or known.load_best_model_at_end
    ):
        faults.append(
            "early_stopping_steps is set, but no metric to improve is: set "
            "load_best_model_at_end: true, or metric_for_best_model."
        )
    if known.use_mca or known.use_hyper_parallel:
        faults.append("use_mca and use_hyper_parallel work with train_type: static only.")
    return faults


def _component_faults(config: RunConfig, component: Component, strategy: Strategy) -> list[str]:
    name = f"component {component.name!r}"
    faults = []
    if strategy.needs_single_rows:
        faults += _single_row_faults(config, name)
    if strategy.needs_lora:
        faults += _trained_faults(config, name, strategy.lora_alone)
    if strategy.needs_targets:
        faults += _target_faults(config, name)
    if config.known.fsdp and FSDP in strategy.whole_model:
        faults.append(
            f"fsdp is {config.known.fsdp!r}, but {name} makes passes of its own over the model in "
            "training, which cannot be made while its parameters are sharded: remove fsdp (DDP "
            "works)."
        )
    if ZERO3 in strategy.whole_model and (stage := zero_stage(config.known.deepspeed)) == 3:
        faults.append(
            f"deepspeed is {config.shown('deepspeed')}, of ZeRO stage {stage}, but {name} makes "
            "passes of its own over the model in training, which cannot be made while its "
            "parameters are sharded: remove deepspeed (DDP works)."
        )
    return faults + loss_faults(config.known, name, readers_of(strategy))


def _single_row_faults(config: RunConfig, who: str) -> list[str]:
    faults, known = [], config.known
    for key, on in (("packing", known.packs), ("neat_packing", known.neat_packing)):
        if on:
            faults.append(
                f"{key} is on, but {who} works on single rows"
                f"{'' if key != 'packing' or known.packing else ' (stage pt packs)'}: "
                f"set {key}: false."
            )
    return faults


def _trained_faults(config: RunConfig, who: str, lora_alone: str) -> list[str]:
    """List what keeps the gradients of what is trained from being taken row by row."""
    kind, known = config.known.finetuning_type, config.known
    if kind == "lora":
        count = len(known.adapter_name_or_path)
        return [f"adapter_name_or_path names {count} adapters; {who} needs at most one."] * (
            count > 1
        )
    if lora_alone or kind not in WHOLE:
        why = lora_alone or "takes gradients of LoRA matrices and of whole weights"
        kinds = "lora" if lora_alone else ", ".join(("lora", *WHOLE))
        return [
            f"finetuning_type is {config.shown('finetuning_type')}, but {who} {why}: supported is "
            f"finetuning_type: {kinds} (with stage sft or pt)."
        ]
    if known.quantization_bit is not None:
        return [
            f"quantization_bit is {config.shown('quantization_bit')}, but the weights that "
            f"finetuning_type: {kind} trains, of which {who} takes the gradients, cannot be "
            "quantised: remove quantization_bit, or set finetuning_type: lora."
        ]
    return []


def _optimizer_faults(config: RunConfig, who: str, without: str) -> list[str]:
    way_out = f"Use one of {', '.join(ADAM)}, or set {without}, which needs no moments."
    optim = config.known.optim
    if optim not in ADAM:
        return [
            f"optim is {config.shown('optim')}, which keeps no Adam moments by parameter, "
            f"but {who} needs them. {way_out}"
        ]
    precision = {"bf16": config.known.bf16, "fp16": config.known.fp16}
    if why := keeps_copies(config.known.deepspeed, precision):
        return [
            f"deepspeed is {config.shown('deepspeed')}, whose {why} keeps Adam moments of copies "
            f"of the parameters, but {who} needs those of the parameters. Set zero_optimization's "
            f"stage to 2, or {without}, which needs no moments."
        ]
    return [
        f"{key} is on, which keeps no Adam moments by parameter, but {who} needs them. "
        f"Set {key}: false, or {without}."
        for key in OTHER_OPTIMIZERS
        if getattr(config.known, key)
    ]


def _target_faults(config: RunConfig, who: str) -> list[str]:
    ours = config.dataflex
    sets = ours.target_dataset or config.known.eval_dataset
    if not sets and config.known.val_size <= 0:
        return [
            f"{who} needs target rows: set target_dataset (or eval_dataset, or val_size) to the "
            "data the model should become good at."
        ]
    if len(set(sets)) < len(sets):
        return [f"target_dataset names a set twice: {', '.join(sets)}."]
    if ours.target_subtasks and len(sets) > 1:
        return [
            f"target_subtasks splits one target set, but {len(sets)} are named "
            f"({', '.join(sets)}): each name is a sub-task already. Remove target_subtasks."
        ]
    if any(size <= 0 for size in ours.target_subtasks or ()):
        return [f"target_subtasks is {list(ours.target_subtasks or ())}; sizes must be positive."]
    return []
