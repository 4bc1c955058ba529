"""Mapping of DataFlex 1.1.0's judge settings to the present names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from dataflex.config.registry import unknown

_log = logging.getLogger(__name__)

#: Values of `reward_model_backend` -> `reward_backend`.
BACKENDS = {"local_vllm": "local", "local": "local", "api": "api", "function": "function"}

#: Keys of `reward_backend_params`, by their backend -> parameters here.
KEYS: Mapping[str, Mapping[str, str]] = {
    "local": {"hf_model_name_or_path": "reward_model_path",
              "vllm_max_tokens": "reward_max_new_tokens"},
    "api": {"api_url": "api_base_url", "api_key": "api_key_env", "model_name": "api_model"},
}  # fmt: skip

#: Keys without effect: judges decode greedily, without vLLM.
SILENT = {
    "local": {f"vllm_{name}" for name in ("tensor_parallel_size", "temperature", "top_p", "top_k",
                                          "seed", "max_model_len", "gpu_memory_utilization")},
    "api": {"temperature"},
}  # fmt: skip


def renamed(backend: str, params: Mapping[str, Mapping[str, Any]] | None) -> dict[str, Any]:
    """Convert 1.1.0's pair of judge settings to parameters of `NiceSelector`.

    Args:
        backend: `reward_model_backend`.
        params: `reward_backend_params`, by backend; the others' are left alone.

    Raises:
        ValueError: an unknown backend, or unknown keys of it.
    """
    if backend not in BACKENDS:
        raise ValueError(unknown("reward_model_backend", [backend], BACKENDS))
    ours = BACKENDS[backend]
    held = dict((params or {}).get(backend) or {})
    keys, silent = KEYS.get(ours, {}), SILENT.get(ours, set())
    if extra := set(held) - set(keys) - silent:
        raise ValueError(unknown(f"reward_backend_params of {backend}", extra, {*keys, *silent}))
    if ignored := sorted(silent & set(held)):
        _log.warning(
            "reward_backend_params: %s ignored: a judge decodes greedily, and runs on transformers",
            ", ".join(ignored),
        )
    found = {"reward_backend": ours, **{keys[k]: v for k, v in held.items() if k in keys}}
    if "api_base_url" in found:
        found["api_base_url"] = str(found["api_base_url"]).removesuffix("/chat/completions")
    return found
