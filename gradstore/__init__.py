"""A store of per-sample gradient features: write them once, query them for any target.

The public names are imported when they are first used, so that `import gradstore` stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradstore.capture.per_sample import GradientCapture, batch_losses
    from gradstore.export.embeddings import compute_embedding_unit
    from gradstore.export.features import FeatureSpec, Recipe
    from gradstore.export.moments import AdamMoments
    from gradstore.export.projected import compute_unit, export_features
    from gradstore.export.settings import BuildSettings
    from gradstore.export.units import Batches
    from gradstore.format.records import GenerationRecord, RowSet, row_hash
    from gradstore.format.text_table import Text
    from gradstore.scoring.choose import select_subset
    from gradstore.scoring.comparable import CheckpointFeatures
    from gradstore.scoring.frames import open_store
    from gradstore.scoring.influence import influence_scores
    from gradstore.scoring.pairing import checkpoint_features
    from gradstore.scoring.products import InnerProduct
    from gradstore.scoring.query import query_influence
    from gradstore.scoring.selection import select_top, write_selected
    from gradstore.similarity.audit import AuditOptions, audit
    from gradstore.similarity.bm25 import bm25_scores
    from gradstore.similarity.index import FeatureIndex
    from gradstore.similarity.rows import read_unit_rows
    from gradstore.storage.leases import Worker
    from gradstore.store.building import build
    from gradstore.store.filling import UnitSink, fill
    from gradstore.store.writer import StoreWriter

_MODULES = {
    "AdamMoments": "export.moments",
    "AuditOptions": "similarity.audit",
    "Batches": "export.units",
    "BuildSettings": "export.settings",
    "CheckpointFeatures": "scoring.comparable",
    "FeatureIndex": "similarity.index",
    "FeatureSpec": "export.features",
    "GenerationRecord": "format.records",
    "GradientCapture": "capture.per_sample",
    "InnerProduct": "scoring.products",
    "Recipe": "export.features",
    "RowSet": "format.records",
    "StoreWriter": "store.writer",
    "Text": "format.text_table",
    "UnitSink": "store.filling",
    "Worker": "storage.leases",
    "audit": "similarity.audit",
    "batch_losses": "capture.per_sample",
    "bm25_scores": "similarity.bm25",
    "build": "store.building",
    "checkpoint_features": "scoring.pairing",
    "compute_embedding_unit": "export.embeddings",
    "compute_unit": "export.projected",
    "export_features": "export.projected",
    "fill": "store.filling",
    "influence_scores": "scoring.influence",
    "open_store": "scoring.frames",
    "query_influence": "scoring.query",
    "read_unit_rows": "similarity.rows",
    "row_hash": "format.records",
    "select_subset": "scoring.choose",
    "select_top": "scoring.selection",
    "write_selected": "scoring.selection",
}

__all__ = [
    "AdamMoments",
    "AuditOptions",
    "Batches",
    "BuildSettings",
    "CheckpointFeatures",
    "FeatureIndex",
    "FeatureSpec",
    "GenerationRecord",
    "GradientCapture",
    "InnerProduct",
    "Recipe",
    "RowSet",
    "StoreWriter",
    "Text",
    "UnitSink",
    "Worker",
    "audit",
    "batch_losses",
    "bm25_scores",
    "build",
    "checkpoint_features",
    "compute_embedding_unit",
    "compute_unit",
    "export_features",
    "fill",
    "influence_scores",
    "open_store",
    "query_influence",
    "read_unit_rows",
    "row_hash",
    "select_subset",
    "select_top",
    "write_selected",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'gradstore' has no attribute {name!r}")
    return getattr(importlib.import_module(f"gradstore.{_MODULES[name]}"), name)
