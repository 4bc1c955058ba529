"""LLM training on changing data: selection, mixing and weighting, on top of LlamaFactory.

Public names are imported when they are first used, so that `import dataflex` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataflex.launch.explain import Explainer, open_model
    from dataflex.report.frames import selections_frame

__version__ = "0.2.0"

_MODULES = {
    "Explainer": "launch.explain",
    "open_model": "launch.explain",
    "selections_frame": "report.frames",
}

__all__ = ["Explainer", "open_model", "selections_frame"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'dataflex' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dataflex.{_MODULES[name]}"), name)
