"""LLM training on changing data: selection, mixing and weighting, on top of LlamaFactory.

Public names are imported when they are first used, so that `import dataflex` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataflex.launch.configuration import read as read_configuration
    from dataflex.launch.explain import Explainer, open_model
    from dataflex.launch.replayed import Replay, replay_run
    from dataflex.report.frames import selections_frame

__version__ = "0.2.0"

#: Public name -> module:name.
_PLACES = {
    "Explainer": "launch.explain:Explainer",
    "Replay": "launch.replayed:Replay",
    "open_model": "launch.explain:open_model",
    "read_configuration": "launch.configuration:read",
    "replay_run": "launch.replayed:replay_run",
    "selections_frame": "report.frames:selections_frame",
}

__all__ = [
    "Explainer",
    "Replay",
    "open_model",
    "read_configuration",
    "replay_run",
    "selections_frame",
]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
    module, _, found = _PLACES[name].partition(":")
    return getattr(importlib.import_module(f"dataflex.{module}"), found)
