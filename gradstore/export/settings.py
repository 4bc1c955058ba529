"""Settings of gradient features: of what kind they are, how they are projected and stored."""

# Annotations are objects here: whoever checks a user's values reads them, from any module.

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Interval
from gradkernels import ProjectionSpec

from gradstore.export.features import EpsMode, FeatureSpec, Kind


@dataclass(frozen=True)
class GradientSettings:
    """Settings of gradient features, the same for the training rows and the target sets of a store.

    Attributes:
        gradient_type: feature of a training row, see `gradstore.export.features`.
        adam_eps_mode: whether eps stands inside the root or outside.
        bias_correction: whether the moments are corrected for their start at zero.
        proj_method: sjlt, rademacher or gaussian.
        proj_dim: projected dimensions d.
        sjlt_s: non-zeros per parameter of sjlt.
        seed: of the projection; each checkpoint projects with hash(seed, step).
        dtype: of stored features.
        tokens_per_batch: padded tokens of a gradient batch; None chooses by device.
        max_bad_fraction: share of rows with non-finite gradients above which an export stops.

    Raises:
        ValueError: more non-zeros than dimensions.
    """

    gradient_type: Kind = "adam_marginal"
    adam_eps_mode: EpsMode = "inside"
    bias_correction: bool = False
    proj_method: Literal["sjlt", "rademacher", "gaussian"] = "sjlt"
    proj_dim: Annotated[int, Interval(ge=1, le=1 << 24)] = 8192
    sjlt_s: Annotated[int, Ge(1)] = 8
    seed: Annotated[int, Ge(0)] = 42
    dtype: Literal["float16", "bfloat16"] = "float16"
    tokens_per_batch: Annotated[int, Ge(1)] | None = None
    max_bad_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.01

    def __post_init__(self) -> None:
        """Let the projection check how its parameters relate to each other."""
        self.projection(1)

    def projection(self, p: int) -> ProjectionSpec:
        """Return the projection of p parameters, with the base seed."""
        return ProjectionSpec(self.proj_method, p=p, d=self.proj_dim, seed=self.seed, s=self.sjlt_s)

    @property
    def train_features(self) -> FeatureSpec:
        """Specification of the feature computed from a training row's gradient."""
        return FeatureSpec(self.gradient_type, self.adam_eps_mode, self.bias_correction)

    @property
    def target_features(self) -> FeatureSpec:
        """Targets are plain gradients: `sgd`, or `sign` when the training rows are `sign`."""
        return FeatureSpec("sign" if self.gradient_type == "sign" else "sgd")
