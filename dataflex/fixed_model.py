"""Models beside the one in training: loaded once, never trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradstore.errors import BadInput


def load_language_model(path: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """A causal language model that is not trained, in eval mode, and its tokenizer.

    Raises:
        BadInput: it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    return load_model(path, AutoModelForCausalLM, trust_remote_code)


def load_model(path: str, kind: Any, trust_remote_code: bool) -> tuple[Any, Any]:  # noqa: ANN401
    """A model by its AutoModel class, in eval mode and frozen, and its tokenizer.

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
    """What transformers raises for a model that cannot be loaded becomes BadInput."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"model {path!r} cannot be loaded: {reason}") from error


def model_path_faults(key: str, path: str) -> list[str]:
    """What shows of a model's path without loading it: a folder must hold a config.json."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        try:
            json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return [f"{key} {path!r} has no readable config.json: {error}"]
    elif folder.is_absolute() or path.startswith(".") or len(folder.parts) > 2:
        return [f"{key} {path!r} is not a folder on this machine."]
    return []
