"""A store of per-sample gradient features: write them once, query them for any target.

The public names are imported when they are first used, so that `import gradstore` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstore.embeddings import export_embeddings, read_unit_rows
    from gradstore.export import compute_unit, export_features, export_generation
    from gradstore.features import FeatureSpec
    from gradstore.gradients import GradientCapture, batch_losses
    from gradstore.index import FeatureIndex
    from gradstore.influence import influence_scores
    from gradstore.moments import AdamMoments
    from gradstore.pairing import checkpoint_features
    from gradstore.query import query_influence
    from gradstore.records import GenerationRecord, RowSet, row_hash
    from gradstore.selection import select_top, write_selected
    from gradstore.store import open_store
    from gradstore.units import UnitSink
    from gradstore.writer import StoreWriter

_MODULES = {
    "AdamMoments": "moments",
    "FeatureIndex": "index",
    "FeatureSpec": "features",
    "GenerationRecord": "records",
    "GradientCapture": "gradients",
    "RowSet": "records",
    "StoreWriter": "writer",
    "UnitSink": "units",
    "batch_losses": "gradients",
    "checkpoint_features": "pairing",
    "compute_unit": "export",
    "export_embeddings": "embeddings",
    "export_features": "export",
    "export_generation": "export",
    "influence_scores": "influence",
    "open_store": "store",
    "query_influence": "query",
    "read_unit_rows": "embeddings",
    "row_hash": "records",
    "select_top": "selection",
    "write_selected": "selection",
}

__all__ = [
    "AdamMoments",
    "FeatureIndex",
    "FeatureSpec",
    "GenerationRecord",
    "GradientCapture",
    "RowSet",
    "StoreWriter",
    "UnitSink",
    "batch_losses",
    "checkpoint_features",
    "compute_unit",
    "export_embeddings",
    "export_features",
    "export_generation",
    "influence_scores",
    "open_store",
    "query_influence",
    "read_unit_rows",
    "row_hash",
    "select_top",
    "write_selected",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'gradstore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gradstore.{_MODULES[name]}"), name)
