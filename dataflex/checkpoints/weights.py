"""Checkpoint contents beside the state: weights, an adapter's or all, and Adam moments."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Gt

from dataflex.checkpoints.seal import verify
from dataflex.config.parameters import Natural, Share
from dataflex.run.documents import read_document
from gradstore.errors import BadInput, DamagedData
from gradstore.export.moments import AdamMoments

ADAPTER_CONFIG = "adapter_config.json"

#: Where DeepSpeed and FSDP keep the optimizer's state instead of optimizer.pt.
SHARDED = ("global_step*", "optimizer_*", "optimizer.bin", "pytorch_model_fsdp*")

#: What the Trainer goes on with beside weights, and what each must hold; random states are one file
#: for each rank, and a scaler is there with fp16 alone.
STATES: Mapping[str, frozenset[str]] = {
    "optimizer.pt": frozenset({"state", "param_groups"}),
    "scheduler.pt": frozenset(),
    "rng_state*.pth": frozenset({"python", "numpy", "cpu"}),
    "scaler.pt": frozenset(),
}
OPTIONAL = ("scaler.pt",)


@dataclass(frozen=True)
class AdapterConfig:
    """The part of adapter_config.json that must be sound."""

    peft_type: str
    r: Natural = 0
    lora_alpha: Annotated[float, Gt(0)] = 1
    lora_dropout: Share = 0
    target_modules: tuple[str, ...] | str | None = None
    base_model_name_or_path: str | None = None


def adapter_config(folder: Path) -> AdapterConfig:
    """Read a checkpoint's adapter_config.json.

    Raises:
        DamagedData: it is damaged.
    """
    return read_document(
        folder / ADAPTER_CONFIG,
        AdapterConfig,
        "Name another checkpoint, or restore it from a copy.",
    )


def check_resumable(folder: Path) -> None:
    """Check that a complete checkpoint holds whole weights, and the state the Trainer resumes from.

    Without optimizer, scheduler or random states it would reset those without a warning.

    Raises:
        BadInput: something is missing, holds something else, or would run code when it is loaded.
        DamagedData: a file is cut short.
    """
    check_weights(folder)
    if any(next(folder.glob(pattern), None) for pattern in SHARDED):
        return  # DeepSpeed and FSDP keep all that in files of their own
    _check_trainer_state(folder / "trainer_state.json")
    for pattern, keys in STATES.items():
        found = sorted(folder.glob(pattern))
        if not found and pattern not in OPTIONAL:
            raise BadInput(
                f"checkpoint {str(folder)!r} has no {pattern} (save_only_model, or deleted): a "
                "resume would not be the same run. Resume from another checkpoint, or start "
                "a new run with overwrite_output_dir: true."
            )
        for path in found:
            load_plain(path, keys, "Resume from another checkpoint.")


def _check_trainer_state(path: Path) -> None:
    """Check that the Trainer takes its own state: no field that its version does not know."""
    from transformers import TrainerState

    try:
        TrainerState.load_from_json(str(path))
    except TypeError as error:
        raise DamagedData(
            f"{path} is damaged, or of another version of transformers ({error}). Resume from "
            "another checkpoint."
        ) from error


def check_weights(folder: Path) -> None:
    """Check that a checkpoint's safetensors exist and are complete.

    Raises:
        BadInput: there are none.
        DamagedData: one is cut short, or adapter_config.json is damaged.
    """
    from safetensors import SafetensorError, safe_open

    kind = "model"
    if (folder / ADAPTER_CONFIG).is_file():
        kind = "adapter_model"
        adapter_config(folder)
    found = list(folder.glob(f"{kind}*.safetensors"))
    if not (found or any(next(folder.glob(pattern), None) for pattern in SHARDED)):
        raise BadInput(f"checkpoint {str(folder)!r} has no {kind}.safetensors. Name another one.")
    for path in found:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise DamagedData(f"{path} is damaged: {error}. Resume from another one.") from error


def check_moments(folder: Path) -> None:
    """Check that a checkpoint holds readable moments, before a model is loaded for them.

    Raises:
        BadInput: it does not, or they would run code.
        DamagedData: they are not those that were saved.
    """
    path = _moments_file(folder)
    verify(folder, [path.relative_to(folder).as_posix()])
    if path.suffix == ".pt":
        load_optimizer_state(path)


def checkpoint_moments(folder: Path, model: Any) -> AdamMoments:  # noqa: ANN401 - a PeftModel
    """Load moments by name: our own file, or LlamaFactory's optimizer.pt without unpickling code.

    Raises:
        BadInput: neither is there, or they do not fit the model.
    """
    path = _moments_file(folder)
    if path.suffix == ".pt":
        state = load_optimizer_state(path)
        return AdamMoments.from_state_dict(state, optimizer_order(model))
    return AdamMoments.load(path)


def _moments_file(folder: Path) -> Path:
    for path in (folder / "dataflex" / "moments.safetensors", folder / "optimizer.pt"):
        if path.is_file():
            return path
    raise BadInput(
        f"checkpoint {str(folder)!r} has neither dataflex/moments.safetensors nor "
        "optimizer.pt (was it saved with save_only_model?). Adam features need one (gradient_type "
        "sgd or sign does not), and so does the run's next step."
    )


def load_adapter(model: Any, checkpoint: Path) -> None:  # noqa: ANN401 - a PeftModel
    """Put another checkpoint's weights into the adapter that is active.

    Raises:
        BadInput: the checkpoint's adapter does not fit the model.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    path = checkpoint / "adapter_model.safetensors"
    if not path.is_file():
        raise BadInput(
            f"checkpoint {str(checkpoint)!r} has no adapter_model.safetensors: "
            "name another one, or leave it out of gradstore_checkpoints."
        )
    try:
        answer = set_peft_model_state_dict(model, load_file(path))
    except RuntimeError as error:
        raise _unfit(path, str(error)) from error
    if answer.unexpected_keys:
        raise _unfit(path, f"unexpected {answer.unexpected_keys[0]}")


def load_weights(model: Any, checkpoint: Path) -> None:  # noqa: ANN401 - a PreTrainedModel
    """Put a checkpoint's weights into a model: its adapter, or all of it where it has none.

    Raises:
        BadInput: they do not fit the model.
    """
    if (checkpoint / ADAPTER_CONFIG).is_file():
        load_adapter(model, checkpoint)
    else:
        load_whole(model, checkpoint)


def load_whole(model: Any, checkpoint: Path) -> None:  # noqa: ANN401 - a PreTrainedModel
    """Put the weights of a checkpoint without an adapter into a model; a copy of them is read.

    Raises:
        BadInput: they do not fit the model.
    """
    import torch

    # As the model's own class reads them: it may keep parameters otherwise than their files.
    held, told = type(model).from_pretrained(
        checkpoint, config=model.config, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    for why in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if odd := sorted(map(str, told.get(why) or ())):
            kind = why.removesuffix("_keys")
            raise _unfit(checkpoint, f"{kind} {odd[0]}", "finetuning_type, resize_vocab")
    weights = dict(held.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def _unfit(path: Path, why: str, keys: str = "lora_rank, lora_target") -> BadInput:
    return BadInput(
        f"{path} does not fit the model: {why}. Set {keys} and model_name_or_path as they were "
        "when it was trained, or name other checkpoints."
    )


def load_optimizer_state(path: Path) -> Mapping[str, Any]:
    """Load an optimizer.pt as plain tensors; one that needs full unpickling is refused.

    Raises:
        BadInput: it would run code, or is no optimizer's state.
        DamagedData: it is cut short.
    """
    return load_plain(
        path,
        STATES["optimizer.pt"],
        "Train with dataflex-cli, which saves moments as safetensors, or use gradient_type sgd or "
        "sign.",
    )


def load_plain(path: Path, keys: frozenset[str], instead: str) -> Mapping[str, Any]:
    """Load a file of torch's that holds a dict of plain values and tensors, and run no code of it.

    Tensors are mapped from the file: their bytes are not read here.

    Args:
        path: the file.
        keys: what the dict must have.
        instead: the next step, for the message.

    Raises:
        BadInput: it holds more than plain values (loading them would run code), or lacks a key.
        DamagedData: it is no file of torch's, or its end is missing.
    """
    import pickle

    import torch
    from transformers.trainer_pt_utils import safe_globals

    try:
        # Random states hold NumPy's arrays.
        with safe_globals():  # type: ignore[no-untyped-call]
            mapped = zipfile.is_zipfile(path)
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{path} cannot be loaded without running code it contains; it was not opened. "
            f"{instead}"
        ) from error
    except Exception as error:  # a changed byte of a pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DamagedData(f"{path} is damaged ({reason:.200}). {instead}") from error
    if not isinstance(state, Mapping) or (missing := keys - set(state)):
        lacks = ", ".join(sorted(missing)) if isinstance(state, Mapping) else "a mapping"
        kind = path.stem.partition("_")[0]
        raise BadInput(f"{path} is no {kind} state: it does not hold {lacks}. {instead}")
    return state


def optimizer_order(model: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 - a PreTrainedModel
    """List the trained parameters in the Trainer's order: decayed ones, then the others."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [pair for pair in trained if pair[0] in decayed] + [
        pair for pair in trained if pair[0] not in decayed
    ]
