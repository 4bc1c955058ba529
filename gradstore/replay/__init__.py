"""Influence by replay: the exact derivative of a training run's outcome by its rows' weights."""

from gradstore.replay.influence import replay_forwards, replay_influence
from gradstore.replay.kept import Backwards, Kept
from gradstore.replay.price import Limits, ReplayCost, forecast
from gradstore.replay.run import AdamW, MicroBatch, Moments, Sgd, Step, TrainingRun
from gradstore.replay.table import ReplayTable, Target

__all__ = [
    "AdamW",
    "Backwards",
    "Kept",
    "Limits",
    "MicroBatch",
    "Moments",
    "ReplayCost",
    "ReplayTable",
    "Sgd",
    "Step",
    "Target",
    "TrainingRun",
    "forecast",
    "replay_forwards",
    "replay_influence",
]
