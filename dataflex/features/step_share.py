"""The share of each training row in an optimizer step of this run, for features that need it."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dataflex.data.order import BatchShape
from dataflex.models.passes import longest_row
from dataflex.run.context import RunContext, UpdateContext
from gradstore.capture.limits import token_budget
from gradstore.errors import BadInput
from gradstore.export.share import OptimizerStep, StepShare, expected_share
from gradstore.export.units import Batches

_log = logging.getLogger(__name__)

#: Clip factor below which products with norms predicted steps no better than cosines
#: (benchmarks/quality/effect.py, `adam_share`: better in 12 of 12 runs above it, in 3 of 7 below;
#: `adam_marginal` in 9 and 2, `sgd` in 8 and 2).
LEAST_CLIP = 0.6
#: Features whose products the factor says something about; those of published Adam were better with
#: norms in 5 of 7 runs below too, those of signs are not measured.
TOLD_BY_CLIP = ("adam_marginal", "adam_share", "sgd")

if TYPE_CHECKING:
    from collections.abc import Callable

    from dataflex.features.settings import FeatureSettings
    from gradstore.export.features import FeatureSpec
    from gradstore.format.records import GenerationRecord
    from gradstore.store.reader import Store


def step_of(args: Any) -> OptimizerStep:  # noqa: ANN401 - TrainingArguments
    """Read rows and clipping of an optimizer step from transformers' TrainingArguments."""
    return OptimizerStep(BatchShape.of(args).rows, max(float(args.max_grad_norm or 0.0), 0.0))


def train_features(
    run: RunContext, settings: FeatureSettings, store: Callable[[], Store] | None = None
) -> FeatureSpec:
    """Return the feature of a training row, with its share where it needs one; collective.

    Rank 0 takes the gradients of a few hundred training rows by lot, the others wait.

    Args:
        run: whose rows and step they are.
        settings: of the features.
        store: gives on rank 0 the store that the rows go to; those that were removed from it on
            request are not drawn.

    Raises:
        BadInput: a share is needed and `run` does not know its step.
    """
    features = settings.train_features
    if not features.needs_share:
        return features
    step, rows = _step(run, features), run.data.train
    budget = settings.tokens_per_batch or token_budget(run.model)

    def estimate() -> FeatureSpec:
        batches = Batches(rows.dataset, run.collate, rows.lengths, budget,
                          longest_row(run.model, rows), room=run.whole_room)  # fmt: skip
        left = None if store is None else store().without_forgotten(rows.row_set, of="")
        drawn = batches.sample(settings.seed, None if left is None else left.forgotten)
        return replace(features, share=expected_share(run.model, drawn, step, features.modules))

    found = run.ranks.decide(estimate)
    assert found.share is not None
    if run.ranks.leads:
        _say_if_clipped(found.share)
    return found


def tell_clipping(context: UpdateContext, settings: FeatureSettings) -> None:
    """Say of a product with norms where steps are clipped so hard that a cosine is as good.

    By the norms that the Trainer logged; features with a share estimate it, and say so themselves.
    """
    run, norms = context.run, context.grad_norms
    known = settings.gradient_type in TOLD_BY_CLIP and not settings.train_features.needs_share
    if known and run.step is not None and norms and run.ranks.leads:
        norm = math.sqrt(sum(norm**2 for norm in norms) / len(norms))
        _say_if_clipped(StepShare(run.step.rows, run.step.max_grad_norm, 1.0, norm))


def _say_if_clipped(share: StepShare) -> None:
    if share.clip < LEAST_CLIP:
        _log.info(
            "a step's gradient is clipped to %.0f%% of its length (max_grad_norm %g): normalize: "
            "cosine predicts such steps as well as products with norms",
            100 * share.clip, share.max_grad_norm,
        )  # fmt: skip


def features_again(
    run: RunContext, settings: FeatureSettings, record: GenerationRecord
) -> FeatureSpec:
    """Return the feature of a generation's rows, with the share that it was made with.

    Rows may have been removed since, and an estimate from the others would be another.
    """
    features = settings.train_features if record.role == "train" else settings.target_features
    told = record.feature_options.get("share")
    if not features.needs_share or not told:
        return features
    step = _step(run, features)
    share = StepShare(**{**told, "rows": step.rows, "max_grad_norm": step.max_grad_norm})
    return replace(features, share=share)


def _step(run: RunContext, features: FeatureSpec) -> OptimizerStep:
    if run.step is None:
        raise BadInput(
            f"gradient_type {features.kind} needs the rows of an optimizer step, which this run "
            "does not tell (RunContext.step); take gradient_type adam_marginal."
        )
    return run.step
