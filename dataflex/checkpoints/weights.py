"""Checkpoint contents beside the state: adapter weights and Adam moments."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradstore.errors import BadInput, DamagedData
from gradstore.export.moments import AdamMoments

#: Where DeepSpeed and FSDP keep the optimizer's state instead of optimizer.pt.
SHARDED = ("global_step*", "optimizer_*", "optimizer.bin", "pytorch_model_fsdp*")


#: What the Trainer goes on with beside weights; random states are one file for each rank.
STATES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth")


def check_resumable(folder: Path) -> None:
    """Check that a complete checkpoint holds whole weights, and the state the Trainer resumes from.

    Without optimizer, scheduler or random states it would reset those without a warning.

    Raises:
        BadInput: something is missing.
        DamagedData: a file is cut short.
    """
    check_weights(folder)
    if any(next(folder.glob(pattern), None) for pattern in SHARDED):
        return  # DeepSpeed and FSDP keep all that in files of their own
    for pattern in STATES:
        found = list(folder.glob(pattern))
        if not found:
            raise BadInput(
                f"checkpoint {str(folder)!r} has no {pattern} (save_only_model, or deleted): a "
                "resume would not be the same run. Resume from another checkpoint, or start "
                "a new run with overwrite_output_dir: true."
            )
        for path in found:
            if not zipfile.is_zipfile(path):
                raise DamagedData(f"{path} is damaged: its end is missing. Resume from another.")


def check_weights(folder: Path) -> None:
    """Check that a checkpoint's safetensors exist and are complete.

    Raises:
        BadInput: there are none.
        DamagedData: one is cut short.
    """
    from safetensors import SafetensorError, safe_open

    kind = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
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
    """
    path = _moments_file(folder)
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
        "optimizer.pt (was it saved with save_only_model?). Adam features need one; "
        "gradient_type sgd or sign does not."
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
        raise BadInput(f"checkpoint {str(checkpoint)!r} has no adapter_model.safetensors.")
    try:
        answer = set_peft_model_state_dict(model, load_file(path))
    except RuntimeError as error:
        raise BadInput(f"{path} does not fit the model: {error}") from error
    if answer.unexpected_keys:
        raise BadInput(f"{path} does not fit the model: unexpected {answer.unexpected_keys[0]}.")


def load_optimizer_state(path: Path) -> Mapping[str, Any]:
    """Load an optimizer.pt as plain tensors; one that needs full unpickling is refused.

    Raises:
        BadInput: it would run code, or is no optimizer state.
    """
    import pickle

    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise BadInput(
            f"{path} cannot be loaded without running code it contains; it was not opened. "
            "Train with dataflex-cli, which saves moments as safetensors, or use gradient_type "
            "sgd or sign."
        ) from error
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise BadInput(f"{path} is no optimizer state.")
    return state


def optimizer_order(model: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 - a PreTrainedModel
    """List the trained parameters in the Trainer's order: decayed ones, then the others."""
    from transformers import Trainer

    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [pair for pair in trained if pair[0] in decayed] + [
        pair for pair in trained if pair[0] not in decayed
    ]
