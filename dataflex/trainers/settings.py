"""Settings that a resume is compared by: refused where they differ, told, or of no account.

LlamaFactory changes what it has parsed (lists from text, sets, values filled in), and a checkpoint
keeps settings as JSON. So both sides are compared as JSON has them, in an order of their own where
they have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from dataflex.checkpoints.state import RunState
from dataflex.config.presets import RETIRED
from dataflex.config.registry import target_of
from dataflex.config.secrets import without_secrets
from dataflex.data.rows import RunData
from dataflex.trainers.job import Run
from gradstore.errors import BadInput, ProvenanceMismatch

#: Keys that say which parameters are trained, and thus what a checkpoint holds.
FINETUNING = ("finetuning_type", "lora_rank", "lora_alpha", "lora_target", "additional_target",
              "use_dora", "use_rslora")  # fmt: skip

#: Beginnings of further keys of LlamaFactory's that decide about trained parameters or about the
#: optimizer's groups and states, by the key that switches them on.
SWITCHED: Mapping[str, tuple[str, ...]] = {
    "use_galore": ("galore_",),
    "use_apollo": ("apollo_",),
    "use_badam": ("badam_",),
    "loraplus_lr_ratio": ("loraplus_lr_embedding",),
    "pissa_init": ("pissa_",),
    "use_adam_mini": (),
    "use_muon": (),
    "use_llama_pro": (),
    "freeze_vision_tower": (),
    "freeze_multi_modal_projector": (),
    "freeze_language_model": (),
}
BY_KIND: Mapping[str, tuple[str, ...]] = {
    "freeze": ("freeze_trainable_", "freeze_extra_"),
    "oft": ("oft_", "module_dropout"),
}

#: Keys among them that say nothing about the optimizer.
HARMLESS = ("badam_verbose", "pissa_convert")

#: The Trainer's own. Its sharding decides in which files the optimizer's state lies.
OF_TRAINER = ("optim_args", "optim_target_modules")
SHARDING = ("deepspeed", "fsdp")

#: Keys whose order means nothing; LlamaFactory makes sets of some.
UNORDERED = frozenset({
    "lora_target", "additional_target", "galore_target", "apollo_target", "oft_target",
    "freeze_trainable_modules", "freeze_extra_modules", "optim_target_modules",
})  # fmt: skip

#: Keys that a resume takes from the checkpoint's optimizer and scheduler, whatever is configured:
#: `load_state_dict` puts the saved values in the place of the new ones.
KEPT = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")

#: Keys that act after the first step: the curve is computed anew, over the learning rate kept.
ACTING = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio")

#: Schedulers whose state holds their settings, too.
STATEFUL = ("reduce_lr_on_plateau", "greedy")


def of_run(run: Run) -> dict[str, Any]:
    """Return what every kind of run agrees on with its resume, of decisions and saved weights."""
    neutral = {*RETIRED, *run.strategy.neutral}
    # A dry run is not sharded, whatever the run itself is: asked is the configuration.
    sharding = {key: bool(getattr(run.config.known, key)) for key in SHARDING}
    return {
        "component_name": run.name,
        "class": target_of(type(run.strategy)),
        "component_params": {k: v for k, v in run.params.items() if k not in neutral},
        "rows_per_step": run.shape.rows,
        "seed": int(run.args.seed),
        "targets": {t.name: t.row_set.sha256 for t in run.data.targets},
        "optim": str(run.args.optim),
        **of_finetuning(run.tuned),
        "optimizer": {**of_optimizer(run.args, run.tuned), **sharding},
        "training": of_training(run.args, run.schedule.budget),
    }


def rows_sha256(data: RunData) -> str:
    """Hash the training rows, in their order."""
    return hashlib.sha256(data.train.row_set.hashes.tobytes()).hexdigest()


def check_agreement(
    state: RunState, run: Run, now: Mapping[str, Any], rows: str, unsettled: Collection[str] = ()
) -> None:
    """Compare a checkpoint with the run that goes on from it.

    Args:
        state: of the checkpoint.
        run: planned.
        now: the run's settings.
        rows: the hash of its training rows.
        unsettled: keys that have no value yet.

    Raises:
        BadInput: schedule or settings differ.
        ProvenanceMismatch: the rows do.
    """
    s = run.schedule
    if state.schedule != (planned := (s.warmup_step, s.update_step, s.update_times)):
        raise BadInput(
            f"the checkpoint was made with (warmup_step, update_step, update_times) = "
            f"{state.schedule}, this configuration has {planned}. "
            "Restore the values, or start a new run with overwrite_output_dir: true."
        )
    held = {key: value for key, value in state.settings.items() if key not in unsettled}
    settled = {key: value for key, value in now.items() if key not in unsettled}
    if changed := differences(held, settled):
        raise BadInput(
            f"the checkpoint was made with other settings: {'; '.join(changed)}"
            ". Restore them, or start a new run with overwrite_output_dir: true."
        )
    if state.rows_sha256 != rows:
        raise ProvenanceMismatch(
            "the checkpoint was made on other training rows (data, template, tokenizer or "
            "cutoff_len changed). Restore them, or start a new run with "
            "overwrite_output_dir: true."
        )


def of_finetuning(tuned: Any) -> dict[str, Any]:  # noqa: ANN401 - FinetuningArguments or None
    """Return the settings of the saved weights."""
    return comparable({k: getattr(tuned, k) for k in FINETUNING if hasattr(tuned, k)})


def of_optimizer(args: Any, tuned: Any) -> dict[str, Any]:  # noqa: ANN401 - LlamaFactory's arguments
    """Return what decides about the optimizer's groups and states beside `optim`."""
    held = vars(tuned) if tuned is not None else {}
    found = {key: held[key] for key in SWITCHED if key in held}
    starts = [start for key, starts in SWITCHED.items() if held.get(key) for start in starts]
    starts += BY_KIND.get(str(held.get("finetuning_type")), ())
    found |= {key: value for key, value in held.items() if key.startswith(tuple(starts))}
    found |= {key: getattr(args, key, None) for key in OF_TRAINER}
    found |= {key: bool(getattr(args, key, None)) for key in SHARDING}
    return comparable({key: value for key, value in found.items() if key not in HARMLESS})


def of_training(args: Any, steps: int) -> dict[str, Any]:  # noqa: ANN401 - TrainingArguments
    """Return what may change on a resume, and is told."""
    found = {key: getattr(args, key) for key in (*KEPT, *ACTING) if hasattr(args, key)}
    return comparable({**found, "steps of the run": steps})


def comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as JSON keeps them, with what has no order in rising order, no secret."""
    return {str(key): _plain(value, str(key)) for key, value in without_secrets(settings).items()}


def differences(held: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List settings that a resume must agree on and does not, one clause each.

    Args:
        held: those of a checkpoint; an earlier version may lack the nested ones.
        now: those of the run.
    """
    held, now = comparable(held), comparable(now)
    found = dict(_differing(held, now, {*held, *now} - {"optimizer", "training"}))
    ours, theirs = now.get("optimizer", {}), held.get("optimizer", {})
    found |= dict(_differing(theirs, ours, set(ours) & set(theirs)))
    return [f"{key} {clause}" for key, clause in sorted(found.items())]


def told(held: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Say which changed settings act from here on and which do not; None where none changed."""
    theirs, ours = comparable(held).get("training", {}), comparable(now).get("training", {})
    changed = dict(_differing(theirs, ours, set(ours) & set(theirs)))
    stateful = ours.get("lr_scheduler_type") in STATEFUL
    without = {*KEPT, *(("lr_scheduler_kwargs",) if stateful else ())}
    kept = [f"{key} {clause}" for key, clause in sorted(changed.items()) if key in without]
    acting = [f"{key} {clause}" for key, clause in sorted(changed.items()) if key not in without]
    parts = []
    if kept:
        parts.append(f"{'; '.join(kept)}: without effect, the checkpoint's value goes on")
    if acting:
        parts.append(f"{'; '.join(acting)}: acts after the first step")
    return "changed since the checkpoint: " + ". ".join(parts) if parts else None


def _differing(
    held: Mapping[str, Any], now: Mapping[str, Any], keys: set[str]
) -> Iterator[tuple[str, str]]:
    for key in keys:
        before, after = held.get(key), now.get(key)
        if before != after and _text(before) != _text(after):  # NaN differs from itself
            yield key, f"{before!r}, now {after!r}"


def _text(value: Any) -> str:  # noqa: ANN401 - a JSON value
    return json.dumps(value, sort_keys=True)


def _plain(value: Any, key: str = "") -> Any:  # noqa: ANN401 - settings
    """Convert a value to what JSON gives back of it; sets and unordered lists in rising order."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, str(k)) for k, v in value.items()}
    if isinstance(value, set | frozenset) or (key in UNORDERED and isinstance(value, list | tuple)):
        return sorted((_plain(item) for item in value), key=_text)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return _bare(value)
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        return _plain(value.tolist())
    return str(value)


def _bare(value: Any) -> Any:  # noqa: ANN401 - a scalar
    """Take an enumeration's value, which JSON would write in its place."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value.value) if hasattr(value, "value") else kind(value)
    return value
