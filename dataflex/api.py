"""All that a strategy of a user's own imports: bases, answers, contexts, registration, refusal.

>>> from dataflex.api import Selection, Selector, UpdateContext
"""

from __future__ import annotations

from dataflex.config.registry import register
from dataflex.data.rows import Domains, RawRows, Rows, RunData
from dataflex.mixers.base import DomainLosses, Mixer
from dataflex.reorders.base import Ordering, Reorder
from dataflex.run.context import RunContext, UpdateContext
from dataflex.run.forecast import Forecast, measured_seconds
from dataflex.run.spread import spread_of
from dataflex.run.strategy import FSDP, ZERO3, Strategy
from dataflex.selectors.base import Selection, Selector
from dataflex.weighters.base import (
    FloatArray,
    LossContributor,
    MeasuredBatch,
    WeightContext,
    Weighter,
)
from gradstore.errors import BadInput

__all__ = [
    "FSDP",
    "ZERO3",
    "BadInput",
    "DomainLosses",
    "Domains",
    "FloatArray",
    "Forecast",
    "LossContributor",
    "MeasuredBatch",
    "Mixer",
    "Ordering",
    "RawRows",
    "Reorder",
    "Rows",
    "RunContext",
    "RunData",
    "Selection",
    "Selector",
    "Strategy",
    "UpdateContext",
    "WeightContext",
    "Weighter",
    "measured_seconds",
    "register",
    "spread_of",
]
