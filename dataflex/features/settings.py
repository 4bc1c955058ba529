"""How gradient features are made: the parameters that strategies by influence share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gradkernels import ProjectionSpec

from gradstore.export.features import FeatureSpec


@dataclass(frozen=True)
class FeatureSettings:
    """What a user can say about gradient features.

    Attributes:
        gradient_type: adam_marginal | adam | sgd | sign.
        adam_eps_mode: inside | outside the square root.
        bias_correction: divide the moments by 1 - beta ** (t + 1).
        proj_method: sjlt | rademacher | gaussian.
        proj_dim: d.
        sjlt_s: non-zeros per parameter of sjlt.
        seed: base seed; each checkpoint projects with hash(seed, step).
        dtype: float16 | bfloat16, how features are stored.
        tokens_per_batch: padded tokens of a gradient batch; None chooses by device.
        max_bad_fraction: share of non-finite rows above which an export stops.
    """

    gradient_type: Literal["adam_marginal", "adam", "sgd", "sign"] = "adam_marginal"
    adam_eps_mode: Literal["inside", "outside"] = "inside"
    bias_correction: bool = False
    proj_method: Literal["sjlt", "rademacher", "gaussian"] = "sjlt"
    proj_dim: int = 8192
    sjlt_s: int = 8
    seed: int = 42
    dtype: str = "float16"
    tokens_per_batch: int | None = None
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        """Let the parts that will use the values check them."""
        if not isinstance(self.bias_correction, bool):
            raise ValueError(f"bias_correction is {self.bias_correction!r}; give true or false")
        if not isinstance(self.max_bad_fraction, int | float):
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction!r}; give a number")
        if not isinstance(self.tokens_per_batch, int | None):
            raise ValueError(
                f"tokens_per_batch is {self.tokens_per_batch!r}; give a whole number or null"
            )
        _ = self.train_features
        ProjectionSpec(self.proj_method, p=1, d=self.proj_dim, seed=self.seed, s=self.sjlt_s)
        if self.dtype not in ("float16", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; choose float16 or bfloat16")
        if self.tokens_per_batch is not None and self.tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch is {self.tokens_per_batch}; at least 1 is needed")
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}; give a share of 0 to 1")

    @property
    def train_features(self) -> FeatureSpec:
        """How a training row's gradient becomes a feature."""
        return FeatureSpec(self.gradient_type, self.adam_eps_mode, self.bias_correction)

    @property
    def target_features(self) -> FeatureSpec:
        """Targets are plain gradients: `sgd`, or `sign` when the training rows are `sign`."""
        return FeatureSpec("sign" if self.gradient_type == "sign" else "sgd")
