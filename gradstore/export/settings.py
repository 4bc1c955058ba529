"""Settings of gradient features: of what kind they are, how they are projected and stored."""

# Annotations are objects here: whoever checks a user's values reads them, from any module.

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Interval, MinLen
from gradkernels import ProjectionSpec
from gradkernels.published import missing
from gradkernels.spec import Method
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gradstore.capture.chosen import Modules
from gradstore.errors import BadInput
from gradstore.export import kronecker
from gradstore.export.features import EpsMode, FeatureSpec, Kind
from gradstore.export.kronecker import DAMPING, CurvatureRule
from gradstore.export.share import OptimizerStep
from gradstore.format.layout import MAX_UNIT_ROWS, UNIT_ROWS, FeatureDtype
from gradstore.storage.leases import Worker


@dataclass(frozen=True)
class GradientSettings:
    """Settings of gradient features, the same for the training rows and the target sets of a store.

    Attributes:
        gradient_type: feature of a training row, see `gradstore.export.features`.
        adam_eps_mode: whether eps stands inside the root or outside.
        bias_correction: whether the moments are corrected for their start at zero.
        gradient_modules: linear, all or names of modules, the trained parameters of a model without
            an adapter whose gradients are taken, see `gradstore.capture.chosen`.
        proj_method: sjlt; rademacher, dense; gaussian, as dense, which on a CPU takes 15 to 35
            times as long as rademacher and is no more exact; or trak: to compare with LESS and TRAK
            byte by byte (TRAK's own projector, on the CPU; slow, 512 bytes of RAM a parameter,
            whole gradients).
        proj_dim: projected dimensions d.
        sjlt_s: non-zeros per parameter of sjlt.
        seed: of the projection; each checkpoint projects with hash(seed, step), under trak with
            the seed itself (LESS has 0).
        dtype: of stored training rows: 1bit, int8, bfloat16, float16 or float32; target rows are
            kept in float16 where those are 1bit or int8.
        tokens_per_batch: padded tokens of a gradient batch; None takes 2,048 on a CPU, and on a
            CUDA device what it has room for.
        max_bad_fraction: share of rows with non-finite gradients above which an export stops.
        unit_rows: rows of a unit, which is written, leased and redone as a whole; a plan that there
            is keeps its own.

    Raises:
        ValueError: more non-zeros than dimensions, or proj_method trak without TRAK.
    """

    gradient_type: Kind = "adam_marginal"
    adam_eps_mode: EpsMode = "inside"
    bias_correction: bool = False
    gradient_modules: Modules = "linear"
    proj_method: Method = "sjlt"
    proj_dim: Annotated[int, Interval(ge=1, le=1 << 24)] = 8192
    sjlt_s: Annotated[int, Ge(1)] = 8
    seed: Annotated[int, Ge(0)] = 42
    dtype: FeatureDtype = "float16"
    tokens_per_batch: Annotated[int, Ge(1)] | None = None
    max_bad_fraction: Annotated[float, Interval(ge=0, le=1)] = 0.01
    unit_rows: Annotated[int, Interval(ge=1, le=MAX_UNIT_ROWS)] = UNIT_ROWS

    def __post_init__(self) -> None:
        """Let the projection check how its parameters relate to each other, and find TRAK."""
        self.projection(1)
        why = missing() if self.proj_method == "trak" else None
        if why is not None:
            raise ValueError(f"proj_method is 'trak', but {why}")

    def projection(self, p: int) -> ProjectionSpec:
        """Return the projection of p parameters, with the base seed."""
        return ProjectionSpec(self.proj_method, p=p, d=self.proj_dim, seed=self.seed, s=self.sjlt_s)

    @property
    def curvature(self) -> CurvatureRule | None:
        """The metric that gradients are put into before they are projected; None for none."""
        return None

    @property
    def train_features(self) -> FeatureSpec:
        """Specification of the feature computed from a training row's gradient."""
        return FeatureSpec(self.gradient_type, self.adam_eps_mode, self.bias_correction,
                           modules=self.gradient_modules)  # fmt: skip

    @property
    def target_features(self) -> FeatureSpec:
        """Targets are plain gradients: `sgd`, or `sign` when the training rows are `sign`."""
        kind: Kind = "sign" if self.gradient_type == "sign" else "sgd"
        return FeatureSpec(kind, modules=self.gradient_modules)


@dataclass(frozen=True)
class BuildSettings(GradientSettings):
    """Settings of `gradstore.build`, beside those of the features.

    Attributes:
        learning_rate: mean since the previous checkpoint; weights this one among others.
        gradstore_run: prefix of the generations, where several runs share a store.
        run_id: id of the training run that the model comes from; a store refuses another one's
            features under the same prefix.
        store_text: whether prompt and response of every row are kept, where they are known.
        step_rows: rows of an optimizer step, over micro-batches, accumulated steps and processes;
            for gradient_type adam_share.
        max_grad_norm: that a step's gradient is clipped to, 0 for none; for the same.
        preconditioner: kfac or ekfac puts gradients into the metric of Kronecker factors, fitted on
            training rows (`gradstore.export.kronecker`); for gradient_type sgd.
        damping: of that metric, as a multiple of a block's mean eigenvalue.
        worker: this process among those that build the store together, ranks too; None builds it
            alone.

    Raises:
        ValueError: gradient_type adam_share without step_rows, or a metric of another type than
            sgd.
    """

    learning_rate: Annotated[float, Ge(0)] = 0.0
    gradstore_run: str = ""
    run_id: Annotated[str, MinLen(1)] = "gradstore.build"
    store_text: bool = True
    step_rows: Annotated[int, Ge(1)] | None = None
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    preconditioner: Literal["none", kronecker.Kind] = "none"
    damping: Annotated[float, Gt(0)] = DAMPING
    worker: Worker | None = None

    def __post_init__(self) -> None:
        """Check that a row's share of a step is known where it is needed, and the metric's rule."""
        super().__post_init__()
        if self.curvature is not None:
            self.curvature.check(self.gradient_type)
        if self.train_features.needs_share and self.step_rows is None:
            raise ValueError(
                "gradient_type adam_share needs step_rows, the rows of an optimizer step"
            )

    @property
    def curvature(self) -> CurvatureRule | None:
        """The metric that gradients are put into before they are projected; None for none."""
        if self.preconditioner == "none":
            return None
        return CurvatureRule(self.preconditioner, self.damping)

    @property
    def optimizer_step(self) -> OptimizerStep | None:
        """The step of the run, where its rows are given."""
        if self.step_rows is None:
            return None
        return OptimizerStep(self.step_rows, self.max_grad_norm)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Check what a user gave by keyword.

        Raises:
            BadInput: every unknown name and every value refused.
        """
        known = {each.name: each.type for each in fields(cls)}
        strict = ConfigDict(strict=True)
        faults = [f"unknown {name!r}; accepted are {', '.join(known)}"
                  for name in given if name not in known]  # fmt: skip
        for name in given.keys() & known.keys():
            try:
                TypeAdapter(known[name], config=strict).validate_python(given[name])
            except ValidationError as error:
                faults.append(f"{name} is {given[name]!r}: {error.errors()[0]['msg']}")
        if faults:
            raise BadInput(f"settings of the build: {'; '.join(sorted(faults))}.")
        try:
            return cls(**given)
        except ValueError as error:
            raise BadInput(f"settings of the build: {error}.") from error
