"""Settings of gradient features, shared by the influence-based strategies."""

from __future__ import annotations

from dataclasses import dataclass

from dataflex.config.parameters import checked
from gradstore.export.kronecker import CurvatureRule
from gradstore.export.settings import GradientSettings


@checked
@dataclass(frozen=True)
class FeatureSettings(GradientSettings):
    """Settings of gradient features, from a user's parameters.

    Args:
        gradient_type: feature of a training row: adam_marginal (what the row adds to Adam's step),
            adam_share (what it adds as one row of a step's many, clipped: docs/products.md), adam
            (the whole step, as published), sgd, sign.
        adam_eps_mode: eps inside the square root (published) or outside.
        bias_correction: correct the moments for their start at zero: divide by 1 - beta ** (t + 1).
        gradient_modules: of a model trained without LoRA (finetuning_type full or freeze), linear
            takes the gradients of its linear layers; all takes embeddings, the output layer and
            norms as well; a list those of the modules it names: docs/full-parameters.md.
        proj_method: sjlt; rademacher, dense; gaussian, as dense, which on a CPU takes 15 to 35
            times as long as rademacher and is no more exact; or trak: to compare with LESS and TRAK
            byte by byte (TRAK's own projector, on the CPU; slow, 512 bytes of RAM a parameter,
            whole gradients).
        proj_dim: projected dimensions d.
        sjlt_s: non-zeros per parameter of sjlt, at most proj_dim.
        seed: of the projection; each checkpoint projects with hash(seed, step), under trak with
            the seed itself (LESS has 0).
        dtype: of stored training rows: 1bit, int8, bfloat16, float16 or float32; target rows are
            kept in float16 where those are 1bit or int8.
        tokens_per_batch: padded tokens of a gradient batch; null takes 2,048 on a CPU, and on a GPU
            what it has room for.
        max_bad_fraction: share of rows with non-finite gradients above which the run stops.
        unit_rows: rows of a unit, which is written, leased and redone as a whole
            (docs/store-format.md); a generation that was begun goes on in units of its own.

    Raises:
        BadParameter: a value of a wrong type or out of range.
        ValueError: more non-zeros than dimensions, or proj_method trak without TRAK.
    """


@dataclass(frozen=True)
class CurvedSettings(FeatureSettings):
    """Settings of gradient features that are put into a metric before they are projected.

    Args:
        rule: of the metric.

    Raises:
        ValueError: the metric is not for such features, or `rule` is missing.
    """

    rule: CurvatureRule | None = None

    def __post_init__(self) -> None:
        """Check the rule."""
        super().__post_init__()
        if self.rule is None:
            raise ValueError("CurvedSettings needs a rule")
        self.rule.check(self.gradient_type)

    @property
    def curvature(self) -> CurvatureRule | None:
        """The metric's rule."""
        return self.rule
