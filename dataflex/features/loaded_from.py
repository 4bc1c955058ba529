"""Places that a run's model and rows were loaded from: kept with its generations, for questions.

Information alone: a model may move, and what was asked of it is checked by hashes, not by paths.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.checkpoints.folders import checkpoints
from dataflex.checkpoints.state import Incomplete, trainer_state
from dataflex.checkpoints.weights import ADAPTER_CONFIG, adapter_config
from dataflex.config.secrets import without_secrets
from gradstore.errors import BadInput
from gradstore.format.layout import GRADIENT
from gradstore.format.records import LOADED_FROM

if TYPE_CHECKING:
    from dataflex.config.keys import RunConfig
    from gradstore.storage.location import Location
    from gradstore.store.generation import Generation
from gradstore.store.reader import Store

_log = logging.getLogger(__name__)

#: LlamaFactory's keys that decide which model is loaded and which tokens a row has. No key that
#: lets code of a model's folder run (`trust_remote_code`): whoever asks says so anew.
KEPT = (
    # the model
    "model_name_or_path", "model_revision", "adapter_name_or_path", "create_new_adapter",
    "resize_vocab", "add_tokens", "add_special_tokens", "split_special_tokens",
    "use_fast_tokenizer", "rope_scaling", "flash_attn", "quantization_bit", "quantization_method",
    "quantization_type", "double_quantization", "infer_dtype", "upcast_layernorm", "bf16", "fp16",
    "pure_bf16",
    # the adapter, where the run starts from a fresh one
    "finetuning_type", "lora_rank", "lora_alpha", "lora_dropout", "lora_target",
    "additional_target", "use_rslora", "use_dora", "pissa_init", "seed",
    # or the layers that are trained instead
    "freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules",
    # the rows
    "stage", "template", "dataset", "dataset_dir", "media_dir", "cutoff_len", "train_on_prompt",
    "mask_history", "default_system", "tool_format", "enable_thinking",
)  # fmt: skip

#: Keys among them that may hold a folder of this machine.
_PLACES = ("model_name_or_path", "adapter_name_or_path", "dataset_dir", "media_dir")


def loaded_from(config: RunConfig) -> dict[str, Any]:
    """Say where a run's model, checkpoints and rows lie, in plain JSON values.

    Returns:
        `arguments`, LlamaFactory's keys as the user set them, local paths absolute; `folders`,
        each a checkpoint or a run's folder with checkpoints.
    """
    given = config.given(KEPT)
    for key in _PLACES:
        if key in given:
            given[key] = _absolute(given[key])
    named = [*config.dataflex.gradstore_checkpoints, config.known.resume_from_checkpoint or ""]
    folders = [Path(name) for name in named if Path(name).is_dir() and name]
    arguments = json.loads(json.dumps(without_secrets(given), default=str))
    places = [*folders, config.output_dir]
    return {"arguments": arguments, "folders": [str(place.resolve()) for place in places]}


def loading_arguments(
    train: Generation, checkpoint: Path | None, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return LlamaFactory's keys that load a generation's model again.

    A store that does not say them has the template, the cut and the precision among its
    provenance, and a checkpoint names its base model.

    Args:
        train: a train generation.
        checkpoint: its adapter; None for a fresh one.
        changes: keys that take the place of recorded ones, such as `model_name_or_path`.

    Raises:
        BadInput: the base model is not known, or not where it was.
    """
    recorded = _recorded(train).get("arguments", {})
    rows = train.provenance.get("rows")
    known: dict[str, Any] = {
        "stage": train.provenance.get("stage", "sft"),
        "template": train.provenance.get("template"),
        "flash_attn": {"sdpa": "sdpa", "flash_attention_2": "fa2", "eager": "disabled"}.get(
            train.record.attention, "auto"
        ),
        **({train.record.autocast: True} if train.record.autocast != "off" else {}),
        **(rows if isinstance(rows, dict) else {}),
    }
    merged = recorded.get("adapter_name_or_path") if recorded.get("create_new_adapter") else None
    found = {**known, **recorded, **changes}
    if checkpoint is not None:
        if base := adapter_config(checkpoint).base_model_name_or_path:
            found.setdefault("model_name_or_path", base)
        merged = [merged] if isinstance(merged, str) else merged or []
        found["adapter_name_or_path"] = ",".join([*merged, str(checkpoint)])
        found["create_new_adapter"] = False
    model = found.get("model_name_or_path")
    if not model:
        raise BadInput(
            f"{train.name} does not say which model it was made with; name it with --model PATH."
        )
    if Path(str(model)).is_absolute() and not Path(str(model)).exists():
        raise BadInput(
            f"the model of {train.name} is no longer at {str(model)!r}; say where it is now with "
            "--model PATH."
        )
    return found


def find_checkpoint(train: Generation, store: Location, named: Path | None = None) -> Path | None:
    """Return the folder with the adapter that a generation was made at; None for a fresh one.

    It is looked for where the run kept its checkpoints, and beside the store, for both may have
    moved together; a bucket holds none. By its step alone: the caller compares the adapter's hash.

    Args:
        train: a train generation.
        store: where the store is.
        named: a checkpoint or a folder of checkpoints to look at in their place.

    Raises:
        BadInput: there is none; says which the folders hold. The run trained no adapter.
    """
    if (kind := _recorded(train).get("arguments", {}).get("finetuning_type", "lora")) != "lora":
        raise BadInput(
            f"{train.name} is of a run with finetuning_type {kind}, and questions are asked of "
            "models with a LoRA adapter. dataflex-cli gradstore score and query need no model."
        )
    places = [named] if named else [Path(place) for place in _recorded(train).get("folders", [])]
    if named is None and isinstance(store, Path) and store.resolve().parent not in places:
        places.append(store.resolve().parent)
    held = [folder for place in places for folder in (*checkpoints(place), place)]
    steps = {folder: _step(folder) for folder in held if (folder / ADAPTER_CONFIG).is_file()}
    for folder, step in steps.items():
        if step == train.step:
            return folder
    if train.step == 0 and named is None:
        return None
    there = ", ".join(sorted({f"{s}" for s in steps.values() if s is not None}, key=int))
    raise BadInput(
        f"no checkpoint of step {train.step}, at which {train.name} was made, is in "
        f"{', '.join(map(repr, map(str, places)))}: there are "
        + (f"those of steps {there}" if there else "none")
        + ". Name the folder with --checkpoint DIR; or ask a generation whose checkpoint is there "
        "with --generation NAME (`dataflex-cli gradstore build` makes one for each checkpoint)."
    )


def newest_at_hand(store: Store, run: str, named: Path | None = None) -> int | None:
    """Return the step of the newest train generation whose checkpoint is there; None if none is.

    A run selects more often than it saves, so that its newest features may have no checkpoint.

    Args:
        store: of the generations.
        run: prefix of the generations (`gradstore_run`).
        named: as for `find_checkpoint`.
    """
    trains = sorted(
        (
            each
            for each in store.generations()
            if each.space == GRADIENT and each.role == "train" and each.record.run == run
        ),
        key=lambda each: -each.step,
    )
    for train in trains:
        try:
            find_checkpoint(train, store.path, named)
        except BadInput:
            continue
        if train is not trains[0]:
            _log.warning("%s has no checkpoint to load: %s is asked", trains[0].name, train.name)
        return train.step
    return None


def _recorded(train: Generation) -> dict[str, Any]:
    held = train.record.libraries.get(LOADED_FROM)
    return dict(held) if isinstance(held, Mapping) else {}


def _step(folder: Path) -> int | None:
    try:
        return trainer_state(folder).global_step
    except (Incomplete, FileNotFoundError):
        return None


def _absolute(value: Any) -> Any:  # noqa: ANN401 - a YAML value
    if isinstance(value, list | tuple):
        return [_absolute(one) for one in value]
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.split(",")]
    return ",".join(str(Path(part).resolve()) if Path(part).exists() else part for part in parts)
