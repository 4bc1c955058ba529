"""Settings of gradient features, shared by the influence-based strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Interval
from gradkernels import ProjectionSpec

from dataflex.config.parameters import Count, Natural, Share, checked
from gradstore.export.features import FeatureSpec


@checked
@dataclass(frozen=True)
class FeatureSettings:
    """Settings of gradient features, from a user's parameters.

    Args:
        gradient_type: feature of a training row: adam_marginal (what the row adds to Adam's step),
            adam (the whole step, as published), sgd, sign.
        adam_eps_mode: eps inside the square root (published) or outside.
        bias_correction: correct the moments for their start at zero: divide by 1 - beta ** (t + 1).
        proj_method: sjlt, rademacher or gaussian.
        proj_dim: projected dimensions d.
        sjlt_s: non-zeros per parameter of sjlt, at most proj_dim.
        seed: of the projection; each checkpoint projects with hash(seed, step).
        dtype: of stored features, float16 or bfloat16.
        tokens_per_batch: padded tokens of a gradient batch; null chooses by device.
        max_bad_fraction: share of rows with non-finite gradients above which the run stops.

    Raises:
        BadParameter: a value of a wrong type or out of range.
        ValueError: more non-zeros than dimensions.
    """

    gradient_type: Literal["adam_marginal", "adam", "sgd", "sign"] = "adam_marginal"
    adam_eps_mode: Literal["inside", "outside"] = "inside"
    bias_correction: bool = False
    proj_method: Literal["sjlt", "rademacher", "gaussian"] = "sjlt"
    proj_dim: Annotated[int, Interval(ge=1, le=1 << 24)] = 8192
    sjlt_s: Count = 8
    seed: Natural = 42
    dtype: Literal["float16", "bfloat16"] = "float16"
    tokens_per_batch: Count | None = None
    max_bad_fraction: Share = 0.01

    def __post_init__(self) -> None:
        """Let the projection check how its parameters relate to each other."""
        ProjectionSpec(self.proj_method, p=1, d=self.proj_dim, seed=self.seed, s=self.sjlt_s)

    @property
    def train_features(self) -> FeatureSpec:
        """Specification of the feature computed from a training row's gradient."""
        return FeatureSpec(self.gradient_type, self.adam_eps_mode, self.bias_correction)

    @property
    def target_features(self) -> FeatureSpec:
        """Targets are plain gradients: `sgd`, or `sign` when the training rows are `sign`."""
        return FeatureSpec("sign" if self.gradient_type == "sign" else "sgd")
