"""A configuration's plain training by LlamaFactory alone, and all that decides where it ends."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dataflex.config.keys import RunConfig
from dataflex.config.secrets import without_secrets
from dataflex.data.rows import Rows, RunData
from gradstore.format.canonical import sha256_json
from gradstore.storage.hashing import hash_folder_files

#: What a retraining has no use for: it is trained, measured and forgotten.
_NOT_KEPT: Mapping[str, Any] = {
    "do_train": True,
    "do_eval": False,
    "do_predict": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_strategy": "no",
    "load_best_model_at_end": False,
    "report_to": "none",
    "plot_loss": False,
    "push_to_hub": False,
    "disable_tqdm": True,
    "overwrite_output_dir": True,
    "resume_from_checkpoint": None,
}

#: Keys that decide no loss; `seed` is a part of each banked entry.
_WITHOUT_EFFECT = frozenset(_NOT_KEPT) | {
    "output_dir", "logging_steps", "logging_dir", "save_steps", "eval_steps",
    "save_total_limit", "save_only_model", "run_name", "overwrite_cache", "seed",
    "preprocessing_num_workers", "dataset_dir",
}  # fmt: skip

#: Libraries that train; torch says its own version, which tells builds apart.
_LIBRARIES = ("accelerate", "llamafactory", "peft", "transformers")

#: Files of a model or an adapter that decide what it computes.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "config.json",
            "adapter_config.json")  # fmt: skip


def plain_arguments(config: RunConfig) -> dict[str, Any]:
    """Return LlamaFactory's arguments of a run's plain training, of which nothing is kept."""
    args = {**config.llamafactory, **_NOT_KEPT}
    if (steps := config.dataflex.train_step) > 0:
        args["max_steps"] = steps
    return args


def deciding(args: Mapping[str, Any], data: RunData, device: str) -> dict[str, object]:
    """Return what decides the losses of a plain training besides its seed, as plain JSON.

    That is its arguments, its rows, the weights that it starts from, and where and by what it is
    computed: other kernels round otherwise, and an optimizer makes that visible.

    Args:
        args: as `plain_arguments` gave them.
        data: its rows.
        device: kind of device that trains, cpu or cuda.

    Raises:
        StoreIOError: a file of weights can't be read.
    """
    held = {k: v for k, v in args.items() if k not in _WITHOUT_EFFECT}
    return {
        **without_secrets(held),
        "train_rows": _sha256(data.train),
        "target_rows": {rows.name: _sha256(rows) for rows in data.targets},
        "model_weights": _weights(str(args.get("model_name_or_path")), args),
        "adapter_weights": [_weights(place, args) for place in _adapters(args)],
        "device": device,
        **_versions(),
    }


def _adapters(args: Mapping[str, Any]) -> list[str]:
    listed = args.get("adapter_name_or_path") or ()
    return [str(place).strip()
            for place in (listed.split(",") if isinstance(listed, str) else listed)]  # fmt: skip


def _weights(place: str, args: Mapping[str, Any]) -> str | None:
    """Identify the weights in a folder, or under a hub's name.

    Returns:
        The sha256 of a folder's files; the commit of a name that the Hugging Face cache has; else
        None.
    """
    from huggingface_hub import try_to_load_from_cache

    if (folder := Path(place).expanduser()).is_dir():
        return sha256_json(hash_folder_files(folder, _WEIGHTS))
    with contextlib.suppress(ValueError):  # no name that a hub could have
        for name in ("config.json", "adapter_config.json"):
            found = try_to_load_from_cache(
                place, name, cache_dir=args.get("cache_dir"), revision=args.get("model_revision")
            )
            if isinstance(found, str):
                return f"commit {Path(found).parent.name}"
    return None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"torch": str(torch.__version__)}  # is of a kind of its own
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a folder that is on the path
            found[name] = None
    return found


def _sha256(rows: Rows) -> str:
    return hashlib.sha256(rows.row_set.hashes.tobytes()).hexdigest()
