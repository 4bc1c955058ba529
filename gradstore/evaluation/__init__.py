"""Metrics that say how far scores can be trusted, and the bank of retrained models they need."""

from gradstore.evaluation.estimates import Estimate, estimate
from gradstore.evaluation.ranking import (
    average_precision,
    mean_reciprocal_rank,
    ndcg_at_k,
    overlap_at,
    rank_correlation,
    recall_at_k,
)
from gradstore.evaluation.retraining import (
    draw_subsets,
    lds,
    query_loss_difference,
    tail_patch,
    tail_patch_log,
    without_top,
)
from gradstore.evaluation.two_way import (
    Resampled,
    Resamples,
    resampled,
    resampled_lds,
    resampled_qld,
)

__all__ = [
    "Estimate",
    "Resampled",
    "Resamples",
    "average_precision",
    "draw_subsets",
    "estimate",
    "lds",
    "mean_reciprocal_rank",
    "ndcg_at_k",
    "overlap_at",
    "query_loss_difference",
    "rank_correlation",
    "recall_at_k",
    "resampled",
    "resampled_lds",
    "resampled_qld",
    "tail_patch",
    "tail_patch_log",
    "without_top",
]
