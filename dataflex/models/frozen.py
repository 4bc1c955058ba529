"""A second, frozen model to compare the one in training with: a full model or a LoRA adapter.

It is never part of the model in training: no optimizer, gradient capture or checkpoint sees it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dataflex.models.paths import ADAPTER
from dataflex.models.precision import autocast
from gradstore.capture.losses import Targets, target_losses
from gradstore.errors import BadInput

if TYPE_CHECKING:
    from torch import nn

    from dataflex.config.keys import RunConfig
    from dataflex.run.context import RunContext


class Reference:
    """A frozen model with the vocabulary of the one in training.

    Args:
        run: the run it is compared with.
        path: a model folder, an adapter folder, or a hub id.
        key: what the user calls it, for messages.

    Raises:
        BadInput: it cannot be loaded, or has another vocabulary size.
    """

    def __init__(self, run: RunContext, path: str, key: str) -> None:
        folder = Path(path).expanduser()
        is_adapter = (folder / ADAPTER).is_file()
        with _refusals(f"{key} {path!r}"):
            model = _adapted(run, folder) if is_adapter else _loaded(run, str(folder), path)
        model.requires_grad_(False)
        self.model = model.eval()
        self._autocast = run.autocast

    def token_losses(self, inputs: Mapping[str, Tensor], targets: Targets) -> Tensor:
        """Compute (s,) float32 cross-entropy at the target positions.

        Args:
            inputs: a batch (b, t) on the device of the model in training.
            targets: its target positions.
        """
        if next(self.model.parameters()).device != targets.tokens.device:
            self.model.to(targets.tokens.device)
        with torch.no_grad(), autocast(self.model, self._autocast):
            return target_losses(self.model, inputs, targets)


def _adapted(run: RunContext, folder: Path) -> nn.Module:
    """Load the run's base model with another adapter."""
    from peft import PeftModel

    if _is_sharded(run.config):
        name = str(run.config.known.model_name_or_path)
        base = _loaded(run, name, name)
    else:
        base = _base_beside(run.model)
    found: nn.Module = PeftModel.from_pretrained(base, str(folder))
    return found


def _base_beside(model: nn.Module) -> nn.Module:
    """Copy the base of a model that is not trained yet into a separate module.

    Frozen weights are shared, so that beside a LoRA run it costs no memory; the others are copied.
    """
    shared = [p for p in model.parameters() if not p.requires_grad]
    copied = copy.deepcopy(model, {id(p): p for p in shared})
    unload: Callable[[], nn.Module] | None = getattr(copied, "unload", None)
    return copied if unload is None else unload()


def _loaded(run: RunContext, source: str, shown: str) -> nn.Module:
    """Load a full model from a folder or the hub, in the precision of the model in training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {"trust_remote_code": run.config.known.trust_remote_code}
    settings = AutoConfig.from_pretrained(source, **options)
    own = _vocabulary(run.model.config)
    if (other := _vocabulary(settings)) != own:
        raise BadInput(
            f"{shown!r} has a vocabulary of {other} tokens, the model in training one of {own}: "
            "their losses cannot be compared. Use a reference with the same tokenizer."
        )
    with _whole_weights():
        found: nn.Module = AutoModelForCausalLM.from_pretrained(
            source, config=settings, dtype=getattr(run.model.config, "dtype", None), **options
        )
    return found


def _vocabulary(settings: Any) -> int:  # noqa: ANN401 - a PretrainedConfig
    return int(settings.get_text_config().vocab_size)


def _is_sharded(config: RunConfig) -> bool:
    """Return whether the weights in training may be sharded over several devices."""
    return bool(config.known.deepspeed or config.known.fsdp)


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Prevent transformers from sharding a model under ZeRO-3, as no engine would gather it."""
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Convert loading errors for a folder or hub id that is not a model to `BadInput`."""
    from safetensors import SafetensorError

    faults = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)
    try:
        yield
    except BadInput:
        raise
    except (*faults, json.JSONDecodeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise BadInput(f"{what} cannot be loaded: {reason}") from error


def load_language_model(path: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Load a frozen causal language model, in eval mode, and its tokenizer.

    Raises:
        BadInput: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return load_model(path, AutoModelForCausalLM, trust_remote_code)


def load_model(path: str, kind: Any, trust_remote_code: bool) -> tuple[Any, Any]:  # noqa: ANN401
    """Load a model by its AutoModel class, in eval mode and frozen, and its tokenizer.

    Raises:
        BadInput: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    with named_faults(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = kind.from_pretrained(path, dtype="auto", trust_remote_code=trust_remote_code)
    model.requires_grad_(False)
    return model.eval(), tokenizer


@contextmanager
def named_faults(path: str) -> Iterator[None]:
    """Convert transformers' errors for a model that cannot be loaded to BadInput."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"model {path!r} cannot be loaded: {reason}") from error
